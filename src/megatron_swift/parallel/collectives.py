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
