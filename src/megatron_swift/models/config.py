"""The architecture as one frozen value, read from a Hugging Face config.json. No torch here: it is read before torch is imported."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_swift.utils.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LayerNames:
    """How a Hugging Face folder calls the matrices of a dense layer. qkv, gate_up: the one tensor that holds all of them, "" where none does."""

    up: str = "up_proj"
    down: str = "down_proj"
    qkv: str = ""
    gate_up: str = ""


@dataclass(frozen=True)
class ExpertNames:
    """How a Hugging Face folder calls a layer's mixture of experts and the three matrices of one of them."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse layers of a mixture of experts.

    topk         : experts that each token goes to.  ffn_hidden_size: inner width of an expert.
    shared_size  : inner width of the expert that every token goes to, 0 without one; its output is gated by a sigmoid.
    pre_softmax  : softmax over all experts before the choice, weights as they are; otherwise over the chosen ones, weights sum to 1.
    sparse_layers: for each layer of the model whether it has experts; the others are dense.
    aux_loss_coeff: what the model was made with; a run may use another.
    experts_here : experts that a rank holds under expert parallelism; None: all of them.
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_size: int
    pre_softmax: bool
    sparse_layers: tuple[bool, ...]
    aux_loss_coeff: float = 0.0
    experts_here: int | None = None
    names: ExpertNames = ExpertNames()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Field names are Megatron's.

    kv_channels is the size of one attention head; num_query_groups the number of key/value heads; rope_scaling the dict of
    config.json (None: unscaled). dtype is the type the weights are stored in ("float32", "bfloat16", "float16").
    normalization         : RMSNorm or LayerNorm, which has a bias; of q and k heads, too.
    swiglu                : the MLP and experts are gated by SiLU; otherwise one matrix and GELU (exact, by the error function).
    linear_bias           : every linear layer of attention and dense MLP has a bias; qkv_bias is true then.
    position_embedding_type : rope, learned_absolute or none.  rotary_percent: the share of each head's dims, the first ones, that rope turns.
    names                 : where a Hugging Face folder differs from the usual.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rope_scaling: dict[str, Any] | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_layernorm: bool
    dtype: str
    normalization: str = "RMSNorm"
    swiglu: bool = True
    linear_bias: bool = False
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    names: LayerNames = LayerNames()
    moe: MoEConfig | None = None

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that are turned by its position."""
        return int(self.kv_channels * self.rotary_percent) if self.position_embedding_type == "rope" else 0

    @property
    def fc1_parts(self) -> int:
        """Matrices that lie one after the other in linear_fc1: gate and up, or up alone."""
        return 2 if self.swiglu else 1

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query/key/value weight."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and self.moe.sparse_layers[layer]

    def active_parameters(self, layer: int) -> int:
        """Parameters of a layer's matrices that one token meets: of the routed experts, those it goes to."""
        attention = self.qkv_rows + self.num_attention_heads * self.kv_channels
        matrices = self.fc1_parts + 1
        if not self.is_sparse(layer):
            return self.hidden_size * (attention + matrices * self.ffn_hidden_size)
        assert self.moe is not None
        inner = self.moe.topk * self.moe.ffn_hidden_size + self.moe.shared_size
        gates = self.moe.num_experts + (1 if self.moe.shared_size else 0)
        return self.hidden_size * (attention + matrices * inner + gates)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError naming the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", do="give the folder of a Hugging Face model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def common_fields(
    hf: dict[str, Any], *, activations: tuple[str, ...] = ("silu", "swish"), epsilon: str = "rms_norm_eps"
) -> dict[str, Any]:
    """The ModelConfig fields that every family reads the same way; a family adds qkv_bias and qk_layernorm.

    activations : what hidden_act may be.  epsilon: the key of the norms' epsilon.
    """
    heads = _need(hf, "num_attention_heads")
    hidden = _need(hf, "hidden_size")
    groups = hf.get("num_key_value_heads") or heads
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    for key, legal in (
        ("hidden_act", activations),
        ("mlp_bias", (False, None)),
        ("use_sliding_window", (False, None)),
    ):
        if key in hf and hf[key] not in legal:
            raise CheckpointError(
                f"config.json: {key} {hf[key]!r} is not supported", do="use a model of a supported architecture"
            )
    base, scaling = read_rope(hf)
    return dict(
        num_layers=_need(hf, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_need(hf, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hf.get("head_dim") or hidden // heads,
        vocab_size=_need(hf, "vocab_size"),
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        norm_epsilon=hf.get(epsilon, 1e-6),
        rotary_base=base,
        rope_scaling=scaling,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        dtype=read_dtype(hf),
    )


def sparse_layers(hf: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers have experts, from Qwen's `decoder_sparse_step` (every n-th layer) and `mlp_only_layers`."""
    step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or ()
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(_need(hf, "num_hidden_layers")))


def read_moe(hf: dict[str, Any], *, experts: str, inner: str, **fields: Any) -> MoEConfig | None:
    """The experts of a config.json whose keys for their number and inner width are `experts` and `inner`.

    fields : shared_size, pre_softmax and sparse_layers, which families read each in their own way. None where no layer is sparse.
    """
    number, topk = _need(hf, experts), _need(hf, "num_experts_per_tok")
    if not 1 <= topk <= number:
        raise CheckpointError(f"config.json: num_experts_per_tok {topk} of {number} experts is not possible")
    if not any(fields["sparse_layers"]):
        return None
    coeff = float(hf.get("router_aux_loss_coef") or 0.0)
    return MoEConfig(num_experts=number, topk=topk, ffn_hidden_size=_need(hf, inner), aux_loss_coeff=coeff, **fields)


def read_rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rotary base, scaling or None), from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    base = scaling.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(base), None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"config.json: rope_type {kind!r} is not supported", do="supported are default, linear, llama3 and yarn"
        )
    rest = {k: v for k, v in scaling.items() if k not in ("rope_theta", "type", "partial_rotary_factor")}
    return float(base), {**rest, "rope_type": kind}


def read_rotary_percent(hf: dict[str, Any], default: float = 1.0) -> float:
    """`partial_rotary_factor`, which transformers 5 keeps among `rope_parameters`."""
    where = hf.get("rope_parameters") or {}
    return float(where.get("partial_rotary_factor", hf.get("partial_rotary_factor", default)))


def read_dtype(hf: dict[str, Any]) -> str:
    """The weights' type: `dtype` (transformers 5) or `torch_dtype` (older), float32 when neither is there."""
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"config.json: dtype {name!r} is not supported",
            do=f"supported are {', '.join(DTYPES)}; quantised weights cannot be trained",
        )
    return name


def _need(hf: dict[str, Any], key: str) -> int:
    if not isinstance(hf.get(key), int):
        raise CheckpointError(f"config.json has no {key}", do="give the folder of a Hugging Face language model")
    return hf[key]
