"""Qwen3 dense: an RMSNorm over each query and key head, no bias on query, key and value."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, common_fields
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Qwen3 normalises queries and keys."""
    if hf.get("attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias true is not supported for Qwen3",
            why="it also puts a bias on the output projection",
        )
    return ModelConfig(**common_fields(hf), qkv_bias=False, qk_layernorm=True)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = {**common_keys(cfg), "head_dim": cfg.kv_channels, "attention_bias": False, "use_sliding_window": False}
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **keys}


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), (ModelType("qwen3", "qwen3", r"qwen3"),), read_config, write_config)
