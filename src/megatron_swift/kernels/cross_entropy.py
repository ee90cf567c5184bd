"""Cross-entropy of a linear layer: whole logits at once, and a chunked form that never holds them, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.triton_runs import why_no_triton

CHUNK_TOKENS = 512  # logits of one chunk in float32: 512 x 151936 x 4 bytes = 311 MB
# In 16 bits and in place: 4096 x 151936 x 2 bytes = 1.2 GB. Fewer tokens would read and write the weight's gradient more often.
FUSED_CHUNK_TOKENS = 4096


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """The sum over tokens of scale * -log softmax(hidden weight^T)[target], from whole logits; the plain twin.

    hidden [N, H], weight [V, H], targets int64 [N]; scale one number, or one per token [N], in the precision of the softmax (float32;
    float64 for float64).
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale.ndim:
        return (F.cross_entropy(logits, targets, reduction="none") * scale).sum()
    return F.cross_entropy(logits, targets, reduction="sum") * scale


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the vocabulary the weight holds, where ranks share it: rows [first, first + rows); rows past that are padding.

    max_ and sum_ combine a tensor with those of the other ranks, in place.
    """

    first: int
    rows: int
    max_: Callable[[Tensor], Tensor]
    sum_: Callable[[Tensor], Tensor]


# softmax(logits [n, V], targets int64 [n], factor, shard=, want_grad=) -> (sum of factor * loss, its gradient for the logits in their dtype).
# It may overwrite the logits. targets count over the whole vocabulary; factor: one number, or one per token.
ChunkSoftmax = Callable[..., tuple[Tensor, Tensor | None]]


def plain_softmax(
    logits: Tensor, targets: Tensor, factor: Tensor, *, shard: VocabularyShard | None, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Any device and dtype."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    target, mine = targets[:, None], None
    if shard is not None:
        logits[:, shard.rows :] = float("-inf")
        target = target - shard.first
        mine = (target >= 0) & (target < shard.rows)
        target = target.masked_fill(~mine, 0)
    log_sum, own = _log_sum_and_target(logits, target, mine, shard)
    loss = ((log_sum - own) * factor).sum()
    if not want_grad:
        return loss, None
    # d loss / d logits = softmax - one_hot. The factor goes in before the cast to 16 bits: fp16 would underflow without it.
    grad = logits.sub_(log_sum[:, None]).exp_()
    one = grad.new_full(target.shape, -1.0) if mine is None else -mine.to(grad.dtype)
    return loss, grad.scatter_add_(-1, target, one).mul_(factor[:, None] if factor.ndim else factor).to(dtype)


@dataclass(frozen=True)
class ChunkedLoss:
    """How the chunked form computes: logits of so many tokens at a time (None: of all), and the softmax over them."""

    chunk_tokens: int | None = CHUNK_TOKENS
    softmax: ChunkSoftmax = plain_softmax

    def loss(self, shard: VocabularyShard | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """`chunked_linear_cross_entropy` of this form: (hidden, weight, targets, scale) -> loss."""
        return functools.partial(
            chunked_linear_cross_entropy, chunk_tokens=self.chunk_tokens, shard=shard, softmax=self.softmax
        )


def choose_chunked(device: torch.device, dtype: torch.dtype) -> tuple[ChunkedLoss, str]:
    """(the chunked form that fits, the sentence about it for the banner)."""
    if why_no_triton(device) or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return ChunkedLoss(), "chunked, logits never whole"
    from megatron_swift.kernels.fused.cross_entropy import fused_softmax

    return (
        ChunkedLoss(FUSED_CHUNK_TOKENS, fused_softmax),
        f"Triton, the gradient written over the logits of {FUSED_CHUNK_TOKENS} tokens at a time",
    )


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    chunk_tokens: int | None = CHUNK_TOKENS,
    shard: VocabularyShard | None = None,
    softmax: ChunkSoftmax = plain_softmax,
) -> Tensor:
    """The same value and gradients as `linear_cross_entropy`, holding the logits of `chunk_tokens` tokens at a time (None: of all).

    Gradients are formed in the forward pass: the weight's costs one buffer of its shape, in float32 where there are several chunks. With a
    `shard` the softmax runs over all ranks' rows, padding left out; hidden's gradient is then this rank's contribution only.
    """
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad: it would form gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return _Chunked.apply(hidden, weight, targets, scale, chunk_tokens or max(len(hidden), 1), shard, softmax)  # type: ignore[no-any-return]


def _log_sum_and_target(
    logits: Tensor, target: Tensor, mine: Tensor | None, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Logsumexp over the whole vocabulary and the target's logit, both [n]. target [n, 1] is local; mine says where it is this rank's."""
    own = logits.gather(-1, target)[:, 0]
    if shard is None or mine is None:
        return logits.logsumexp(-1), own
    own = own.masked_fill(~mine[:, 0], 0.0)
    largest = shard.max_(logits.amax(-1))
    sums = (logits - largest[:, None]).exp().sum(-1)
    sums, own = shard.sum_(torch.stack((sums, own)))
    return largest + sums.log(), own


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; 16-bit matrices on a GPU are added in the matrix product itself, in float32."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        chunk: int,
        shard: VocabularyShard | None,
        softmax: ChunkSoftmax,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        if need_weight and not 0 < len(hidden) <= chunk:
            grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            factor = scale[rows] if scale.ndim else scale
            logits = F.linear(hidden[rows], weight)
            part, grad = softmax(logits, targets[rows], factor, shard=shard, want_grad=need_hidden or need_weight)
            loss += part
            if grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[rows])
            elif need_weight:
                grad_weight = torch.mm(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:  # one pass: multiplied in the wider type, written in the weight's
            narrow = torch.empty(grad_weight.shape, dtype=ctx.weight_dtype, device=grad_weight.device)
            grad_weight = torch.mul(grad_weight, grad_output, out=narrow)
        return grad_hidden, grad_weight, None, None, None, None, None
