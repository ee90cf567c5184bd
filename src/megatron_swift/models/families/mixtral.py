"""Mixtral: Llama's attention; every layer sends a token to a few experts whose weights sum to one."""

from __future__ import annotations

from typing import Any

from megatron_swift.models.config import ExpertNames, ModelConfig, read_moe
from megatron_swift.models.families import llama
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.utils.errors import CheckpointError


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """An expert is as wide as intermediate_size says."""
    if hf.get("sliding_window"):
        raise CheckpointError("config.json: sliding_window is not supported", do="use a Mixtral model without one")
    moe = read_moe(
        hf,
        experts="num_local_experts",
        inner="intermediate_size",
        shared_size=0,
        pre_softmax=False,
        names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
        sparse_layers=(True,) * hf.get("num_hidden_layers", 0),
    )
    return llama.read_config(hf).replace(moe=moe)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of a new model."""
    keys = {
        **llama.write_config(cfg),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
    }
    if cfg.moe is not None:
        keys |= {"num_local_experts": cfg.moe.num_experts, "num_experts_per_tok": cfg.moe.topk}
        keys |= {"intermediate_size": cfg.moe.ffn_hidden_size, "router_aux_loss_coef": cfg.moe.aux_loss_coeff}
    return keys


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    (ModelType("mixtral", "llama", r"mixtral"),),
    read_config,
    write_config,
)
