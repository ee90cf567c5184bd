"""Data sets to encoded, packed rows on disk: `prepare`. Runs before torch is imported, once per run and not per rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from megatron_swift.data.build import OUTCOME, Builder
from megatron_swift.data.cache import Damaged, PackedRows, build_once, default_cache_dir, read_checked
from megatron_swift.data.options import DataOptions, check_options
from megatron_swift.data.readers import Stamp
from megatron_swift.data.report import Report
from megatron_swift.data.sources import Source, find_source, hash_files, make_lookup
from megatron_swift.data.template import Template
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample
from megatron_swift.utils.log import get_logger

CODE_VERSION = 2  # raise it when the same input gives other rows: old caches are then not used


class Prepared(NamedTuple):
    """Data that is ready to train on.

    train, val : the rows; val is None where there is no validation.
    report     : what became of the rows.
    val_rows   : where validation was split off, its rows as {"messages": [...]}, in order; else [].
    first      : the first training sample, to show.
    folder     : where it lies; `open_prepared(folder)` opens it in another process.
    """

    train: PackedRows
    val: PackedRows | None
    report: Report
    val_rows: list[dict[str, Any]]
    first: Sample
    folder: Path


def prepare(options: DataOptions, tokenizer: Tokenizer) -> Prepared:
    """The rows that the options ask for, from the cache or newly encoded.

    The result depends on the files' content, the options and the tokenizer, never on dataset_num_proc. DataError names
    file and line of a bad row when strict, and says what became of the rows when none is left; UsageError for options
    that cannot work.
    """
    check_options(options)
    template = get_template(options.template) if isinstance(options.template, str) else options.template
    lookup = make_lookup(
        use_hf=options.use_hf,
        hub_token=options.hub_token,
        download_mode=options.download_mode,
        custom_dataset_info=options.custom_dataset_info,
        custom_register_path=options.custom_register_path,
    )
    sources = [find_source(value, lookup=lookup) for value in options.dataset]
    val_sources = [find_source(value, lookup=lookup, flag="--val_dataset") for value in options.val_dataset]
    if any(source.needs_identity for source in (*sources, *val_sources)):
        for flag, values in (("model_name", options.model_name), ("model_author", options.model_author)):
            if not values:
                get_logger().warning("--%s is not given: its place in the self-cognition rows stays as it is", flag)
    stamps = {path: Stamp.of(path) for source in (*sources, *val_sources) for path in source.paths}
    key = _cache_key(options, tokenizer, template, sources, val_sources)
    builder = Builder(options, tokenizer, template, sources, val_sources, stamps)
    entry = build_once(
        options.cache_dir or default_cache_dir(),
        key,
        build=builder.build,
        check=_check_entry,
        use_cache=options.use_cache and options.download_mode == "reuse_dataset_if_exists",
    )
    return open_prepared(entry.folder)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`; Damaged where it is not whole."""
    outcome = read_checked(folder / OUTCOME)
    train = PackedRows(folder / "train")
    val = PackedRows(folder / "val") if outcome["has_val"] else None
    report = Report.from_json(outcome["report"])
    return Prepared(train, val, report, outcome["val_rows"], train.row(0)[0], folder)


def _check_entry(folder: Path) -> None:
    prepared = open_prepared(folder)
    for rows in (prepared.train, prepared.val):
        if rows is not None:
            rows.check()
            if not len(rows):
                raise Damaged(f"{rows.folder} is empty")


def _cache_key(
    options: DataOptions,
    tokenizer: Tokenizer,
    template: Template,
    sources: Sequence[Source],
    val_sources: Sequence[Source],
) -> str:
    """A hash of all that decides the rows."""

    def describe(source: Source) -> list[Any]:
        entry = source.registered
        place = {path: number for number, path in enumerate(source.paths)}
        parts = [(place[path], path.suffix.lower(), subset.name) for path, subset in source.parts]
        fixups = [entry.names[0], entry.fingerprint] if entry else []
        return [hash_files(source.paths), parts, fixups, source.request.limit]

    parts = {
        "code": CODE_VERSION,
        "sources": [describe(source) for source in sources],
        "val_sources": [describe(source) for source in val_sources],
        "tokenizer": [tokenizer.fingerprint(), tokenizers.__version__],
        "template": repr(template),
        "options": {
            name: getattr(options, name)
            for name in (
                *("split_dataset_ratio", "data_seed", "dataset_shuffle", "val_dataset_shuffle", "strict", "model_name"),
                *("model_author", "system", "max_length", "truncation", "loss_scale", "packing", "interleave_prob"),
                "stopping_strategy",
            )
        },
        "columns": sorted(options.columns.items()),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


__all__ = ["DataOptions", "Prepared", "open_prepared", "prepare"]
