"""Megatron's `ckpt_format torch`: a file of each model-parallel rank, with the tensors of its own part of the model, put together.

iter_0000001/mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt, where XX is the tensor-parallel rank, YYY the stage of a pipeline and ZZZ the rank
among those that share the experts; the last two are there only where there are several.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_swift.checkpoint.archive import read_archive
from megatron_swift.checkpoint.dcp import optimizer_tensors
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.checkpoint.stored import Chunk, Stored, StoredTensors, long_axis
from megatron_swift.utils.errors import CheckpointError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(
    r"^(.*\.mlp\.experts\.)(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))$"
)
_GROUPED = re.compile(r"^(.*\.mlp\.experts\.)weight([12])$")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def rank_files(folder: Path) -> list[Path]:
    """The files of a checkpoint of this format, by rank; none where it is of another."""
    found = [path / FILE for path in folder.glob("mp_rank_*") if _RANK.match(path.name)]
    return sorted(path for path in found if path.is_file())


class TorchFolder(StoredTensors):
    """The parameters under the keys and in the shapes of a torch_dist checkpoint, as views of the mapped files.

    Local layers and Transformer Engine's, sequential and grouped experts, pipelines with and without interleaving are put together.
    Raises CheckpointError where a file is missing or damaged. What the model has not is kept under its own name.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], *, num_layers: int):
        parts = _parts(rank_files(folder), folder)
        pieces: dict[str, list[_Piece]] = defaultdict(list)
        for part in parts:
            for key, tensor in part.tensors.items():
                for name, piece in _pieces(key, tensor, part):
                    pieces[_our_name(name, specs)].append(piece)
        if _OUTPUT in pieces and _OUTPUT not in specs and _copies(pieces[_OUTPUT], pieces[_EMBEDDING]):
            del pieces[_OUTPUT]  # the last stage's copy of tied embeddings
        tensors: dict[str, list[Stored]] = defaultdict(list)
        for name, found in pieces.items():
            spec = specs.get(name)
            tensors[spec.megatron_key if spec else name].append(_stored(spec, found, num_layers))
        super().__init__(folder, {key: _together(stored) for key, stored in tensors.items()})
        self.tensors |= optimizer_tensors(folder)


@dataclass(frozen=True)
class _Part:
    """A stage's layers as one rank holds them. first_layer: of the whole model."""

    tp: int
    tp_size: int
    ep: int
    ep_size: int
    first_layer: int
    tensors: dict[str, Tensor]

    @cached_property
    def num_experts(self) -> int:
        """How many experts this rank holds of each layer."""
        numbers = [int(m[2] or m[5] or 0) for key in self.tensors if (m := _EXPERT.match(key))]
        routed = [len(tensor) for key, tensor in self.tensors.items() if key.endswith(".mlp.router.weight")]
        return max(numbers) + 1 if numbers else max(routed, default=1) // self.ep_size


@dataclass(frozen=True)
class _Piece:
    """A rank's part of a parameter; of experts, those from `expert` on. values: [rows, columns] or [rows]."""

    tp: int
    tp_size: int
    values: Tensor
    expert: int | None = None


def _parts(files: list[Path], folder: Path) -> list[_Part]:
    """Every rank's stages, numbered."""
    ranks: dict[tuple[int, int, int], list[dict[str, Tensor]]] = {}
    numbers = {path: _numbers(path.parent.name) for path in files}
    read = {path: _models(path) for path in files}
    # The second number of two is a stage's, unless every file begins with the embedding.
    staged = any(len(n) == 3 for n in numbers.values()) or any(_EMBEDDING not in models[0] for models in read.values())
    for path, found in numbers.items():
        tp, second, third = (*found, 0, 0)[:3]
        ranks[(tp, second, third) if staged else (tp, 0, second)] = read[path]
    tps, pps, eps = ({key[axis] for key in ranks} for axis in range(3))
    for axis, seen in (("tensor", tps), ("pipeline", pps), ("expert", eps)):
        if seen != set(range(len(seen))):
            raise CheckpointError(
                f"{folder}: files of {axis}-parallel ranks are missing",
                why=f"there are {sorted(seen)}",
                do="copy the files of all ranks into it",
            )
    parts, first = [], 0
    for chunk in range(max(map(len, ranks.values()))):
        for pp in sorted(pps):
            stage = {key: models[chunk] for key, models in ranks.items() if key[1] == pp and chunk < len(models)}
            parts += [_Part(tp, len(tps), ep, len(eps), first, model) for (tp, _, ep), model in stage.items()]
            layers = [int(m[1]) for model in stage.values() for key in model if (m := _LAYER.match(key))]
            first += max(layers, default=-1) + 1
    return parts


def _numbers(name: str) -> tuple[int, ...]:
    match = _RANK.match(name)
    assert match is not None
    return tuple(int(number) for number in match.groups() if number is not None)


def _models(path: Path) -> list[dict[str, Tensor]]:
    """The tensors of a file: of its only model, or of several where a pipeline is interleaved."""
    value = read_archive(path)
    names = ["model"] if isinstance(value, dict) and "model" in value else []
    while isinstance(value, dict) and f"model{len(names)}" in value:
        names.append(f"model{len(names)}")
    models: list[dict[str, Tensor]] = []
    for name in names:
        tensors = value[name]
        if isinstance(tensors, dict):
            models.append({str(k): v for k, v in tensors.items() if isinstance(v, Tensor) and "_extra_state" not in k})
    if not models or not any(models):
        raise CheckpointError(f"{path} holds no model of Megatron-Core's", do="use another checkpoint")
    return models


def _pieces(key: str, tensor: Tensor, part: _Part) -> Iterator[tuple[str, _Piece]]:
    """A rank's tensor under the name of the parameter that it is a part of."""
    match = _LAYER.match(key)
    if match:
        key = f"decoder.layers.{part.first_layer + int(match[1])}.{key[match.end() :]}"
    one, grouped = _EXPERT.match(key), _GROUPED.match(key)
    if one:
        local, matrix = int(one[2] or one[5] or 0), one[3] or one[4]
        number = part.ep * part.num_experts + local
        yield f"{one[1]}{matrix}.weight", _Piece(part.tp, part.tp_size, tensor, number)
    elif grouped:
        # [hidden, experts x rows] and [experts x columns, hidden], used as batches of transposed matrices.
        count = part.num_experts
        hidden = tensor.shape[0] if grouped[2] == "1" else tensor.shape[1]
        batch = tensor.view(count, hidden, -1) if grouped[2] == "1" else tensor.view(count, -1, hidden)
        for local in range(count):
            piece = _Piece(part.tp, part.tp_size, batch[local].t(), part.ep * count + local)
            yield f"{grouped[1]}linear_fc{grouped[2]}.weight", piece
    else:
        yield key, _Piece(part.tp, part.tp_size, tensor)


def _our_name(name: str, specs: Mapping[str, TensorSpec]) -> str:
    """Local layers keep their norms apart; Transformer Engine has them in the matrix behind them."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name if name in specs else name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def _copies(some: list[_Piece], others: list[_Piece]) -> bool:
    """Whether the parts of one parameter are those of the other."""
    by_rank = {piece.tp: piece.values for piece in others}
    return all(piece.tp in by_rank and torch.equal(piece.values, by_rank[piece.tp]) for piece in some)


def _stored(spec: TensorSpec | None, pieces: list[_Piece], num_layers: int) -> Stored:
    """All ranks' parts of one parameter as boxes of the tensor that holds it in a torch_dist checkpoint."""
    first = pieces[0].values
    if spec is None:
        return Stored(tuple(first.shape), first.dtype, ())
    rows = spec.shape[0] // max(spec.experts, 1)
    block = (rows, *spec.shape[1:])  # of the parameter, or of one expert's
    axis = next((i for i, (a, b) in enumerate(zip(first.shape, block, strict=False)) if a != b), None)
    if len(first.shape) != len(block):
        return Stored(tuple(first.shape), first.dtype, ())
    parts = spec.parts if axis == 0 else 1
    whole, chunks, seen = list(block), [], set()
    for piece in pieces:
        tp = piece.tp if axis is not None else 0
        if (piece.expert, tp) in seen:
            continue  # a replica
        seen.add((piece.expert, tp))
        if axis is not None:
            whole[axis] = piece.values.shape[axis] * piece.tp_size
        base = (piece.expert or 0) * rows
        for number, values in enumerate(piece.values.chunk(parts)):
            low = number * whole[0] // parts + tp * len(values) if axis == 0 else 0
            columns = (tp * values.shape[1], (tp + 1) * values.shape[1]) if axis == 1 else None
            ((_, offset, size),) = spec.megatron_boxes(base + low, base + low + len(values), columns)
            chunks.append(Chunk(offset, size, partial(_rows, values, size)))
    shape = spec.megatron_shape(num_layers)
    found = (*shape[: len(shape) - len(block)], *whole)
    return Stored(found, first.dtype, tuple(chunks))


def _rows(values: Tensor, size: tuple[int, ...], rows: tuple[int, int], out: Tensor | None) -> Tensor:
    """Chunk.read of a view."""
    part = values.reshape(size).narrow(long_axis(size), rows[0], rows[1] - rows[0])
    return part if out is None else out.copy_(part)


def _together(layers: list[Stored]) -> Stored:
    """The layers of one kind, which lie stacked; of another shape than the first one's, the one that differs."""
    odd = [layer for layer in layers if layer.shape != layers[0].shape]
    if odd:
        return odd[0]
    return Stored(layers[0].shape, layers[0].dtype, tuple(chunk for layer in layers for chunk in layer.chunks))
