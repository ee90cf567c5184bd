"""A router's choice, its weights and its sums in one pass over the logits, and their gradient in another one that keeps the logits alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.fused.norm import processors
from megatron_swift.kernels.router import Gated, Sums

_PROGRAMS_PER_PROCESSOR = 4  # each adds up its own tokens; the rest is a sum over programs
_TILE = 512  # logits at a time


@triton.jit
def _keys(v, column, inside, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    """int64 keys in the order of the logits, the lower column first where they are equal; NaN above all, as in torch's sort."""
    bits = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)  # -0 equals 0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(v != v, 0x7FFFFFFF, order)
    return tl.where(inside, (order.to(tl.int64) << 32) | (BLOCK - 1 - column), -9223372036854775807)


@triton.jit
def _top(  # type: ignore[no-untyped-def]  # Triton compiles it
    v, column, choice, inside, K: tl.constexpr, KS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """(the K largest values [ROWS, KS], their columns, which are taken [ROWS, BLOCK]: those beyond the experts, too)."""
    key = _keys(v, column, inside, BLOCK)
    values = tl.full((ROWS, KS), float("-inf"), tl.float32)
    found = tl.zeros((ROWS, KS), tl.int64)
    for i in tl.static_range(K):
        best = BLOCK - 1 - (tl.max(key, 1) & 0xFFFFFFFF)
        hit = column == best[:, None]
        values = tl.where(choice == i, tl.sum(tl.where(hit, v, 0.0), 1)[:, None], values)
        found = tl.where(choice == i, best[:, None], found)
        key = tl.where(hit, -9223372036854775807, key)
    return values, found, key == -9223372036854775807


@triton.jit(do_not_specialize=["rows", "tiles"])
def _forward(  # type: ignore[no-untyped-def]  # Triton compiles it
    logits,
    probs,
    experts,
    partial,
    rows,
    columns,
    tiles,
    K: tl.constexpr,
    KS: tl.constexpr,
    PRE: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column, choice = tl.arange(0, BLOCK)[None, :], tl.arange(0, KS)[None, :]
    load = tl.zeros((BLOCK,), tl.float32)
    scores = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    for tile in range(program, tiles, programs):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = row < rows
        v = tl.load(logits + row[:, None] * columns + column, here[:, None] & (column < columns), 0.0).to(tl.float32)
        v = tl.where(column < columns, v, float("-inf"))
        values, found, taken = _top(v, column, choice, column < columns, K, KS, ROWS, BLOCK)
        first = tl.sum(tl.where(choice == 0, values, 0.0), 1)  # the largest logit
        shifted = v - first[:, None]
        exact = tl.where(column < columns, tl.exp(shifted), 0.0)
        whole = tl.sum(exact, 1)
        chosen = tl.where(choice < K, tl.exp(values - first[:, None]), 0.0)
        over = whole if PRE else tl.sum(chosen, 1)
        at = row[:, None] * K + choice
        tl.store(probs + at, chosen / over[:, None], here[:, None] & (choice < K))
        tl.store(experts + at, found, here[:, None] & (choice < K))
        if SUMS:
            p = exact / whole[:, None]
            log = tl.log(whole)
            load += tl.sum(tl.where(taken & here[:, None], 1.0, 0.0), 0)
            scores += tl.sum(tl.where(here[:, None], p, 0.0), 0)
            squares += tl.where(here, (first + log) * (first + log), 0.0)
            mean = tl.sum(p * tl.where(p > 0.0, shifted, 0.0), 1)  # not 0 x -inf
            entropy += tl.where(here, log - mean, 0.0)
    if SUMS:
        out = partial + program.to(tl.int64) * (2 * columns + 2)
        number = tl.arange(0, BLOCK)
        tl.store(out + number, load, number < columns)
        tl.store(out + columns + number, scores, number < columns)
        tl.store(out + 2 * columns, tl.sum(squares, 0))
        tl.store(out + 2 * columns + 1, tl.sum(entropy, 0))


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]  # Triton compiles it
    logits,
    experts,
    d_probs,
    d_scores,
    d_squares,
    d_logits,
    rows,
    columns,
    K: tl.constexpr,
    PRE: tl.constexpr,
    PROBS: tl.constexpr,
    SCORES: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    here = row < rows
    inside = here[:, None] & (column < columns)
    v = tl.load(logits + row[:, None] * columns + column, inside, 0.0).to(tl.float32)
    v = tl.where(column < columns, v, float("-inf"))
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    taken = tl.zeros((ROWS, BLOCK), tl.float32)
    if PROBS:
        for i in tl.static_range(K):
            hit = column == tl.load(experts + row * K + i, here, 0)[:, None]
            grad = tl.where(hit, tl.load(d_probs + row * K + i, here, 0.0)[:, None], grad)
            taken = tl.where(hit, 1.0, taken)
    top = tl.max(v, 1)
    exact = tl.where(column < columns, tl.exp(v - top[:, None]), 0.0)
    whole = tl.sum(exact, 1)
    p = exact / whole[:, None]
    # d loss / d probability over all experts, and where it is the weights' too.
    outer = tl.zeros((ROWS, BLOCK), tl.float32)
    if SCORES:
        outer += tl.load(d_scores + column, column < columns, 0.0)
    if PRE:
        outer += grad
    slope = -tl.sum(p * outer, 1)
    if SQUARES:
        slope += 2.0 * (top + tl.log(whole)) * tl.load(d_squares)
    out = p * (outer + slope[:, None])
    if PROBS and not PRE:  # a softmax over the chosen ones alone
        weight = exact * taken
        weight = weight / tl.sum(weight, 1)[:, None]
        out += weight * (grad - tl.sum(weight * grad, 1)[:, None])
    tl.store(d_logits + row[:, None] * columns + column, out.to(d_logits.dtype.element_ty), inside)


def _tile(experts: int) -> tuple[int, int]:
    """(tokens at a time, width)."""
    block = max(triton.next_power_of_2(experts), 2)
    return max(1, _TILE // block), block


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, topk: int, pre_softmax: bool, with_sums: bool) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        tokens, columns = logits.shape
        probs = logits.new_empty(tokens, topk, dtype=torch.float32)
        experts = logits.new_empty(tokens, topk, dtype=torch.int64)
        rows, block = _tile(columns)
        tiles = triton.cdiv(tokens, rows)
        programs = max(min(tiles, _PROGRAMS_PER_PROCESSOR * processors(logits.device)), 1)
        partial = logits.new_empty(programs if with_sums else 0, 2 * columns + 2, dtype=torch.float32)
        _forward[(programs,)](
            logits,
            probs,
            experts,
            partial,
            tokens,
            columns,
            tiles,
            K=topk,
            KS=max(triton.next_power_of_2(topk), 2),
            PRE=pre_softmax,
            SUMS=with_sums,
            ROWS=rows,
            BLOCK=block,
        )
        ctx.save_for_backward(logits, experts)
        ctx.pre_softmax = pre_softmax
        ctx.set_materialize_grads(False)
        if not with_sums:
            ctx.mark_non_differentiable(experts)
            return probs, experts
        sums = partial.sum(0)
        load, scores, squares, entropy = sums[:columns], sums[columns:-2], sums[-2], sums[-1]
        ctx.mark_non_differentiable(experts, load, entropy)
        return probs, experts, load, scores, squares, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_probs: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        _, _, d_scores, d_squares, _ = grads if len(grads) == 5 else (None,) * 5
        tokens, columns = logits.shape
        d_logits = torch.empty_like(logits)
        rows, block = _tile(columns)
        if tokens:
            _backward[(triton.cdiv(tokens, rows),)](
                logits,
                experts,
                logits if d_probs is None else d_probs.contiguous(),
                logits if d_scores is None else d_scores.contiguous(),
                logits if d_squares is None else d_squares,
                d_logits,
                tokens,
                columns,
                K=experts.shape[1],
                PRE=ctx.pre_softmax,
                PROBS=d_probs is not None,
                SCORES=d_scores is not None,
                SQUARES=d_squares is not None,
                ROWS=rows,
                BLOCK=block,
            )
        return d_logits, None, None, None


def fused_gate(logits: Tensor, topk: int, pre_softmax: bool, with_sums: bool) -> Gated:
    """`plain_gate` for float32 logits [T, E]; 16-bit ones are widened as they are read, and the results float32."""
    probs, experts, *sums = _Gate.apply(logits, topk, pre_softmax, with_sums)
    return Gated(probs, experts, Sums(*sums) if with_sums else None)
