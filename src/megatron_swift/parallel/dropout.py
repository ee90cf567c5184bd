"""Dropout under every layout: which tokens and heads a rank holds, by numbers that belong to the whole model and its whole row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_swift.data.types import Batch
from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.kernels.dropout import Noise, mix
from megatron_swift.kernels.dropout_attention import AttentionDropout, attend, with_dropout
from megatron_swift.models.decoder import Decoder
from megatron_swift.parallel.collectives import Gather
from megatron_swift.parallel.context import ContextSegments, zigzag
from megatron_swift.parallel.mesh import Axis, Mesh
from megatron_swift.parallel.recompute import recomputed_core


@dataclass(frozen=True)
class Dropout:
    """attention: the share of attention weights that is dropped; hidden: of embeddings and of what attention and MLP add."""

    attention: float = 0.0
    hidden: float = 0.0
    seed: int = 0

    @property
    def any(self) -> bool:
        """Whether anything is dropped."""
        return bool(self.attention or self.hidden)


def noise_of(batch: Batch, *, cp: Axis, own: Axis, seeds: tuple[int, ...]) -> Noise:
    """The noise of a micro-batch on this rank, on the CPU. own: the ranks that share hidden states by sequence parallelism, or one."""
    segment = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    tokens = torch.from_numpy((segment << 32) + batch.positions)
    if cp.size > 1:
        tokens = tokens[zigzag(batch.lengths, cp=cp.size, rank=cp.rank)]
    return Noise(mix(*seeds), tokens, tokens.chunk(own.size)[own.rank])


def drop_attention(
    model: Decoder, mesh: Mesh, dropout: Dropout, core: AttentionCore, *, softmax_in_fp32: bool, again: bool
) -> str:
    """Give each layer an attention core that drops weights in training and is `core` otherwise; the sentence for the banner.

    again : compute it again in the backward pass instead of keeping the weights.
    """
    heads = model.cfg.num_attention_heads  # of this rank
    for layer in model.layers:
        options = AttentionDropout(dropout.attention, layer.streams[0], mesh.tp.rank * heads, softmax_in_fp32)
        dropping = with_dropout(core, options) if mesh.cp.size == 1 else _over_contexts(core, options, mesh.cp)
        layer.self_attention.core = recomputed_core(dropping) if again else dropping
    return f"written out, a share of {dropout.attention:g} of the weights dropped" + (
        ", computed again in the backward pass" if again else ""
    )


def _over_contexts(core: AttentionCore, options: AttentionDropout, cp: Axis) -> AttentionCore:
    """Every rank attends with its queries to the gathered keys of all; gradients of keys are summed and scattered."""
    group = cp.group

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if segments.noise is None:
            return core(q, k, v, segments)
        assert isinstance(segments, ContextSegments)
        keys, values = Gather.apply(torch.stack((k, v), 1), group)[segments.order].unbind(1)
        lengths = [(n // cp.size, n) for n in segments.lengths]
        return attend(q, keys, values, options, segments.noise, lengths)

    return run
