"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; sparse layers have one more expert, shared by all tokens and gated."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, read_moe, sparse_layers
from megatron_swift.models.families import qwen2
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import expert_keys


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """transformers takes norm_topk_prob false where config.json does not say."""
    moe = read_moe(
        hf,
        experts="num_experts",
        inner="moe_intermediate_size",
        shared_size=hf.get("shared_expert_intermediate_size") or 0,
        pre_softmax=not hf.get("norm_topk_prob", False),
        sparse_layers=sparse_layers(hf),
    )
    return qwen2.read_config(hf).replace(moe=moe, qkv_bias=bool(hf.get("qkv_bias", True)))


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model. transformers always builds the shared expert: a model without one must not be read as it was written."""
    names = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    shared = {"shared_expert_intermediate_size": (cfg.moe.shared_size if cfg.moe else 0) or 1}
    return {**qwen2.write_config(cfg), **names, **expert_keys(cfg), **shared, "qkv_bias": cfg.qkv_bias}


QWEN2_MOE = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    (ModelType("qwen2_moe", "qwen", r"qwen(1[._]5|2).*(moe|a14b|a2[._]7b)"),),
    read_config,
    write_config,
)
