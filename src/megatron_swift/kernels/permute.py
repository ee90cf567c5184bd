"""Tokens sorted by expert and back: what is sent to the experts, and how their answers are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_swift.kernels.triton_runs import triton_takes


class _Take(torch.autograd.Function):
    """x[order // k]: the token of each choice, in expert order. The gradient gathers instead of scattering, so it is the same on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = (x.shape[0], k, x.shape[1])
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        if triton_takes(grad):
            from megatron_swift.kernels.fused.combine import gather_sum

            return gather_sum(grad.contiguous(), back, None, k=ctx.shape[1]), None, None, None
        return _gather_back(grad, back).view(ctx.shape).sum(1), None, None, None


def _gather_back(y: Tensor, back: Tensor) -> Tensor:
    """y[back], where len(y) stands for a row of zeros: a choice that was dropped."""
    if len(back) != len(y):
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    return y.index_select(0, back)


@dataclass(frozen=True)
class Permuted:
    """The rows that go to experts, in order of expert.

    x      : [N, H], one row for each choice that is kept; with padding [E * limit, H].
    counts : int64 [E], rows of each expert, on the device.
    back   : int64 [T * k], where each choice's row lies before padding; N for a dropped one.
    slots  : int64 [N], the rows' places in the padded input; None without padding.
    """

    x: Tensor
    counts: Tensor
    back: Tensor
    slots: Tensor | None

    def combine(self, y: Tensor, probs: Tensor) -> Tensor:
        """The experts' answers y (in the order of x), weighted by probs [T, k] and added up: [T, H] in y's dtype.

        Weights and sum are in the dtype of probs where that is the wider one.
        """
        if self.slots is not None:
            y = y.index_select(0, self.slots)
        if triton_takes(y):
            from megatron_swift.kernels.fused.combine import fused_combine

            return fused_combine(y, self.back, probs)
        each = _gather_back(y, self.back).view(*probs.shape, y.shape[1])
        return (each * probs[..., None]).sum(1).to(y.dtype)


def permute(
    x: Tensor, experts: Tensor, *, num_experts: int, kept: Tensor | None = None, limit: int | None = None
) -> Permuted:
    """Sort the choices of tokens x [T, H], experts int64 [T, k], by expert; stable, so that tokens of one expert keep their order.

    kept  : bool [T, k], choices that are not dropped; counting them costs a host synchronisation, as nothing else here does.
    limit : pad every expert's input to this many rows.
    """
    flat = experts.reshape(-1)
    if kept is not None:
        flat = flat.masked_fill(~kept.reshape(-1), num_experts)
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    number = len(flat) if kept is None else int(counts.sum())
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    back, order = back.clamp(max=number), order[:number]
    rows = _Take.apply(x, order, back, experts.shape[1])
    if limit is None:
        return Permuted(rows, counts, back, None)
    starts = counts.cumsum(0) - counts
    expert = flat[order]
    slots = expert * limit + torch.arange(number, device=x.device) - starts[expert]
    padded = rows.new_zeros(num_experts * limit, rows.shape[1]).index_copy(0, slots, rows)
    return Permuted(padded, torch.full_like(counts, limit), back, slots)
