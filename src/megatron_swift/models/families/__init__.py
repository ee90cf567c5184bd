"""The model families: one small file each, and this plain dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_swift.models.config import ExpertNames, LayerNames, ModelConfig, read_json
from megatron_swift.models.families.family import Family, ModelType
from megatron_swift.models.families.llama import LLAMA
from megatron_swift.models.families.mixtral import MIXTRAL
from megatron_swift.models.families.native import NATIVE
from megatron_swift.models.families.phi3 import PHI3
from megatron_swift.models.families.qwen2 import QWEN2
from megatron_swift.models.families.qwen2_moe import QWEN2_MOE
from megatron_swift.models.families.qwen3 import QWEN3
from megatron_swift.models.families.qwen3_moe import QWEN3_MOE
from megatron_swift.models.families.stablelm import STABLELM
from megatron_swift.models.families.starcoder2 import STARCODER2
from megatron_swift.utils.errors import CheckpointError, UsageError

_KNOWN = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, QWEN2_MOE, MIXTRAL, PHI3, STABLELM, STARCODER2, NATIVE)
FAMILIES = {family.name: family for family in _KNOWN}  # a new model is of the first that fits it

# Markers of a chat template, most particular first, for models whose folder name says nothing.
_TEMPLATE_MARKERS = (
    ("<|im_sep|>", "jinja"),  # Phi-4's: like ChatML at first sight, but not it
    ("You are Qwen, created by Alibaba Cloud", "qwen2_5"),
    ("<|im_start|>", "chatml"),
    ("Cutting Knowledge Date", "llama3_2"),
    ("<|start_header_id|>", "llama3"),
    ("<｜User｜>", "deepseek_r1"),
    ("[INST]", "llama"),
)


@dataclass(frozen=True)
class Described:
    """A model folder understood: family, configuration, model type, template, and why that template was taken."""

    family: Family
    config: ModelConfig
    model_type: str
    template: str
    reason: str


def describe(
    folder: Path,
    *,
    model_type: str | None,
    template: str | None,
    chat_template: str | None,
    extra: Sequence[Family] = (),
    hf: dict[str, Any] | None = None,
) -> Described:
    """Read config.json and settle family, model type and template; the user's own choices win.

    folder may be a snapshot whose name says nothing: the model type is then found by the markers of `chat_template`.
    extra : a user's own families, which go before ours.  hf: instead of the folder's config.json.
    Raises CheckpointError for an unsupported architecture and UsageError when the template cannot be told.
    """
    hf = read_json(folder / "config.json") if hf is None else hf
    architectures = hf.get("architectures") or []
    family = next((f for f in (*extra, *FAMILIES.values()) if set(f.architectures) & set(architectures)), None)
    if family is None:
        known = ", ".join(a for f in FAMILIES.values() for a in f.architectures)
        raise CheckpointError(
            f"{folder / 'config.json'}: architecture {architectures} is not supported", do=f"supported are {known}"
        )
    config = family.read_config(hf)
    if model_type is not None:
        chosen = next((t for t in family.model_types if t.name == model_type), None)
        if chosen is None and template is None:
            names = ", ".join(t.name for t in family.model_types)
            raise UsageError(
                f"--model_type {model_type} is not a model type of {architectures[0]}",
                do=f"use one of {names}, or give --template too",
            )
        return Described(
            family,
            config,
            model_type,
            template or _need(chosen).template,
            "as told by --template" if template else "as told by --model_type",
        )
    found = next((t for t in family.model_types if t.matches(folder.name)), None)
    if template is not None:
        return Described(family, config, found.name if found else family.name, template, "as told by --template")
    if found is not None:
        return Described(family, config, found.name, found.template, f"by the folder's name, {folder.name}")
    return _by_template(folder, family, config, chat_template, architectures[0])


def _by_template(
    folder: Path, family: Family, config: ModelConfig, chat_template: str | None, architecture: str
) -> Described:
    """Of a folder whose name says nothing."""
    for marker, name in _TEMPLATE_MARKERS:
        if chat_template and marker in chat_template:
            return Described(family, config, family.name, name, f"by {marker!r} in the model's chat template")
    if len({t.template for t in family.model_types}) == 1:
        only = family.model_types[0]
        return Described(family, config, only.name, only.template, f"the only one of {architecture}")
    names = ", ".join(f"{t.name} ({t.template})" for t in family.model_types)
    raise UsageError(
        f"cannot tell which chat template {folder} speaks",
        why="its folder name matches no model type and it has no chat template of its own",
        do=f"give --model_type, one of {names}, or --template" if names else "give --template",
    )


def _need(value: ModelType | None) -> ModelType:
    assert value is not None
    return value


def family_of(cfg: ModelConfig, first: Family | None = None) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """The architecture of a model made by flags: its family, the model with that one's names, and its config.json.

    first : the family to try before the others. The last one, NATIVE, takes every model; transformers does not know it.
    """
    for family in (*([first] if first else []), *FAMILIES.values()):
        if family.write_config is None:
            continue
        written = family.write_config(cfg)
        try:
            found = family.read_config(written)
        except CheckpointError:
            continue
        if _nameless(found) == _nameless(cfg):
            return family, found, written
    raise AssertionError(f"NATIVE does not take {cfg}")


def _nameless(cfg: ModelConfig) -> ModelConfig:
    return cfg.replace(names=LayerNames(), moe=cfg.moe and dataclasses.replace(cfg.moe, names=ExpertNames()))


__all__ = ["FAMILIES", "NATIVE", "Described", "Family", "ModelType", "describe", "family_of"]
