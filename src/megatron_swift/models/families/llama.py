"""Llama 2, 3, 3.1, 3.2, 3.3, the DeepSeek-R1 distillations on Llama, and models that share the architecture (SmolLM2, DeepSeek v1)."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, common_fields
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys, head_dim
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Llama's attention has no q/k norms; biases, where there are any, on all linear layers, as Megatron has them."""
    biases = [bool(hf.get(key)) for key in ("attention_bias", "mlp_bias")]
    if biases[0] != biases[1]:
        raise CheckpointError(
            f"config.json: attention_bias {biases[0]} with mlp_bias {biases[1]} is not supported for Llama",
            why="Megatron has biases on all linear layers, on query, key and value only, or on none",
        )
    fields = common_fields({**hf, "mlp_bias": False})
    return ModelConfig(**fields, qkv_bias=biases[0], linear_bias=biases[0], qk_layernorm=False)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    biases = {"attention_bias": cfg.linear_bias, "mlp_bias": cfg.linear_bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common_keys(cfg), **head_dim(cfg), **biases}


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
    write_config,
)
