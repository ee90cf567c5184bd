"""Cross-entropy of a linear layer: whole logits at once, and a chunked form that never holds them, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 512  # logits of one chunk in float32: 512 x 151936 x 4 bytes = 311 MB


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


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    chunk_tokens: int | None = CHUNK_TOKENS,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """The same value and gradients as `linear_cross_entropy`, holding the logits of `chunk_tokens` tokens at a time (None: of all).

    Gradients are formed in the forward pass, so the weight's gradient costs one buffer of the weight's shape in float32. With a `shard`
    the softmax runs over all ranks' rows, padding left out; hidden's gradient is then this rank's contribution only.
    """
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad: it would form gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return _Chunked.apply(hidden, weight, targets, scale, chunk_tokens or max(len(hidden), 1), shard)  # type: ignore[no-any-return]


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
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if need_weight else None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight).to(exact)
            target, mine = targets[rows, None], None
            if shard is not None:
                logits[:, shard.rows :] = float("-inf")
                target = target - shard.first
                mine = (target >= 0) & (target < shard.rows)
                target = target.masked_fill(~mine, 0)
            log_sum, own = _log_sum_and_target(logits, target, mine, shard)
            factor = scale[rows] if scale.ndim else scale
            loss += ((log_sum - own) * factor).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot. The scale goes in before the cast to 16 bits: fp16 would underflow without it.
            grad = logits.sub_(log_sum[:, None]).exp_()
            one = grad.new_full(target.shape, -1.0) if mine is None else -mine.to(exact)
            grad = grad.scatter_add_(-1, target, one).mul_(factor[:, None] if scale.ndim else factor).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
