"""The fused query/key/value rows cut into q, k and v with q and k rotated, one pass; and the same backwards."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cut(  # type: ignore[no-untyped-def]  # Triton compiles it
    qkv,
    cos,
    sin,
    q,
    k,
    v,
    groups,
    PER_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    wide = column < half
    # Rows of a group: its query heads, then its key, then its value.
    group, within = head // (PER_GROUP + 2), head % (PER_GROUP + 2)
    there = group < groups
    at_q = ((token * groups + group) * PER_GROUP + within)[:, None] * DIM + column[None, :]
    at_k = (token * groups + group)[:, None] * DIM + column[None, :]
    at_qkv = (token * groups * (PER_GROUP + 2) + head)[:, None] * DIM + column[None, :]
    is_q = (there & (within < PER_GROUP))[:, None] & wide[None, :]
    is_k = (there & (within == PER_GROUP))[:, None] & wide[None, :]
    is_v = (there & (within == PER_GROUP + 1))[:, None] & wide[None, :]
    turned = (within <= PER_GROUP)[:, None]
    c = tl.load(cos + token * DIM + column, wide, 1.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * DIM + column, wide, 0.0).to(tl.float32)[None, :]
    c, s = tl.where(turned, c, 1.0), tl.where(turned, s, 0.0)
    inside = there[:, None] & wide[None, :]
    if BACKWARD:
        first = tl.load(q + at_q, is_q, 0.0) + tl.load(k + at_k, is_k, 0.0) + tl.load(v + at_k, is_v, 0.0)
        second = tl.load(q + at_q + half, is_q, 0.0) + tl.load(k + at_k + half, is_k, 0.0)
        second += tl.load(v + at_k + half, is_v, 0.0)
        first, second = first.to(tl.float32), second.to(tl.float32)
        tl.store(qkv + at_qkv, (first * c + second * s).to(qkv.dtype.element_ty), inside)
        tl.store(qkv + at_qkv + half, (second * c - first * s).to(qkv.dtype.element_ty), inside)
    else:
        first = tl.load(qkv + at_qkv, inside, 0.0).to(tl.float32)
        second = tl.load(qkv + at_qkv + half, inside, 0.0).to(tl.float32)
        one = (first * c - second * s).to(qkv.dtype.element_ty)
        two = (second * c + first * s).to(qkv.dtype.element_ty)
        tl.store(q + at_q, one, is_q)
        tl.store(q + at_q + half, two, is_q)
        tl.store(k + at_k, one, is_k)
        tl.store(k + at_k + half, two, is_k)
        tl.store(v + at_k, one, is_v)
        tl.store(v + at_k + half, two, is_v)


def _launch(qkv: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> None:
    tokens, groups, rows, dim = qkv.shape
    if tokens:
        _cut[(tokens,)](
            qkv,
            cos,
            sin,
            q,
            k,
            v,
            groups,
            PER_GROUP=rows - 2,
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            HEADS=triton.next_power_of_2(groups * rows),
            BACKWARD=backward,
        )


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, rows, dim = qkv.shape
        q = qkv.new_empty(tokens, groups * (rows - 2), dim)
        k, v = qkv.new_empty(tokens, groups, dim), qkv.new_empty(tokens, groups, dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        _launch(qkv.contiguous(), cos, sin, q, k, v, backward=False)
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        dqkv = dq.new_empty(ctx.shape)
        _launch(dqkv, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(), backward=True)
        return dqkv, None, None


def fused_split_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`split_rotate` for float32 and 16-bit types; the rotation is rounded once, where the plain form rounds three times."""
    return _SplitRotate.apply(qkv, cos, sin)  # type: ignore[no-any-return]
