"""The experts' answers of a token gathered, weighted and added in one pass; nothing of k times the tokens' size is written in between."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(  # type: ignore[no-untyped-def]  # Triton compiles it
    y, back, probs, out, rows, columns, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        at = tl.load(back + token * K + choice)
        v = tl.load(y + at * columns + column, (column < columns) & (at < rows), 0.0).to(tl.float32)
        if WEIGHTED:
            v = v * tl.load(probs + token * K + choice).to(tl.float32)
        total += v
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), column < columns)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]  # Triton compiles it
    grad, y, back, probs, dy, d_probs, rows, columns, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    g = tl.load(grad + token * columns + column, column < columns, 0.0).to(tl.float32)
    for choice in tl.static_range(K):
        at = tl.load(back + token * K + choice)
        inside = (column < columns) & (at < rows)
        p = tl.load(probs + token * K + choice).to(tl.float32)
        v = tl.load(y + at * columns + column, inside, 0.0).to(tl.float32)
        tl.store(dy + at * columns + column, (g * p).to(dy.dtype.element_ty), inside)
        tl.store(d_probs + token * K + choice, tl.sum(g * v, 0).to(d_probs.dtype.element_ty))


def gather_sum(y: Tensor, back: Tensor, probs: Tensor | None, *, k: int) -> Tensor:
    """For each token the sum of its k rows y[back], times probs [T, k] if given; an index of len(y) stands for zeros."""
    tokens, columns = len(back) // k, y.shape[1]
    out = y.new_empty(tokens, columns)
    block = min(triton.next_power_of_2(columns), 2048)
    if tokens:
        _forward[(tokens, triton.cdiv(columns, block))](
            y, back, y if probs is None else probs, out, len(y), columns, K=k, WEIGHTED=probs is not None, BLOCK=block
        )
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, back: Tensor, probs: Tensor) -> Tensor:
        y, probs = y.contiguous(), probs.contiguous()
        ctx.save_for_backward(y, back, probs)
        return gather_sum(y, back, probs, k=probs.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        y, back, probs = ctx.saved_tensors
        dy, d_probs = torch.empty_like(y), torch.empty_like(probs)
        columns = y.shape[1]
        if len(grad):
            _backward[(len(grad),)](
                grad.contiguous(),
                y,
                back,
                probs,
                dy,
                d_probs,
                len(y),
                columns,
                K=probs.shape[1],
                BLOCK=triton.next_power_of_2(columns),
                num_warps=8,
            )
        return dy, None, d_probs


def fused_combine(y: Tensor, back: Tensor, probs: Tensor) -> Tensor:
    """The weighted sum of each token's rows y[back], each row of y belonging to one choice."""
    return _Combine.apply(y, back, probs)  # type: ignore[no-any-return]
