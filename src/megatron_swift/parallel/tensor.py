"""Tensor and sequence parallelism, written out: which rows and columns a rank holds, and the collectives in a layer's seams.

A rank's layers are the plain modules, built with its share of the heads, the feed-forward size and the vocabulary; only the seams
(`enter`, `leave`, `lookup`, `loss_function`) differ. With one tensor-parallel rank nothing is installed: it is the plain model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.cross_entropy import ChunkedLoss, VocabularyShard
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder, LossFunction
from megatron_swift.models.moe import MoELayer
from megatron_swift.parallel.collectives import Copy, Gather, Reduce, Scatter
from megatron_swift.parallel.mesh import Axis
from megatron_swift.parallel.tensor_overlap import FusedProducts, overlap


def local_config(cfg: ModelConfig, tp: int) -> ModelConfig:
    """The sizes of one rank's modules. Query groups fewer than ranks are replicated; the vocabulary is padded to a multiple in memory."""
    heads = cfg.num_attention_heads // tp
    groups = max(cfg.num_query_groups // tp, 1)
    rows = -(-cfg.vocab_size // tp)
    moe = cfg.moe and dataclasses.replace(cfg.moe, shared_size=cfg.moe.shared_size // tp)
    return cfg.replace(
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=cfg.ffn_hidden_size // tp,
        vocab_size=rows,
        moe=moe,
    )


@dataclass(frozen=True)
class Span:
    """`rows` local rows from `local`, which are the global rows from `start`.

    replicas : how many consecutive tensor-parallel ranks hold these same rows.  owner : whether this rank is the first of them.
    partial  : each replica's gradient is only its own contribution: they must be summed.
    """

    local: int
    start: int
    rows: int
    replicas: int = 1
    owner: bool = True
    partial: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a rank's part of a parameter lies in the whole: row spans, and a range of columns (None: all)."""

    spans: tuple[Span, ...]
    columns: tuple[int, int] | None = None


def placement(name: str, shape: tuple[int, ...], cfg: ModelConfig, tp: Axis, *, sequence_parallel: bool) -> Placement:
    """What rank tp.rank of tp.size holds of the parameter `name` of global `shape`.

    Rows past the vocabulary (padding) are in no span: they are never read, counted or saved.
    """
    size, rank = tp.size, tp.rank
    if size == 1:
        return Placement((Span(0, 0, shape[0]),))
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return Placement(_qkv_spans(cfg, rank, size))
    if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        part, rows = shape[0] // cfg.fc1_parts, shape[0] // cfg.fc1_parts // size
        return Placement(tuple(Span(i * rows, i * part + rank * rows, rows) for i in range(cfg.fc1_parts)))
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        columns = shape[1] // size
        return Placement((Span(0, 0, shape[0]),), (rank * columns, (rank + 1) * columns))
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        rows = -(-shape[0] // size)
        start = min(rank * rows, shape[0])
        return Placement((Span(0, start, min(rows, shape[0] - start)),))
    # A norm, a bias of what is summed, positions: every rank has it. q and k norms see this rank's heads only, the others this rank's
    # tokens under sequence parallelism.
    partial = sequence_parallel or ".q_layernorm." in name or ".k_layernorm." in name
    return Placement((Span(0, 0, shape[0], replicas=size, owner=rank == 0, partial=partial),))


def _qkv_spans(cfg: ModelConfig, rank: int, size: int) -> tuple[Span, ...]:
    """Whole query groups; or, with fewer groups than ranks, this rank's query heads and a replica of its group's key and value."""
    d, groups, per_group = cfg.kv_channels, cfg.num_query_groups, cfg.heads_per_group
    group_rows = (per_group + 2) * d
    if groups % size == 0:
        rows = groups // size * group_rows
        return (Span(0, rank * rows, rows),)
    replicas = size // groups
    base, part, rows = rank // replicas * group_rows, rank % replicas, per_group // replicas * d
    key_value = Span(rows, base + per_group * d, 2 * d, replicas=replicas, owner=part == 0, partial=True)
    return (Span(0, base + part * rows, rows), key_value)


def install(
    model: Decoder,
    cfg: ModelConfig,
    tp: Axis,
    *,
    sequence_parallel: bool,
    loss: ChunkedLoss,
    products: FusedProducts | None = None,
) -> None:
    """Put this axis' collectives into the seams of a model built with `local_config`.

    cfg is the whole model's. loss: how the vocabulary's softmax is computed.
    products: joins the collectives of the layers (not of embedding and output) with their matrix products; sequence parallelism only.
    """
    group = tp.group
    assert group is not None and (sequence_parallel or products is None)

    def enter(x: Tensor) -> Tensor:
        return Gather.apply(x, group) if sequence_parallel else Copy.apply(x, group)  # type: ignore[no-any-return]

    def leave(x: Tensor) -> Tensor:
        return Scatter.apply(x, group) if sequence_parallel else Reduce.apply(x, group)  # type: ignore[no-any-return]

    for layer in model.layers:
        layer.self_attention.linear_qkv.enter = enter
        layer.self_attention.linear_proj.leave = leave
        dense = layer.mlp.shared_experts if isinstance(layer.mlp, MoELayer) else layer.mlp
        if dense is not None:
            dense.linear_fc1.enter = enter
            dense.linear_fc2.leave = leave
        if products is not None:
            overlap(layer, products)
    rows = -(-cfg.vocab_size // tp.size)
    first = tp.rank * rows
    if model.first:
        assert model.embedding is not None

        def lookup(tokens: Tensor, weight: Tensor) -> Tensor:
            local = tokens - first
            elsewhere = (local < 0) | (local >= rows)
            vectors = F.embedding(local.masked_fill(elsewhere, 0), weight)
            return leave(vectors.masked_fill(elsewhere[:, None], 0.0))

        model.embedding.word_embeddings.lookup = lookup
        if sequence_parallel:
            model.embedding.own = lambda x: x.chunk(tp.size)[tp.rank]
    if model.last:
        model.enter = enter
        model.loss_function = _vocabulary_parallel_loss(group, first, max(min(rows, cfg.vocab_size - first), 0), loss)


def _vocabulary_parallel_loss(group: dist.ProcessGroup, first: int, rows: int, form: ChunkedLoss) -> LossFunction:
    def largest(x: Tensor) -> Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
        return x

    def total(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    return form.loss(VocabularyShard(first, rows, largest, total))
