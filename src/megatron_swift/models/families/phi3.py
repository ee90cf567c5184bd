"""Phi-4, and Phi-3 where it has no sliding window: Llama with fused tensors; the first dims of each head may be all that is rotated."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import LayerNames, ModelConfig, common_fields, read_rotary_percent
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys
from megatron_swift.utils.errors import CheckpointError

NAMES = LayerNames(qkv="qkv_proj", gate_up="gate_up_proj")


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Phi-3 has no biases and no q/k norms."""
    if hf.get("sliding_window"):
        raise CheckpointError("config.json: sliding_window is not supported", do="use a Phi model without one")
    rotary = read_rotary_percent(hf)
    return ModelConfig(**common_fields(hf), qkv_bias=False, qk_layernorm=False, rotary_percent=rotary, names=NAMES)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = {**common_keys(cfg), "partial_rotary_factor": cfg.rotary_percent, "sliding_window": None}
    keys["original_max_position_embeddings"] = cfg.max_position_embeddings
    return {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **keys}


PHI3 = Family("phi3", ("Phi3ForCausalLM",), (ModelType("phi", "jinja", r"phi"),), read_config, write_config)
