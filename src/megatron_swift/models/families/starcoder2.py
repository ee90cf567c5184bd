"""StarCoder2's architecture: LayerNorm, GELU and biases everywhere, rotary positions. Its own models approximate GELU, which we do not."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import LayerNames, ModelConfig, common_fields
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.written import common_keys
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Only the exact GELU ("gelu")."""
    if hf.get("sliding_window"):
        raise CheckpointError("config.json: sliding_window is not supported", do="use a model without one")
    biased = bool(hf.get("use_bias", True))
    fields = common_fields(
        {**hf, "hidden_act": hf.get("hidden_act", "gelu_pytorch_tanh")}, activations=("gelu",), epsilon="norm_epsilon"
    )
    return ModelConfig(
        **fields,
        qkv_bias=biased,
        linear_bias=biased,
        qk_layernorm=False,
        normalization="LayerNorm",
        swiglu=False,
        names=LayerNames(up="c_fc", down="c_proj"),
    )


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = common_keys(cfg, activation="gelu", epsilon="norm_epsilon")
    keys |= {"use_bias": cfg.linear_bias, "sliding_window": None, "embedding_dropout": 0.0, "residual_dropout": 0.0}
    return {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", **keys}


STARCODER2 = Family(
    "starcoder2",
    ("Starcoder2ForCausalLM",),
    (ModelType("starcoder2", "jinja", r"starcoder2"),),
    read_config,
    write_config,
)
