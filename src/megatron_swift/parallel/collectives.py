"""Linear collectives and their transposes as autograd functions, along dim 0: the only four that tensor and sequence parallelism need."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames them and warns of the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] on each rank -> [size * n, ...]."""
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[size * n, ...] on each rank -> the sum's part [n, ...] of this rank."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor with the sum (or maximum) over the ranks."""
    out = x.contiguous().clone()
    dist.all_reduce(out, op=op, group=group)
    return out


class Copy(torch.autograd.Function):
    """Identity; the gradient is summed. Enters a region whose ranks hold different rows of a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class Reduce(torch.autograd.Function):
    """Sum; the gradient is passed on. Leaves a region whose ranks hold different columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class Gather(torch.autograd.Function):
    """All-gather of token rows; the gradient is reduce-scattered. Enters from a sequence-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.group), None


class Scatter(torch.autograd.Function):
    """Reduce-scatter of token rows; the gradient is gathered. Leaves to a sequence-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather(grad, ctx.group), None


class AllToAll(torch.autograd.Function):
    """Rows to every rank: `sent[i]` of them to rank i, `received[j]` from rank j. The gradient travels back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return all_to_all(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that the other ranks send me, by rank."""
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class GatherUneven(torch.autograd.Function):
    """`sizes[i]` rows of each rank i -> all of them; the gradient is summed and scattered. Padded on the way: gloo wants equal sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_uneven(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return scatter_uneven(grad, ctx.sizes, ctx.group), None, None


class ScatterUneven(torch.autograd.Function):
    """The sum over ranks, of which rank i gets its `sizes[i]` rows; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return scatter_uneven(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gather_uneven(grad, ctx.sizes, ctx.group), None, None


def gather_uneven(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """`sizes[i]` rows of each rank i, one after the other."""
    longest = max(*sizes, 1)  # there may be none at all
    if len(x) < longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = all_gather(x, group).split(longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def scatter_uneven(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """My `sizes[rank]` rows of the sum over ranks."""
    longest = max(*sizes, 1)  # there may be none at all
    padded = x.new_zeros(len(sizes), longest, *x.shape[1:])
    for row, part in zip(padded, x.split(sizes), strict=True):
        row[: len(part)] = part
    return reduce_scatter(padded.flatten(0, 1), group)[: sizes[group.rank()]]
