"""Models that transformers has no architecture for: config.json holds our own description, field by field."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_swift.models.config import ExpertNames, LayerNames, ModelConfig, MoEConfig
from megatron_swift.models.families.family import Family
from megatron_swift.utils.errors import CheckpointError

ARCHITECTURE = "MegatronSwiftForCausalLM"


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """CheckpointError naming the keys, where they are not those of this version."""
    known = {f.name: hf[f.name] for f in dataclasses.fields(ModelConfig) if f.name in hf and f.name != "names"}
    try:
        if known.get("moe") is not None:
            moe = {key: value for key, value in known["moe"].items() if key != "names"}
            known["moe"] = MoEConfig(**{**moe, "sparse_layers": tuple(moe["sparse_layers"])})
        return ModelConfig(**known, names=LayerNames())
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"config.json of a {ARCHITECTURE} is not complete: {error}") from None


def write_config(cfg: ModelConfig) -> dict[str, Any]:
    """Of any model."""
    moe = cfg.moe and dataclasses.replace(cfg.moe, names=ExpertNames())
    fields = dataclasses.asdict(dataclasses.replace(cfg, moe=moe))
    fields.pop("names")
    return {"architectures": [ARCHITECTURE], "model_type": "megatron_swift", **fields}


NATIVE = Family("megatron_swift", (ARCHITECTURE,), (), read_config, write_config)
