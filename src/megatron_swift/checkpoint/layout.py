"""Where each of our parameters lies in a Hugging Face folder and in a Megatron-Core checkpoint: one table per layer kind.

Our parameters carry Megatron-Core's names and fused layouts. Each is a list of row blocks of Hugging Face tensors, one after the other
along dim 0; import, export and resume all follow from that one list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_swift.models.config import ModelConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Block:
    """`rows` rows of a Hugging Face tensor, from row `start`."""

    hf_name: str
    start: int
    rows: int


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the whole model: its name, global shape and the Hugging Face rows it is made of."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def layer(self) -> int | None:
        """The layer's number, None outside the layers."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None

    @property
    def megatron_key(self) -> str:
        """The name in a Megatron-Core checkpoint, where layers of one kind are stacked under one key along a first axis."""
        match = _LAYER.match(self.name)
        return f"decoder.layers.{match[2]}" if match else self.name


def tensor_specs(cfg: ModelConfig) -> dict[str, TensorSpec]:
    """Every parameter of the model, in the order of a Hugging Face folder."""
    vocab, hidden = cfg.vocab_size, cfg.hidden_size
    specs = [_plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for i in range(cfg.num_layers):
        specs += _attention(cfg, f"decoder.layers.{i}.self_attention.", f"model.layers.{i}.")
        specs += _mlp(cfg, f"decoder.layers.{i}.mlp.", f"model.layers.{i}.")
    specs.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not cfg.tied_embeddings:
        specs.append(_plain("output_layer.weight", "lm_head.weight", (vocab, hidden)))
    return {spec.name: spec for spec in specs}


def _plain(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, (Block(hf_name, 0, shape[0]),))


def _attention(cfg: ModelConfig, ours: str, theirs: str) -> list[TensorSpec]:
    hidden, d, per_group = cfg.hidden_size, cfg.kv_channels, cfg.heads_per_group

    def fused(kind: str) -> tuple[Block, ...]:
        blocks: list[Block] = []
        for group in range(cfg.num_query_groups):
            blocks.append(Block(f"{theirs}self_attn.q_proj.{kind}", group * per_group * d, per_group * d))
            blocks.append(Block(f"{theirs}self_attn.k_proj.{kind}", group * d, d))
            blocks.append(Block(f"{theirs}self_attn.v_proj.{kind}", group * d, d))
        return tuple(blocks)

    specs = [
        _plain(f"{ours}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (hidden,)),
        TensorSpec(f"{ours}linear_qkv.weight", (cfg.qkv_rows, hidden), fused("weight")),
    ]
    if cfg.qkv_bias:
        specs.append(TensorSpec(f"{ours}linear_qkv.bias", (cfg.qkv_rows,), fused("bias")))
    if cfg.qk_layernorm:
        specs.append(_plain(f"{ours}q_layernorm.weight", f"{theirs}self_attn.q_norm.weight", (d,)))
        specs.append(_plain(f"{ours}k_layernorm.weight", f"{theirs}self_attn.k_norm.weight", (d,)))
    specs.append(
        _plain(f"{ours}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (hidden, cfg.num_attention_heads * d))
    )
    return specs


def _mlp(cfg: ModelConfig, ours: str, theirs: str) -> list[TensorSpec]:
    hidden, ffn = cfg.hidden_size, cfg.ffn_hidden_size
    gate_up = (Block(f"{theirs}mlp.gate_proj.weight", 0, ffn), Block(f"{theirs}mlp.up_proj.weight", 0, ffn))
    return [
        _plain(f"{ours}linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (hidden,)),
        TensorSpec(f"{ours}linear_fc1.weight", (2 * ffn, hidden), gate_up),
        _plain(f"{ours}linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn)),
    ]


@dataclass(frozen=True)
class Part:
    """Rows of one of our parameters that fill `rows` rows of a Hugging Face tensor from row `hf_start`."""

    name: str
    start: int
    hf_start: int
    rows: int


@dataclass(frozen=True)
class HuggingFaceTensor:
    """One tensor of a Hugging Face folder and our rows that make it, in order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def hugging_face_tensors(specs: Iterable[TensorSpec]) -> dict[str, HuggingFaceTensor]:
    """The inverse of the table: every tensor a Hugging Face folder of this model holds, in order of first appearance."""
    parts: dict[str, list[Part]] = {}
    trailing: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        row = 0
        for block in spec.blocks:
            parts.setdefault(block.hf_name, []).append(Part(spec.name, row, block.start, block.rows))
            trailing[block.hf_name] = spec.shape[1:]
            row += block.rows
        assert row == spec.shape[0], spec
    return {
        name: HuggingFaceTensor(
            name, (sum(p.rows for p in found), *trailing[name]), tuple(sorted(found, key=lambda p: p.hf_start))
        )
        for name, found in parts.items()
    }
