"""Llama 2, 3, 3.1, 3.2, 3.3, the DeepSeek-R1 distillations on Llama, and models that share the architecture (SmolLM2, DeepSeek v1)."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, common_fields
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Llama's attention has no biases and no q/k norms."""
    if hf.get("attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias true is not supported for Llama",
            why="it also puts a bias on the output projection",
        )
    return ModelConfig(**common_fields(hf), qkv_bias=False, qk_layernorm=False)


LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    (
        ModelType("deepseek_r1_distill", "deepseek_r1", r"deepseek-?r1"),
        ModelType("deepseek", "deepseek", r"deepseek"),
        ModelType("smollm", "chatml", r"smollm"),
        ModelType("llama3_2", "llama3_2", r"llama-?3[._]?[23]"),
        ModelType("llama3_1", "llama3_2", r"llama-?3[._]?1"),
        ModelType("llama3", "llama3", r"llama-?3"),
        ModelType("llama", "llama", r"llama-?2"),
    ),
    read_config,
)
