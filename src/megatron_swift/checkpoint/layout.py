"""Where each of our parameters lies in a Hugging Face folder and in a Megatron-Core checkpoint: one table per layer kind.

Our parameters carry Megatron-Core's names and fused layouts. Each is a list of row blocks of Hugging Face tensors, one after the other
along dim 0; import, export and resume all follow from that one list.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_swift.models.config import ModelConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Block:
    """`rows` rows of a Hugging Face tensor, from row `start`.

    experts : the tensor has one more axis in front, of this many experts, whose rows are counted through; 0: it is a matrix.
    """

    hf_name: str
    start: int
    rows: int
    experts: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the whole model: its name, global shape and the Hugging Face rows it is made of.

    stacked : in a Megatron-Core checkpoint layers of one kind lie stacked under one key along a first axis; where dense and sparse
              layers are mixed, each has a key of its own.
    experts : the parameter holds this many equal blocks of rows, one per expert, which a checkpoint keeps apart along an axis; 0: none.
    parts   : the parameter, or each expert's block, is this many equal parts (gate and up), which tensor parallelism cuts each by itself.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    stacked: bool = True
    experts: int = 0
    parts: int = 1

    @property
    def layer(self) -> int | None:
        """The layer's number in its stack, None where there is none."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match and self.stacked else None

    @property
    def megatron_key(self) -> str:
        """The name in a Megatron-Core checkpoint."""
        match = _LAYER.match(self.name)
        name = f"decoder.layers.{match[2]}" if match and self.stacked else self.name
        return name.replace(".mlp.experts.", ".mlp.experts.experts.")

    def megatron_shape(self, num_layers: int) -> tuple[int, ...]:
        """The shape of the tensor of `megatron_key` in a model of `num_layers`."""
        shape = (self.experts, self.shape[0] // self.experts, *self.shape[1:]) if self.experts else self.shape
        return (num_layers, *shape) if self.layer is not None else shape

    def megatron_boxes(
        self, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> list[tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]]:
        """Rows [start, stop) of the parameter as boxes of that tensor, in order: (rows, offset, size) each, at most three."""
        stack = (self.layer,) if self.layer is not None else ()
        column: tuple[int, ...] = tuple(0 for _ in self.shape[1:])
        width = self.shape[1:]
        if columns is not None:
            column, width = (columns[0],), (columns[1] - columns[0],)
        if not self.experts:
            return [((start, stop), (*stack, start, *column), (*(1 for _ in stack), stop - start, *width))]
        found, block = [], self.shape[0] // self.experts
        for first, last in whole_blocks(start, stop, block):
            expert, row = divmod(first, block)
            whole = row == 0 and (last - first) % block == 0  # an empty range may lie inside an expert
            experts, rows = ((last - first) // block, block) if whole else (1, last - first)
            found.append(((first, last), (*stack, expert, row, *column), (*(1 for _ in stack), experts, rows, *width)))
        return found


def whole_blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) cut so that each part is whole blocks of `size` or lies inside one."""
    first, last = -(-start // size) * size, stop // size * size
    if first > last:
        return [(start, stop)]
    cuts = [(start, first), (first, last), (last, stop)]
    return [(a, b) for a, b in cuts if a < b] or [(start, stop)]


def tensor_specs(cfg: ModelConfig, *, stacked_experts: bool = False) -> dict[str, TensorSpec]:
    """Every parameter of the model, in the order of a Hugging Face folder.

    stacked_experts : the folder holds all experts of a layer in one tensor, as transformers 5 keeps them in memory, not one by one.
    """
    vocab, hidden = cfg.vocab_size, cfg.hidden_size
    specs = [_plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab, hidden))]
    if cfg.position_embedding_type == "learned_absolute":
        shape = (cfg.max_position_embeddings, hidden)
        specs.append(_plain("embedding.position_embeddings.weight", "model.embed_positions.weight", shape))
    for i in range(cfg.num_layers):
        specs += _attention(cfg, f"decoder.layers.{i}.self_attention.", f"model.layers.{i}.")
        if cfg.is_sparse(i):
            specs += _moe(cfg, f"decoder.layers.{i}.", f"model.layers.{i}.", stacked=stacked_experts)
        else:
            specs += _mlp(cfg, f"decoder.layers.{i}.mlp.", f"model.layers.{i}.")
    specs += _norm(cfg, "decoder.final_layernorm.", "model.norm.", hidden)
    if not cfg.tied_embeddings:
        specs.append(_plain("output_layer.weight", "lm_head.weight", (vocab, hidden)))
    mixed = cfg.moe is not None and not all(cfg.moe.sparse_layers)
    return {spec.name: dataclasses.replace(spec, stacked=not mixed) for spec in specs}


def _plain(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, (Block(hf_name, 0, shape[0]),))


def _norm(cfg: ModelConfig, ours: str, theirs: str, size: int) -> list[TensorSpec]:
    """A norm's parameters; ours ends in a dot, or in `layer_norm_` inside a linear layer."""
    kinds = ("weight", "bias") if cfg.normalization == "LayerNorm" else ("weight",)
    return [_plain(f"{ours}{kind}", f"{theirs}{kind}", (size,)) for kind in kinds]


def _attention(cfg: ModelConfig, ours: str, theirs: str) -> list[TensorSpec]:
    hidden, d = cfg.hidden_size, cfg.kv_channels
    specs = _norm(cfg, f"{ours}linear_qkv.layer_norm_", f"{theirs}input_layernorm.", hidden)
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        shape = (cfg.qkv_rows, hidden) if kind == "weight" else (cfg.qkv_rows,)
        specs.append(TensorSpec(f"{ours}linear_qkv.{kind}", shape, _qkv_blocks(cfg, f"{theirs}self_attn.", kind)))
    if cfg.qk_layernorm:
        specs += _norm(cfg, f"{ours}q_layernorm.", f"{theirs}self_attn.q_norm.", d)
        specs += _norm(cfg, f"{ours}k_layernorm.", f"{theirs}self_attn.k_norm.", d)
    return specs + _linear(cfg, f"{ours}linear_proj", f"{theirs}self_attn.o_proj", hidden, cfg.num_attention_heads * d)


def _qkv_blocks(cfg: ModelConfig, theirs: str, kind: str) -> tuple[Block, ...]:
    """By query group: its query heads, its key, its value. A folder keeps three tensors, or one in which they follow one another."""
    d, per_group, fused = cfg.kv_channels, cfg.heads_per_group, cfg.names.qkv
    names = [f"{theirs}{fused or part}.{kind}" for part in ("q_proj", "k_proj", "v_proj")]
    queries, keys = (cfg.num_attention_heads * d, cfg.num_query_groups * d) if fused else (0, 0)
    blocks: list[Block] = []
    for group in range(cfg.num_query_groups):
        blocks.append(Block(names[0], group * per_group * d, per_group * d))
        blocks.append(Block(names[1], queries + group * d, d))
        blocks.append(Block(names[2], queries + keys + group * d, d))
    return tuple(blocks)


def _linear(cfg: ModelConfig, ours: str, theirs: str, rows: int, columns: int) -> list[TensorSpec]:
    """A linear layer after attention or MLP."""
    specs = [_plain(f"{ours}.weight", f"{theirs}.weight", (rows, columns))]
    return [*specs, _plain(f"{ours}.bias", f"{theirs}.bias", (rows,))] if cfg.linear_bias else specs


def _mlp(cfg: ModelConfig, ours: str, theirs: str) -> list[TensorSpec]:
    hidden, ffn, names, parts = cfg.hidden_size, cfg.ffn_hidden_size, cfg.names, cfg.fc1_parts
    at = f"{theirs}mlp."
    specs = _norm(cfg, f"{ours}linear_fc1.layer_norm_", f"{theirs}post_attention_layernorm.", hidden)
    for kind in ("weight", "bias") if cfg.linear_bias else ("weight",):
        if names.gate_up:
            blocks: tuple[Block, ...] = (Block(f"{at}{names.gate_up}.{kind}", 0, parts * ffn),)
        else:
            blocks = tuple(Block(f"{at}{name}.{kind}", 0, ffn) for name in ("gate_proj", names.up)[-parts:])
        shape = (parts * ffn, hidden) if kind == "weight" else (parts * ffn,)
        specs.append(TensorSpec(f"{ours}linear_fc1.{kind}", shape, blocks, parts=parts))
    return specs + _linear(cfg, f"{ours}linear_fc2", f"{at}{names.down}", hidden, ffn)


def _moe(cfg: ModelConfig, ours: str, theirs: str, *, stacked: bool) -> list[TensorSpec]:
    moe, hidden = cfg.moe, cfg.hidden_size
    assert moe is not None
    inner, number, names = moe.ffn_hidden_size, moe.num_experts, moe.names
    at, mlp = f"{theirs}{'mlp' if stacked else names.module}.", f"{ours}mlp."
    fc1: list[Block] = []
    down: list[Block] = []
    parts, ways = cfg.fc1_parts, (names.gate, names.up)[-cfg.fc1_parts :]
    if stacked:
        fc1.append(Block(f"{at}experts.gate_up_proj", 0, number * parts * inner, experts=number))
        down.append(Block(f"{at}experts.down_proj", 0, number * hidden, experts=number))
    else:
        for expert in range(number):
            fc1 += [Block(f"{at}experts.{expert}.{way}.weight", 0, inner) for way in ways]
            down.append(Block(f"{at}experts.{expert}.{names.down}.weight", 0, hidden))
    fc1_rows = number * parts * inner
    specs = [
        *_norm(cfg, f"{ours}pre_mlp_layernorm.", f"{theirs}post_attention_layernorm.", hidden),
        _plain(f"{mlp}router.weight", f"{at}gate.weight", (number, hidden)),
        TensorSpec(f"{mlp}experts.linear_fc1.weight", (fc1_rows, hidden), tuple(fc1), experts=number, parts=parts),
        TensorSpec(f"{mlp}experts.linear_fc2.weight", (number * hidden, inner), tuple(down), experts=number),
    ]
    if moe.shared_size:
        size, shared = moe.shared_size, f"{at}shared_expert"
        both = tuple(Block(f"{shared}.{way}.weight", 0, size) for way in ("gate_proj", "up_proj")[-parts:])
        specs += [
            TensorSpec(f"{mlp}shared_experts.linear_fc1.weight", (parts * size, hidden), both, parts=parts),
            _plain(f"{mlp}shared_experts.linear_fc2.weight", f"{shared}.down_proj.weight", (hidden, size)),
            _plain(f"{mlp}shared_experts.gate_weight", f"{at}shared_expert_gate.weight", (1, hidden)),
        ]
    return specs


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
    experts: dict[str, int] = {}
    for spec in specs:
        row = 0
        for block in spec.blocks:
            parts.setdefault(block.hf_name, []).append(Part(spec.name, row, block.start, block.rows))
            trailing[block.hf_name] = spec.shape[1:]
            experts[block.hf_name] = block.experts
            row += block.rows
        assert row == spec.shape[0], spec
    return {
        name: HuggingFaceTensor(
            name,
            _whole_shape(sum(p.rows for p in found), trailing[name], experts[name]),
            tuple(sorted(found, key=lambda p: p.hf_start)),
        )
        for name, found in parts.items()
    }


def _whole_shape(rows: int, trailing: tuple[int, ...], experts: int) -> tuple[int, ...]:
    return (experts, rows // experts, *trailing) if experts else (rows, *trailing)
