"""Checkpoints as Megatron-Core's writers leave them, made without it: the same keys, boxes and files."""

from __future__ import annotations

import argparse
import enum
import itertools
import json
import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_weights import config
from torch import Tensor

from megatron_swift.checkpoint.dcp import Piece, save_pieces
from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.models.config import ModelConfig, MoEConfig

LAYERS = 4
_MOE = MoEConfig(
    num_experts=4, topk=2, ffn_hidden_size=6, shared_size=4, pre_softmax=False, sparse_layers=(True,) * LAYERS
)
_DENSE = config(num_layers=LAYERS, vocab_size=12)
MODELS: dict[str, ModelConfig] = {
    "tied": _DENSE.replace(tied_embeddings=True, qk_layernorm=True, qkv_bias=False),
    "untied": _DENSE,
    "moe": _DENSE.replace(moe=_MOE),
    "mixed": _DENSE.replace(
        moe=MoEConfig(**{**_MOE.__dict__, "shared_size": 0, "sparse_layers": (True, False, True, False)})
    ),
}
_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class Color(enum.Enum):
    """Megatron pickles enumerations along with its arguments."""

    RED = 1


@dataclass
class Foreign:
    """A model and how many ranks wrote it. padded: rows of the vocabulary in the checkpoint, 0: as many as there are tokens."""

    cfg: ModelConfig
    weights: dict[str, Tensor]
    tp: int = 1
    pp: int = 1
    ep: int = 1
    local: bool = False
    padded: int = 0
    specs: dict[str, TensorSpec] = field(init=False)

    def __post_init__(self):
        self.specs = tensor_specs(self.cfg)

    def differences(self, folder: Path, prefix: str = "", values: dict[str, Tensor] | None = None) -> list[str]:
        """The parameters that are not read from the folder to the last bit, whole, by rows and by columns."""
        source, found = MegatronWeights(folder, self.specs, num_layers=LAYERS), []
        for name, spec in self.specs.items():
            wanted, third = (values or self.weights)[name], spec.shape[0] // 3
            same = torch.equal(source.read(spec, prefix=prefix), wanted)
            same &= torch.equal(source.read(spec, third, spec.shape[0], prefix=prefix), wanted[third:])
            if wanted.dim() == 2:
                part = source.read(spec, 0, third, columns=(1, 3), prefix=prefix)
                same &= torch.equal(part, wanted[:third, 1:3])
            found += [] if same else [name]
        return found

    def _padded(self, name: str, weight: Tensor) -> Tensor:
        if self.padded and name.endswith(_ROWS[:2]):
            return torch.cat([weight, torch.full((self.padded - len(weight), *weight.shape[1:]), 7.0)])
        return weight


def experts_of(spec: TensorSpec, weight: Tensor) -> list[Tensor]:
    """The parameter's matrices: one of each expert, or one."""
    return list(weight.chunk(spec.experts)) if spec.experts else [weight]


def axis_of(name: str) -> int | None:
    """Along which it is cut for tensor parallelism."""
    if name.endswith(_COLUMNS):
        return 1
    return 0 if name.endswith(_ROWS) else None


def shard(name: str, matrix: Tensor, rank: int, ranks: int) -> Tensor:
    """A tensor-parallel rank's part, as it lies in memory."""
    axis = axis_of(name)
    if axis is None:
        return matrix
    halves = matrix.chunk(2) if name.endswith("linear_fc1.weight") else [matrix]
    return torch.cat([half.chunk(ranks, axis)[rank] for half in halves], axis)


# torch_dist


def write_torch_dist(folder: Path, foreign: Foreign, *, more: list[Piece] | None = None) -> Path:
    """A box for each layer, expert and tensor-parallel rank, two of them for gate and up; `more` besides."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [p for name in foreign.specs for p in _boxes(foreign, name)]
    save_pieces(folder, [*pieces, *(more or [])], distributed=False, threads=2)
    return folder


def _boxes(foreign: Foreign, name: str) -> list[Piece]:
    spec, weight = foreign.specs[name], foreign._padded(name, foreign.weights[name])
    key = spec.megatron_key
    key = key.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight") if foreign.local else key
    inner = (spec.experts, len(weight) // spec.experts, *weight.shape[1:]) if spec.experts else tuple(weight.shape)
    shape = (LAYERS, *inner) if spec.layer is not None else inner
    found = []
    for number, matrix in enumerate(experts_of(spec, weight)):
        lead = ([spec.layer] if spec.layer is not None else []) + ([number] if spec.experts else [])
        for offset, part in _parts(name, matrix, foreign.tp):
            size = (*(1 for _ in lead), *part.shape)
            found.append(Piece(key, lambda p=part, s=size: p.reshape(s), part.dtype, size, (*lead, *offset), shape))
    return found


def _parts(name: str, matrix: Tensor, ranks: int) -> list[tuple[tuple[int, ...], Tensor]]:
    axis = axis_of(name)
    count = 1 if axis is None else ranks * (2 if name.endswith("linear_fc1.weight") else 1)
    step = matrix.shape[axis or 0] // count
    return [
        (tuple(number * step if i == (axis or 0) else 0 for i in range(matrix.dim())), part)
        for number, part in enumerate(matrix.split(step, axis or 0))
    ]


def note_cut(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """What Megatron-Core 0.11 leaves in `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.mcore_data = {key: {"nd_reformulated_orig_global_shape": shape} for key, shape in shapes.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def cut(foreign: Foreign, name: str, key: str, value: Tensor) -> tuple[list[Piece], tuple[int, ...]]:
    """A parameter's state as 0.11's fully_sharded_model_space: a grid of flattened boxes, the last axis cut by two data-parallel ranks.

    And the shape of what is cut.
    """
    spec = foreign.specs[name]
    inner = (spec.experts, len(value) // spec.experts, *value.shape[1:]) if spec.experts else tuple(value.shape)
    stacked = spec.layer is not None
    shape = (LAYERS, *inner) if stacked else inner
    axis, lead = axis_of(name), [*([LAYERS] if stacked else []), *([spec.experts] if spec.experts else [])]
    halves = 2 if name.endswith("linear_fc1.weight") else 1
    grid = [*lead, *(foreign.tp * halves if i == axis else 1 for i in range(value.dim()))]
    box = [n // g for n, g in zip(shape, grid, strict=True)]
    first = (spec.layer,) if stacked else ()
    whole, numel = value.reshape((1, *inner) if stacked else inner), math.prod(box)
    pieces = []
    for cell in itertools.product(*(range(g) for g in (grid[1:] if stacked else grid))):
        place = (0, *cell) if stacked else cell
        flat = whole[tuple(slice(c * b, (c + 1) * b) for c, b in zip(place, box, strict=True))].reshape(-1)
        for start, part in zip((0, numel // 2), (flat[: numel // 2], flat[numel // 2 :]), strict=True):
            size = (*(1 for _ in grid), len(part))
            offset = (*first, *cell, start)
            pieces.append(Piece(key, lambda p=part, s=size: p.reshape(s), part.dtype, size, offset, (*grid, numel)))
    return pieces, shape


def write_common(folder: Path, *, optimizer: object = None, **values: object) -> None:
    """common.pt, with objects of classes that a reader may not have."""
    args = argparse.Namespace(consumed_train_samples=24, params_dtype=torch.bfloat16, color=Color.RED)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 3, **values}
    torch.save(state | ({"optimizer": optimizer} if optimizer is not None else {}), folder / "common.pt")


# torch


def write_torch_files(folder: Path, foreign: Foreign, *, experts: str = "sequential", chunks: int = 1) -> Path:
    """mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt. experts: sequential, te (grouped), or legacy. chunks: of an interleaved pipeline."""
    for tp, pp, ep in itertools.product(range(foreign.tp), range(foreign.pp), range(foreign.ep)):
        name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if foreign.pp > 1 else "") + (f"_{ep:03d}" if foreign.ep > 1 else "")
        value = {"args": argparse.Namespace(color=Color.RED), "checkpoint_version": 3.0, "iteration": 1}
        for chunk in range(chunks):
            stage = chunk * foreign.pp + pp
            state = stage_state(foreign, tp, stage, foreign.pp * chunks, ep, experts)
            value["model" if chunks == 1 else f"model{chunk}"] = state
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save(value, folder / name / "model_optim_rng.pt")
    return folder


def stage_state(foreign: Foreign, tp: int, stage: int, stages: int, ep: int, experts: str) -> dict[str, object]:
    """What GPTModel.state_dict() gives on a rank."""
    per = LAYERS // stages
    found: dict[str, object] = {}
    for name, spec in foreign.specs.items():
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        here = {"embedding": 0, "output_layer": stages - 1, "decoder": stages - 1}[words[0]]
        if (layer // per if layer is not None else here) != stage:
            continue
        if layer is not None:
            words[2] = str(layer - stage * per)
        matrices = [
            shard(name, m, tp, foreign.tp) for m in experts_of(spec, foreign._padded(name, foreign.weights[name]))
        ]
        key = ".".join(words)
        if not spec.experts:
            found[_local_name(key) if foreign.local else key] = matrices[0].clone()
            continue
        share = len(matrices) // foreign.ep
        found |= _experts(key, matrices[ep * share : (ep + 1) * share], experts)
    if stage == stages - 1 and stages > 1 and foreign.cfg.tied_embeddings:
        embedding = "embedding.word_embeddings.weight"
        whole = foreign._padded(embedding, foreign.weights[embedding])
        found["output_layer.weight"] = shard("output_layer.weight", whole, tp, foreign.tp).clone()
    return found | {"decoder.layers.0.self_attention.linear_qkv._extra_state": None}


def _experts(key: str, matrices: list[Tensor], kind: str) -> dict[str, object]:
    before, after = key.split(".experts.")
    if kind == "sequential":
        return {f"{before}.experts.local_experts.{e}.{after}": m.clone() for e, m in enumerate(matrices)}
    if kind == "te":
        return {f"{before}.experts.{after}{e}": m.clone() for e, m in enumerate(matrices)}
    batch = torch.stack([m.t() for m in matrices])  # [experts, in, out]
    first = "fc1" in after
    plain = batch.reshape(batch.shape[1], -1) if first else batch.reshape(-1, batch.shape[2])
    return {f"{before}.experts.weight{1 if first else 2}": plain.contiguous()}


def _local_name(key: str) -> str:
    key = key.replace(".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight")
    return key.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")


# zarr


def write_zarr(folder: Path, foreign: Foreign, dtype: str = "<f4") -> Path:
    """An array for each key; a chunk for each layer, expert and tensor-parallel rank."""
    for name in foreign.specs:
        for piece in _boxes(foreign, name):
            array = folder / piece.key
            array.mkdir(parents=True, exist_ok=True)
            described = {"chunks": piece.size, "compressor": None, "dtype": dtype, "fill_value": None, "filters": None}
            described |= {"order": "C", "shape": piece.shape, "zarr_format": 2}
            (array / ".zarray").write_text(json.dumps(described))
            place = ".".join(str(o // s) for o, s in zip(piece.offset, piece.size, strict=True))
            values = piece.read().contiguous().view(-1).view(torch.uint8)
            (array / place).write_bytes(values.numpy().tobytes())
    return folder
