"""StableLM: Llama with LayerNorm, of which the first dims of each head are rotated; biases on query, key and value or none."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ModelConfig, common_fields, read_rotary_percent
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Neither its norms of single heads nor parallel residuals are Megatron's."""
    for key in ("qk_layernorm", "use_parallel_residual"):
        if hf.get(key):
            raise CheckpointError(f"config.json: {key} true is not supported for StableLM")
    return ModelConfig(
        **common_fields(hf, epsilon="layer_norm_eps"),
        qkv_bias=bool(hf.get("use_qkv_bias", False)),
        qk_layernorm=False,
        normalization="LayerNorm",
        rotary_percent=read_rotary_percent(hf, 0.25),
    )


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = {**common_keys(cfg, epsilon="layer_norm_eps"), "partial_rotary_factor": cfg.rotary_percent}
    keys |= {"use_qkv_bias": cfg.qkv_bias, "qk_layernorm": False, "use_parallel_residual": False}
    return {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", **keys}


STABLELM = Family(
    "stablelm",
    ("StableLmForCausalLM",),
    (ModelType("stablelm", "jinja", r"stablelm"),),
    read_config,
    write_config,
)
