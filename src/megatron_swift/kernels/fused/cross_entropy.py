"""The softmax over a chunk of logits and its gradient, in their own memory: two reads and a write of each 16-bit logit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.cross_entropy import VocabularyShard

_BLOCK = 8192


@triton.jit
def _statistics(logits, targets, largest, sums, own, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    block = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + block
        z = tl.load(at + column, column < columns, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    target = tl.load(targets + row)
    mine = (target >= 0) & (target < columns)
    tl.store(own + row, tl.load(at + tl.where(mine, target, 0), mine, 0.0).to(tl.float32))
    tl.store(largest + row, top)
    tl.store(sums + row, total)


@triton.jit
def _gradient(logits, targets, log_sums, factors, columns, stride, padded, factor_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log_sum, factor = tl.load(log_sums + row), tl.load(factors + row * factor_stride)
    target = tl.load(targets + row)
    z = tl.load(at + column, column < columns, float("-inf")).to(tl.float32)
    grad = (tl.exp(z - log_sum) - tl.where(column == target, 1.0, 0.0)) * factor
    tl.store(at + column, tl.where(column < columns, grad, 0.0).to(logits.dtype.element_ty), column < padded)


def fused_softmax(
    logits: Tensor, targets: Tensor, factor: Tensor, *, shard: VocabularyShard | None, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`kernels.cross_entropy.plain_softmax`, the gradient written over the logits."""
    number, padded = logits.shape
    columns = padded if shard is None else shard.rows
    if shard is not None:
        targets = targets - shard.first
    largest, sums, own = torch.empty(3, number, dtype=torch.float32, device=logits.device)
    _statistics[(number,)](logits, targets, largest, sums, own, columns, logits.stride(0), BLOCK=_BLOCK, num_warps=16)
    if shard is not None:
        over_all = shard.max_(largest.clone())
        sums, own = shard.sum_(torch.stack((sums * (largest - over_all).exp(), own)))
        largest = over_all
    log_sum = largest + sums.log()
    loss = ((log_sum - own) * factor).sum()
    if not want_grad:
        return loss, None
    _gradient[(number, triton.cdiv(padded, _BLOCK))](
        logits,
        targets,
        log_sum,
        factor,
        columns,
        logits.stride(0),
        padded,
        1 if factor.ndim else 0,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return loss, logits
