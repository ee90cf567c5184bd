"""Parameters that say which model, and its shape where config.json is not to be followed."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_swift.args.spec import Arguments, param

_CONFIG = "Default: from config.json."


def layer_freq(text: str) -> int | list[int]:
    """N, or a list of a 0 or 1 per layer. Raises ValueError for anything else."""
    value = json.loads(text)
    if isinstance(value, list) and value and all(type(v) is int and v in (0, 1) for v in value):
        return value
    if type(value) is int and value >= 1:
        return value
    raise ValueError(text)


def _layer_freq_problem(text: str) -> str:
    try:
        layer_freq(text)
    except ValueError:
        return "a number such as 2, or a list of 0 and 1 such as [0,1,1]"
    return ""


def _position_problem(kind: str) -> str:
    return (
        "rope, learned_absolute or none: Megatron's relative positions are T5's, whose bias fused attention kernels do not take"
        if kind == "relative"
        else ""
    )


@dataclass(frozen=True, kw_only=True)
class ModelSourceParams(Arguments):
    group: ClassVar[str] = "Model source"

    model: str | None = param(
        None, "Local folder or hub name of the Hugging Face model. Default: from the args.json of the checkpoint given."
    )
    model_type: str | None = param(
        None, "Name of the model's family, such as qwen2_5 or llama3_1. Default: found from config.json."
    )
    model_revision: str | None = param(None, "Branch, tag or commit of a hub model. Default: the hub's main branch.")
    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = param(
        None, "Data type of the weights in computation and in exported files. Default: from config.json."
    )
    use_hf: bool = param(
        False, "Take models and data sets from Hugging Face instead of ModelScope; USE_HF=1 does the same."
    )
    hub_token: str | None = param(None, "Access token of the hub. Never written to args.json.", secret=True)
    load_args: bool = param(
        True,
        "Take model, template and system settings not given here from the args.json of the model or checkpoint.",
    )
    load_data_args: bool = param(False, "With load_args: take the data settings from there, too.")
    model_kwargs: dict[str, Any] | None = param(
        None,
        "Extra settings of special models, as JSON; they become upper-case environment variables.",
        not_yet="settings of special models",
    )
    custom_register_path: list[str] = param(
        [],
        "Python files of yours that add templates (TEMPLATES), data sets (DATASETS) or model families (FAMILIES). They are run: trust them.",
    )
    external_plugins: list[str] = param([], "The same as custom_register_path.")
    ignore_args_error: bool = param(False, "Only warn about unknown parameters, for scripts shared with other tools.")


@dataclass(frozen=True, kw_only=True)
class ModelShapeParams(Arguments):
    """Each says how the model differs from its config.json; without a config.json they describe it alone (docs/pretraining.md)."""

    group: ClassVar[str] = "Model"

    num_layers: int | None = param(None, f"Transformer layers. {_CONFIG}", at_least=1)
    hidden_size: int | None = param(None, f"Width of the residual stream. {_CONFIG}", at_least=1)
    ffn_hidden_size: int | None = param(
        None,
        "Inner width of the feed-forward network. Default: from config.json, else 4 x hidden_size, or with swiglu 8/3 of it in "
        "multiples of 64.",
        at_least=1,
    )
    num_attention_heads: int | None = param(None, f"Query heads. {_CONFIG}", at_least=1)
    group_query_attention: bool | None = param(
        None,
        "Share each key and value head between several query heads: true needs num_query_groups, false gives each query head its own.",
    )
    num_query_groups: int | None = param(
        None, "Key and value heads. Default: from config.json, else num_attention_heads.", at_least=1
    )
    max_position_embeddings: int | None = param(
        None,
        "Longest sequence in tokens that the model knows. Default: from config.json, else max_length.",
        at_least=1,
    )
    position_embedding_type: Literal["learned_absolute", "rope", "relative", "none"] | None = param(
        None,
        "How positions enter the model: rotated queries and keys, a learned vector for each, or not at all. "
        "Default: from config.json, else rope.",
        check=_position_problem,
    )
    rotary_base: int | None = param(
        None, "Base of the rotary frequencies (rope_theta). Default: from config.json, else 10000.", at_least=1
    )
    rotary_percent: float | None = param(
        None,
        "Share of each head's dimensions, the first ones, that is rotated. Default: from config.json, else 1.",
        above=0,
        at_most=1,
    )
    normalization: Literal["LayerNorm", "RMSNorm"] | None = param(
        None, "Kind of the norms. Default: from config.json, else RMSNorm."
    )
    norm_epsilon: float | None = param(
        None, "Added to the mean square inside a norm. Default: from config.json, else 1e-5.", above=0
    )
    swiglu: bool | None = param(
        None,
        "Use the gated SwiGLU activation instead of GELU, which is exact. Default: from config.json, else true.",
    )
    untie_embeddings_and_output_weights: bool | None = param(
        None,
        "Give the output layer weights of its own instead of the embedding's. Default: from config.json, else true.",
    )
    disable_bias_linear: bool | None = param(
        None, "No bias in linear layers (but see add_qkv_bias). Default: from config.json, else true."
    )
    add_qkv_bias: bool | None = param(
        None, "Bias in the query, key and value projections. Default: from config.json, else true."
    )
    attention_dropout: float | None = param(
        None,
        "Dropout of attention weights in training; the core attention is then written out, which is slow. Default: 0.",
        at_least=0,
        below=1,
    )
    hidden_dropout: float = param(
        0.0, "Dropout in training of embeddings and after attention and feed-forward.", at_least=0, below=1
    )
    kv_channels: int | None = param(
        None, "Dimensions of each head. Default: from config.json, else hidden_size / num_attention_heads.", at_least=1
    )
    qk_layernorm: bool | None = param(
        None, "Normalise each query and key head before the rotation. Default: from config.json, else false."
    )
    transformer_impl: Literal["local", "transformer_engine"] = param(
        "transformer_engine",
        "Kernels of the layers. transformer_engine = the attention of NVIDIA's Transformer Engine where that is installed and can run: by default "
        "for ragged rows with a long segment, where it was measured ahead; typed as a flag for all rows, an error where it cannot; an "
        "attention_backend other than auto goes before it. local = without it. All other kernels are our own in both.",
    )
    padded_vocab_size: int | None = param(
        None,
        "Rows of the embedding. Default: from config.json, else the tokenizer's tokens up to a multiple of 128.",
        at_least=1,
    )
    rope_scaling: dict[str, Any] | None = param(
        None, "Scaling of the rotary frequencies, as JSON in the form of Llama 3.1's config.json. " + _CONFIG
    )
    init_method_std: float = param(
        0.02,
        "With no_initialization false: standard deviation of initial weights; of those added to the residual stream it is divided by "
        "the root of 2 x num_layers.",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class MoeParams(Arguments):
    group: ClassVar[str] = "MoE"

    num_experts: int | None = param(None, f"Experts per layer. {_CONFIG}", at_least=1)
    moe_ffn_hidden_size: int | None = param(
        None, "Inner width of each expert. Default: from config.json, else ffn_hidden_size.", at_least=1
    )
    moe_shared_expert_intermediate_size: int | None = param(
        None, f"Inner width of all shared experts together; 0 = none. {_CONFIG}", at_least=0
    )
    moe_layer_freq: str | None = param(
        None,
        "Which layers have experts: N for every N-th, or one 0 or 1 per layer as in [0,1,1]. " + _CONFIG,
        check=_layer_freq_problem,
    )
    moe_router_topk: int | None = param(None, f"Experts that each token goes to. {_CONFIG}", at_least=1)
    moe_router_pre_softmax: bool | None = param(None, f"Apply the router's softmax before the top-k choice. {_CONFIG}")
    moe_router_dtype: Literal["fp32", "fp64", "none"] = param(
        "fp32", "Data type of the router's logits; none = the model's. Megatron-SWIFT 3.4 uses the model's."
    )
    moe_aux_loss_coeff: float | None = param(
        None, f"Weight of the load-balancing loss; 0.01 is a good start. {_CONFIG}", at_least=0
    )
    expert_model_parallel_size: int = param(1, "Ranks that the experts are spread over.", at_least=1)
    expert_tensor_parallel_size: int | None = param(
        None, "Ranks that share each expert's matrices. Default: tensor_model_parallel_size.", at_least=1
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "alltoall_seq"] = param(
        "alltoall", "How tokens travel to their experts; the result is the same, and alltoall_seq runs as alltoall."
    )
    moe_grouped_gemm: bool = param(
        True, "Compute all experts of a rank in one grouped matrix product. Megatron-SWIFT's default is false."
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] = param(
        "aux_loss",
        "How the router is kept balanced: by a loss per micro-batch, per sequence or over all ranks, by Sinkhorn assignment, or not.",
    )
    moe_z_loss_coeff: float | None = param(
        None, "Weight of the loss that keeps router logits small. Default: no such loss.", at_least=0
    )
    moe_expert_capacity_factor: float | None = param(
        None, "Drop an expert's tokens beyond this multiple of the even share; negative = none. Default: drop none."
    )
    moe_token_drop_policy: Literal["probs", "position"] = param(
        "probs", "Which tokens stay within the capacity: the most probable, or the first of the row."
    )
    moe_pad_expert_input_to_capacity: bool = param(
        False, "Fill each expert's input up to its capacity, so that all have one shape."
    )
    moe_shared_expert_overlap: bool = param(
        False, "On a GPU: compute shared experts on a stream of their own while tokens travel to the others."
    )
