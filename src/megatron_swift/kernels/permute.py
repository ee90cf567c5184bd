"""Tokens sorted by expert and back: what is sent to the experts, and how their answers are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_swift.kernels.triton_runs import triton_takes


class Order(NamedTuple):
    """Where each choice of T tokens, k each, lies once the choices are sorted by expert.

    choices : int64 [N], the choices (token * k + which) in order of expert.  tokens : int64 [N], their tokens.
    back    : int64 [T * k], each choice's place in that order; N for a dropped one.
    counts  : int64 [E], choices of each expert, on the device.
    """

    choices: Tensor
    tokens: Tensor
    back: Tensor
    counts: Tensor


def sort_choices(experts: Tensor, *, num_experts: int, kept: Tensor | None = None) -> Order:
    """Sort the choices int64 [T, k] by expert; stable, so that tokens of one expert keep their order.

    kept : bool [T, k], choices that are not dropped; counting them costs a host synchronisation, as nothing else here does.
    """
    flat = experts.reshape(-1)
    if kept is not None:
        flat = flat.masked_fill(~kept.reshape(-1), num_experts)
    choices = flat.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    number = len(flat) if kept is None else int(counts.sum())
    back = torch.empty_like(choices)
    back[choices] = torch.arange(len(choices), device=experts.device)
    choices = choices[:number]
    return Order(choices, choices // experts.shape[1], back.clamp(max=number), counts)


class _Take(torch.autograd.Function):
    """x[tokens]: the token of each choice, in expert order. The gradient gathers instead of scattering, so it is the same on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return weighted_sum(grad, back, None, k=ctx.k), None, None, None


def gather_back(y: Tensor, back: Tensor) -> Tensor:
    """y[back], where len(y) stands for a row of zeros: a choice that was dropped."""
    if len(back) != len(y):
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    return y.index_select(0, back)


def weighted_sum(y: Tensor, back: Tensor, probs: Tensor | None, *, k: int = 0) -> Tensor:
    """For each token the sum of its rows y[back], times probs [T, k] if given (else k says how many): [T, H] in y's dtype. No gradient."""
    k = k if probs is None else probs.shape[1]
    if triton_takes(y):
        from megatron_swift.kernels.fused.combine import gather_sum

        return gather_sum(y.contiguous(), back, None if probs is None else probs.contiguous(), k=k)
    each = gather_back(y, back).view(-1, k, y.shape[1])
    return (each if probs is None else each * probs[..., None]).sum(1).to(y.dtype)


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
        each = gather_back(y, self.back).view(*probs.shape, y.shape[1])
        return (each * probs[..., None]).sum(1).to(y.dtype)


def permute(
    x: Tensor, experts: Tensor, *, num_experts: int, kept: Tensor | None = None, limit: int | None = None
) -> Permuted:
    """The rows of tokens x [T, H] as `sort_choices` orders the choices.

    limit : pad every expert's input to this many rows.
    """
    choices, tokens, back, counts = sort_choices(experts, num_experts=num_experts, kept=kept)
    rows = _Take.apply(x, tokens, back, experts.shape[1])
    if limit is None:
        return Permuted(rows, counts, back, None)
    starts = counts.cumsum(0) - counts
    expert = experts.reshape(-1)[choices]
    slots = expert * limit + torch.arange(len(choices), device=x.device) - starts[expert]
    padded = rows.new_zeros(num_experts * limit, rows.shape[1]).index_copy(0, slots, rows)
    return Permuted(padded, torch.full_like(counts, limit), back, slots)
