"""Qwen1.5, Qwen2, Qwen2.5 (Coder and Math too), QwQ, and the DeepSeek-R1 distillations on Qwen."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, common_fields
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys, head_dim


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Qwen2 has biases on query, key and value; its config.json does not say so."""
    return ModelConfig(**common_fields(hf), qkv_bias=True, qk_layernorm=False)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = {**common_keys(cfg), **head_dim(cfg), "use_sliding_window": False}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **keys}


QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    (
        ModelType("deepseek_r1_distill", "deepseek_r1", r"deepseek-?r1"),
        ModelType("qwq_preview", "qwq_preview", r"qwq.*preview"),
        ModelType("qwq", "qwq", r"qwq"),
        ModelType("qwen2_5_math", "qwen2_5_math", r"qwen2[._]5-?math"),
        ModelType("qwen2_5", "qwen2_5", r"qwen2[._]5"),
        ModelType("qwen2", "qwen", r"qwen(1[._]5|2)"),
    ),
    read_config,
    write_config,
)
