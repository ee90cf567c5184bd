"""Attention between blocks of queries and keys, with its log-sum-exp, so that results over parts of the keys can be merged.

Used by context parallelism. CPU: torch's flash kernel for it; CUDA in 16 bits: torch's FlashAttention; otherwise written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_swift.kernels.dense_attention import flash_takes
from megatron_swift.kernels.varlen_flash import Runs, flash_backward, flash_forward

_aten = torch.ops.aten


@dataclass(frozen=True)
class Blocks:
    """Pairs of a query run and a key run, one after the other: lengths per pair."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int]) -> Blocks:
        """Blocks of these lengths."""
        return Blocks(tuple(queries), tuple(keys))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the query rows and the key rows of each pair."""
        q = k = 0
        for num_q, num_k in zip(self.queries, self.keys, strict=True):
            yield slice(q, q + num_q), slice(k, k + num_k)
            q, k = q + num_q, k + num_k


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [Tq, heads, d], log-sum-exp [heads, Tq] in at least float32) of each query block over its key block.

    causal needs square blocks: kernels differ in where they align the mask of others. Fewer key heads are shared by groups of queries.
    """
    assert not causal or blocks.queries == blocks.keys
    if _flash_fits(q):
        return flash_forward(q, k, v, *_runs(blocks, q.device), causal=causal)
    out = torch.empty_like(q)
    log_sum = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows, keys in blocks:
        if q.device.type == "cpu":
            part, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(q[rows]), _heads(k[keys]), _heads(v[keys]), 0.0, causal, scale=_scale(q)
            )
            out[rows], log_sum[:, rows] = part[0].transpose(0, 1), sums[0]
        else:
            scores = _scores(q[rows], k[keys], causal)
            log_sum[:, rows] = scores.logsumexp(-1)
            weights = (scores - log_sum[:, rows, None]).exp()
            out[rows] = torch.einsum("hqk,khd->qhd", weights, _repeated(v[keys], q).to(weights.dtype)).to(q.dtype)
    return out, log_sum


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, blocks: Blocks, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend`. out and log_sum may be those of a softmax over more keys than these: that is how a ring uses it."""
    grad = grad.contiguous()
    if _flash_fits(q):
        runs = _runs(blocks, q.device)
        return flash_backward(grad, q, k, v, out, log_sum.contiguous(), *runs, causal=causal)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, keys in blocks:
        if q.device.type == "cpu":
            parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads(x[rows]) for x in (grad, q)), *(_heads(x[keys]) for x in (k, v)), _heads(out[rows]), log_sum[None, :, rows],
                0.0, causal, scale=_scale(q),
            )  # fmt: skip
            parts = tuple(part[0].transpose(0, 1) for part in parts)
        else:
            parts = _written_out_backward(grad[rows], q[rows], k[keys], v[keys], out[rows], log_sum[:, rows], causal)
        for whole, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            whole[where] = part
    return grads


def merge(out: Tensor, log_sum: Tensor, more: Tensor, more_sum: Tensor) -> tuple[Tensor, Tensor]:
    """The result over both sets of keys, in the precision of the log-sum-exp [heads, T]."""
    share = torch.sigmoid(more_sum - log_sum).t()[..., None]
    out = out.to(log_sum.dtype)
    return out - share * (out - more.to(log_sum.dtype)), torch.logaddexp(log_sum, more_sum)


def _flash_fits(q: Tensor) -> bool:
    return flash_takes(q.device, q.dtype, q.shape[-1])


def _scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def _runs(blocks: Blocks, device: torch.device) -> tuple[Runs, Runs]:
    """Of the queries and of the keys."""
    return Runs.of(blocks.queries, device), Runs.of(blocks.keys, device)


def _heads(x: Tensor) -> Tensor:
    """[T, heads, d] -> [1, heads, T, d]."""
    return x.transpose(0, 1)[None]


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(exact), _repeated(k, q).to(exact)) * _scale(q)
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
    return scores


def _written_out_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of softmax attention from its log-sum-exp (Dao et al. 2022, arXiv 2205.14135, appendix B)."""
    exact = log_sum.dtype
    weights = (_scores(q, k, causal) - log_sum[..., None]).exp()
    grad, keys, values = grad.to(exact), _repeated(k, q).to(exact), _repeated(v, q).to(exact)
    inner = torch.einsum("qhd,khd->hqk", grad, values) - (grad * out.to(exact)).sum(-1).t()[..., None]
    d_scores = weights * inner * _scale(q)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    dk = torch.einsum("hqk,qhd->khd", d_scores, q.to(exact)).unflatten(1, groups).sum(2)
    dv = torch.einsum("hqk,qhd->khd", weights, grad).unflatten(1, groups).sum(2)
    return torch.einsum("hqk,khd->qhd", d_scores, keys).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
