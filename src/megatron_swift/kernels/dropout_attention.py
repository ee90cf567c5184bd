"""Attention whose weights are dropped at random, written out: fused kernels would draw by a generator of their own, and per rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.kernels.dropout import Noise, column_bits, kept, row_bits


@dataclass(frozen=True)
class AttentionDropout:
    """p: the share of weights that is dropped.  stream: this layer's.  first_head, heads: this rank's first query head, and how many all have."""

    p: float
    stream: int
    first_head: int = 0
    softmax_in_fp32: bool = True


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionDropout, noise: Noise, lengths: Sequence[tuple[int, int]]
) -> Tensor:
    """Causal attention, segment by segment, with dropped weights. noise.positions says which keys a query sees.

    q [Tq, heads, d], k and v [Tk, groups, d]; lengths: of queries and keys of each segment. The keys of a segment are all of it, in order.
    """
    repeat = q.shape[1] // k.shape[1]
    rows, positions = row_bits(noise.tokens, noise.seed, options.stream), noise.positions
    queries, keys = [a for a, _ in lengths], [b for _, b in lengths]
    parts = zip(*(x.split(queries) for x in (q, rows, positions)), *(x.split(keys) for x in (k, v)), strict=True)
    exact = torch.promote_types(q.dtype, torch.float32) if options.softmax_in_fp32 else q.dtype
    outputs = []
    for q_part, row, position, k_part, v_part in parts:
        k_part, v_part = k_part.repeat_interleave(repeat, 1), v_part.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q_part, k_part) / math.sqrt(q.shape[-1])
        seen = torch.arange(len(k_part), device=q.device) <= position[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=exact).to(q.dtype)
        keep = kept(row[:, None], _columns(options, q.shape[1], len(k_part), q.device)[:, None], options.p)
        weights = torch.where(keep, weights / (1 - options.p), weights.new_zeros(()))
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v_part))
    return torch.cat(outputs)


def _columns(options: AttentionDropout, heads: int, keys: int, device: torch.device) -> Tensor:
    """int32 [heads, keys]: a number for each pair of a head of the whole model and a position."""
    head = column_bits(options.first_head + heads, device)[options.first_head :]
    return row_bits(column_bits(keys, device).long() ^ (head.long()[:, None] << 32), 0, -3)


def with_dropout(core: AttentionCore, options: AttentionDropout) -> AttentionCore:
    """`core` where nothing is dropped, as in evaluation, and `attend` in training."""

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if segments.noise is None:
            return core(q, k, v, segments)
        return attend(q, k, v, options, segments.noise, [(n, n) for n in segments.lengths])

    return run
