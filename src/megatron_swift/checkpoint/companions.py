"""What belongs to a model beside its weights: configuration, tokenizer, chat template. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_swift.utils.files import storage_errors

CONFIG = "config.json"
FOLDER = "huggingface"  # where a Megatron folder keeps its model's companions, so that it can be exported by itself
# Everything else in a model's folder (README, other formats, code) stays behind.
_PATTERNS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.tiktoken", "spiece.model", "LICENSE*"),
)


def copy_companions(source: Path, target: Path, *, config: bool) -> None:
    """Copy a model's companions byte for byte into `target`, which is made; `config` says whether config.json goes along."""
    patterns = (CONFIG, *_PATTERNS) if config else _PATTERNS
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            for path in sorted(source.glob(pattern)):
                if path.is_file() and not path.name.endswith(".safetensors"):
                    shutil.copyfile(path, target / path.name)
