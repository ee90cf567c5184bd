"""The fused query/key/value rows cut into q, k and v, with each head of q and k normalised and rotated, one pass; and the same backwards.

A program holds some tokens of one group and goes through that group's heads: cos, sin and the norms' weights are read once for all of them, and
registers do not grow with the number of heads. What heads are normalised by is computed again in the backward pass, which reads them anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.fused.norm import processors
from megatron_swift.kernels.fused.sums import column_sums

_WARPS = 4
# Tokens of a tile x half a head: of each half 8 values a thread, 16 bytes in 16-bit types; backwards 4, as gradients, too, are in registers.
_FORWARD_TILE, _BACKWARD_TILE = 1024, 512
# Of the backward pass: ptxas counts 96 registers a thread for heads of 128, with which as many fit.
_PROGRAMS_PER_PROCESSOR = 5


@triton.jit
def _normalised(qkv, at, inside, epsilon, DIM: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    """The two halves of some heads, divided by the root of their mean square, and 1 / that root."""
    first = tl.load(qkv + at, inside, 0.0).to(tl.float32)
    second = tl.load(qkv + at + DIM // 2, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(first * first + second * second, 1) / DIM + epsilon)[:, None]
    return first * r, second * r, r


@triton.jit
def _turned(qkv, at, out, at_out, inside, w1, w2, c, s, epsilon, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some heads normalised, weighted, rotated and written."""
    dtype = qkv.dtype.element_ty
    first, second, _ = _normalised(qkv, at, inside, epsilon, DIM)
    # Rounded before the product with the weight, as the plain form does it; then once more, at the end.
    first, second = first.to(dtype).to(tl.float32) * w1, second.to(dtype).to(tl.float32) * w2
    tl.store(out + at_out, (first * c - second * s).to(dtype), inside)
    tl.store(out + at_out + DIM // 2, (second * c + first * s).to(dtype), inside)


@triton.jit
def _turned_back(qkv, at, grad, at_grad, dqkv, inside, w1, w2, c, s, epsilon, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of some heads written; what they add to that of the weight is returned, by halves."""
    dtype = dqkv.dtype.element_ty
    one = tl.load(grad + at_grad, inside, 0.0).to(tl.float32)
    two = tl.load(grad + at_grad + DIM // 2, inside, 0.0).to(tl.float32)
    first, second, r = _normalised(qkv, at, inside, epsilon, DIM)
    one, two = one * c + two * s, two * c - one * s
    dw1, dw2 = one * first.to(dtype).to(tl.float32), two * second.to(dtype).to(tl.float32)
    one, two = one * w1, two * w2
    mean = (tl.sum(one * first + two * second, 1) / DIM)[:, None]
    tl.store(dqkv + at, (r * (one - first * mean)).to(dtype), inside)
    tl.store(dqkv + at + DIM // 2, (r * (two - second * mean)).to(dtype), inside)
    return dw1, dw2


@triton.jit
def _halves(weight, at, inside, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A norm's weight by halves, repeated for each head: so loaded, no thread needs what another one has."""
    w1 = tl.load(weight + at, inside, 0.0).to(tl.float32)
    w2 = tl.load(weight + at + DIM // 2, inside, 0.0).to(tl.float32)
    return w1, w2


@triton.jit
def _copied(source, at, target, at_target, inside, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(source + at, inside, 0.0)
    second = tl.load(source + at + DIM // 2, inside, 0.0)
    tl.store(target + at_target, first, inside)
    tl.store(target + at_target + DIM // 2, second, inside)


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    tile,
    cos,
    sin,
    tokens,
    groups,
    PER_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Of a tile: what lies inside, its angles, and where the group's first row, its first query and its key or value are."""
    column = tl.arange(0, HALF)
    token = ((tile // groups) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = (token < tokens)[:, None] & (column < DIM // 2)[None, :]
    at = token[:, None] * DIM + column[None, :]
    c, s = tl.load(cos + at, inside, 0.0).to(tl.float32), tl.load(sin + at, inside, 0.0).to(tl.float32)
    # Rows of a group: its query heads, then its key, then its value.
    row = (token * groups + tile % groups)[:, None] * DIM
    return (
        inside,
        c,
        s,
        row * (PER_GROUP + 2) + column[None, :],
        row * PER_GROUP + column[None, :],
        row + column[None, :],
    )


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    k,
    v,
    tokens,
    groups,
    epsilon,
    PER_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    tile, column = tl.program_id(0), tl.arange(0, HALF)
    at_w = tl.broadcast_to(column[None, :], (TOKENS, HALF))
    inside, c, s, at, at_q, at_k = _places(tile, cos, sin, tokens, groups, PER_GROUP, DIM, TOKENS, HALF)
    w1, w2 = _halves(q_weight, at_w, inside, DIM)
    for head in range(PER_GROUP):
        _turned(qkv + head * DIM, at, q + head * DIM, at_q, inside, w1, w2, c, s, epsilon, DIM)
    w1, w2 = _halves(k_weight, at_w, inside, DIM)
    _turned(qkv + PER_GROUP * DIM, at, k, at_k, inside, w1, w2, c, s, epsilon, DIM)
    _copied(qkv + (PER_GROUP + 1) * DIM, at, v, at_k, inside, DIM)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    dq,
    dk,
    dv,
    dqkv,
    partial,
    tokens,
    groups,
    tiles,
    epsilon,
    PER_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, HALF)
    at_w = tl.broadcast_to(column[None, :], (TOKENS, HALF))
    # Added up over the rows of a tile at the end alone: that is an exchange between threads.
    q1 = tl.zeros((TOKENS, HALF), tl.float32)
    q2 = tl.zeros((TOKENS, HALF), tl.float32)
    k1 = tl.zeros((TOKENS, HALF), tl.float32)
    k2 = tl.zeros((TOKENS, HALF), tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        inside, c, s, at, at_q, at_k = _places(tile, cos, sin, tokens, groups, PER_GROUP, DIM, TOKENS, HALF)
        w1, w2 = _halves(q_weight, at_w, inside, DIM)
        for head in range(PER_GROUP):
            beyond = head * DIM
            dw1, dw2 = _turned_back(
                qkv + beyond, at, dq + beyond, at_q, dqkv + beyond, inside, w1, w2, c, s, epsilon, DIM
            )
            q1 += dw1
            q2 += dw2
        w1, w2 = _halves(k_weight, at_w, inside, DIM)
        beyond = PER_GROUP * DIM
        dw1, dw2 = _turned_back(qkv + beyond, at, dk, at_k, dqkv + beyond, inside, w1, w2, c, s, epsilon, DIM)
        k1 += dw1
        k2 += dw2
        _copied(dv, at_k, dqkv + beyond + DIM, at, inside, DIM)
    at = partial + program.to(tl.int64) * (2 * DIM) + column
    tl.store(at, tl.sum(q1, 0), column < DIM // 2)
    tl.store(at + DIM // 2, tl.sum(q2, 0), column < DIM // 2)
    tl.store(at + DIM, tl.sum(k1, 0), column < DIM // 2)
    tl.store(at + DIM + DIM // 2, tl.sum(k2, 0), column < DIM // 2)


def _sizes(qkv: Tensor, tile: int) -> tuple[int, dict[str, int]]:
    """(number of tiles, what the kernels are compiled for)."""
    tokens, groups, rows, dim = qkv.shape
    half = triton.next_power_of_2(dim // 2)
    at_once = max(1, tile // half)
    sizes = {"PER_GROUP": rows - 2, "DIM": dim, "TOKENS": at_once, "HALF": half, "num_warps": _WARPS}
    return triton.cdiv(tokens, at_once) * groups, sizes


class _SplitNormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, rows, dim = qkv.shape
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        q = qkv.new_empty(tokens, groups * (rows - 2), dim)
        k, v = qkv.new_empty(tokens, groups, dim), qkv.new_empty(tokens, groups, dim)
        tiles, sizes = _sizes(qkv, _FORWARD_TILE)
        if tiles:
            _forward[(tiles,)](qkv, q_weight, k_weight, cos, sin, q, k, v, tokens, groups, epsilon, **sizes)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.epsilon = epsilon
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        tokens, groups, _, dim = qkv.shape
        dqkv = torch.empty_like(qkv)
        tiles, sizes = _sizes(qkv, _BACKWARD_TILE)
        programs = max(min(tiles, _PROGRAMS_PER_PROCESSOR * processors(qkv.device)), 1)
        partial = torch.empty(programs, 2 * dim, dtype=torch.float32, device=qkv.device)
        grads = (dq.contiguous(), dk.contiguous(), dv.contiguous(), dqkv, partial)
        _backward[(programs,)](qkv, q_weight, k_weight, cos, sin, *grads, tokens, groups, tiles, ctx.epsilon, **sizes)
        dw = column_sums(partial, torch.promote_types(q_weight.dtype, k_weight.dtype))
        return dqkv, dw[:dim].to(q_weight.dtype), dw[dim:].to(k_weight.dtype), None, None, None


def fused_split_norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_norm_rotate` for float32 and 16-bit types, keeping qkv, cos and sin for the backward pass.

    What weighting and rotation give is rounded once, where the plain form rounds four times.
    """
    return _SplitNormRotate.apply(qkv, q_weight, k_weight, epsilon, cos, sin)  # type: ignore[no-any-return]
