"""What a model family has to say: its architectures, how its config.json is read, and which templates its chat models speak."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_swift.models.config import ModelConfig


@dataclass(frozen=True)
class ModelType:
    """A name users give as `--model_type`, the chat template it speaks, and the pattern that finds it in a model's folder name."""

    name: str
    template: str
    pattern: str

    def matches(self, folder_name: str) -> bool:
        """Whether the last path component of a model folder or hub id belongs to this type."""
        return re.search(self.pattern, folder_name, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Family:
    """One architecture. model_types are tried in order; the first that matches a folder's name wins.

    write_config : the config.json of a model of this architecture. It need not look whether the model is one: what `read_config` makes of
                   its answer tells. None where no model is made anew in this architecture.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[ModelType, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]] | None = None
