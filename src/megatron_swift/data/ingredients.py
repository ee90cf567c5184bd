"""All that decides the prepared rows: the key of a cache entry, and why an entry was not found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_swift.data.cache import Damaged, read_checked
from megatron_swift.data.options import DataOptions
from megatron_swift.data.sources import Source
from megatron_swift.data.stamps import hash_values
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer

CODE_VERSION = 3  # raise it when the same input gives other rows or files: old caches are then not used
INGREDIENTS = "ingredients.json"
COMPARED = 200  # entries of the cache that a miss is compared with, newest first
SHOWN = 40  # characters of a value in a message
OPTIONS = (
    *("split_dataset_ratio", "data_seed", "dataset_shuffle", "val_dataset_shuffle", "strict", "model_name"),
    *("model_author", "system", "max_length", "truncation", "loss_scale", "packing", "interleave_prob"),
    "stopping_strategy",
)
PLAIN = {"code": "this version of the program", "tokenizer": "the tokenizer", "template": "the template"}
FLAGS = {"truncation": "truncation_strategy"}


def list_ingredients(
    options: DataOptions,
    tokenizer: Tokenizer,
    template: Template,
    sources: Sequence[Source],
    digests: Sequence[str],
) -> dict[str, Any]:
    """Name -> value, plain values only. `names` is not among what decides: it tells which entries are of the same data.

    sources : the data sets, then those of validation. digests : of each one's files.
    """

    def describe(source: Source) -> list[Any]:
        entry = source.registered
        place = {path: number for number, path in enumerate(source.paths)}
        parts = [(place[path], path.suffix.lower(), subset.name) for path, subset in source.parts]
        # 100,000 files of one kind need no list that is longer than their names
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
        fixups = [entry.names[0], entry.fingerprint] if entry else []
        return [digest, fixups, source.request.limit]

    values: dict[str, Any] = {
        "code": CODE_VERSION,
        "sets": [len(options.dataset), len(options.val_dataset)],
        "files": list(digests),
        "kinds": [describe(source) for source in sources],
        "tokenizer": [tokenizer.fingerprint(), tokenizers.__version__],
        "template": repr(template),
        "columns": sorted(options.columns.items()),
        **{name: getattr(options, name) for name in OPTIONS},
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists, as they will be when read again
    return {"names": [*options.dataset, *options.val_dataset], "values": plain}


def key_of(ingredients: dict[str, Any]) -> str:
    """The name of the cache entry."""
    return hash_values(ingredients["values"])


def explain_miss(cache_dir: Path, ingredients: dict[str, Any]) -> str:
    """What differs from the newest entry for data sets of the same names."""
    entries = sorted(cache_dir.glob(f"*/{INGREDIENTS}"), key=_age, reverse=True)
    for path in entries[:COMPARED]:
        try:
            other = read_checked(path)
        except Damaged:
            continue
        if other["names"] == ingredients["names"]:
            changes = _changes(other, ingredients)
            return f"compared with the last entry for this data, {', '.join(changes)} changed"
    return "there is no entry for this data yet"


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # another run has just replaced it
        return 0


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = []
    for name, value in new["values"].items():
        before = old["values"].get(name)
        if before == value:
            continue
        if name in ("files", "kinds"):
            pairs = zip(new["names"], before or [], value, strict=False)
            which = [said for said, one, other in pairs if one != other]
            what = "the content of" if name == "files" else "how to read"
            changes.append(f"{what} {' '.join(which) or 'the files'}")
        elif name in PLAIN:
            changes.append(PLAIN[name])
        else:
            changes.append(f"--{FLAGS.get(name, name)} ({_short(before)} -> {_short(value)})")
    return changes


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
