"""Configurations and tiny folders that the checkpoint tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_swift.checkpoint.dcp import Piece, pieces_of
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.families import describe

FAMILY_TRAITS = {"qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)}  # qkv_bias, qk_layernorm


def config(**changes: object) -> ModelConfig:
    """A small configuration, changed as asked."""
    base = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=6,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=2,
        vocab_size=11,
        max_position_embeddings=64,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=True,
        qk_layernorm=False,
        dtype="float32",
    )
    return base.replace(**changes)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any shape of any family."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    bias, norms = FAMILY_TRAITS[draw(st.sampled_from(sorted(FAMILY_TRAITS)))]
    return config(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 9)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=bias,
        qk_layernorm=norms,
    )


def config_of(folder: Path) -> ModelConfig:
    """The configuration of a folder."""
    return describe(folder, model_type=None, template="chatml", chat_template=None).config


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON object on disk."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Memory:
    """A WeightSource of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def read(self, spec: TensorSpec, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensors[spec.name][start:stop]


def random_weights(specs: dict[str, TensorSpec], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random tensor for each parameter, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in specs.items()}


def rows_of_rank(rows: int, rank: int, ranks: int) -> slice:
    """FSDP's split: equal chunks but for the last ones, which may be short or empty."""
    chunk = -(-rows // ranks)
    return slice(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def pieces_of_rank(
    specs: dict[str, TensorSpec], weights: dict[str, Tensor], rank: int, ranks: int, *, num_layers: int
) -> list[Piece]:
    """What one rank of `ranks` holds of the weights."""
    found = []
    for name, spec in specs.items():
        rows = rows_of_rank(spec.shape[0], rank, ranks)
        found += pieces_of(spec, weights[name][rows], rows.start, num_layers=num_layers)
    return found
