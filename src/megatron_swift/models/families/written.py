"""The keys of a config.json that every family writes the same way: `models.config.common_fields` reversed."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig


def common_keys(cfg: ModelConfig, *, activation: str = "silu", epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """Sizes, norms, rotation and dtype, in the spelling that all versions of transformers read.

    The special tokens are the tokenizer's: whoever knows it puts them in. transformers would take those of a published model.
    """
    keys: dict[str, Any] = {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_query_groups,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_position_embeddings,
        epsilon: cfg.norm_epsilon,
        "rope_theta": cfg.rotary_base,
        "hidden_act": activation,
        "tie_word_embeddings": cfg.tied_embeddings,
        "torch_dtype": cfg.dtype,
    }
    if cfg.rope_scaling is not None:
        keys["rope_scaling"] = cfg.rope_scaling
    return keys


def head_dim(cfg: ModelConfig) -> dict[str, Any]:
    """The head size, where it does not follow from the number of heads."""
    usual = cfg.hidden_size // cfg.num_attention_heads
    return {} if cfg.kv_channels == usual else {"head_dim": cfg.kv_channels}


def expert_keys(cfg: ModelConfig) -> dict[str, Any]:
    """Qwen's keys of a mixture of experts."""
    moe = cfg.moe
    if moe is None:
        return {}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "norm_topk_prob": not moe.pre_softmax,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(moe.sparse_layers) if not sparse],
    }
