"""Qwen3-MoE: Qwen3's attention; each sparse layer sends a token to a few experts, without a shared one."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, read_moe, sparse_layers
from megatron_swift.models.families import qwen3
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import expert_keys


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """transformers takes norm_topk_prob false where config.json does not say."""
    moe = read_moe(
        hf,
        experts="num_experts",
        inner="moe_intermediate_size",
        shared_size=0,
        pre_softmax=not hf.get("norm_topk_prob", False),
        sparse_layers=sparse_layers(hf),
    )
    return qwen3.read_config(hf).replace(moe=moe)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    return {**qwen3.write_config(cfg), **names, **expert_keys(cfg)}


QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    (ModelType("qwen3_moe", "qwen3", r"qwen3"),),
    read_config,
    write_config,
)
