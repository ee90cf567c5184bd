"""Data sets to encoded, packed rows on disk: `prepare`. Runs before torch is imported, once per run and not per rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

from megatron_swift.data.build import OUTCOME, VAL_ROWS, Builder
from megatron_swift.data.cache import (
    Damaged,
    PackedRows,
    build_once,
    default_cache_dir,
    file_checksum,
    read_checked,
    write_checked,
)
from megatron_swift.data.ingredients import INGREDIENTS, explain_miss, key_of, list_ingredients
from megatron_swift.data.lines import LineFile
from megatron_swift.data.options import DataOptions, check_options
from megatron_swift.data.readers import Stamp
from megatron_swift.data.report import Report
from megatron_swift.data.sources import Source, find_source, make_lookup
from megatron_swift.data.stamps import hash_files
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample
from megatron_swift.utils.log import get_logger

HASHES = "hashes"  # the folder in the cache that remembers the hashes of source files


class SplitRows(Sequence[dict[str, Any]]):
    """Validation rows that were split off, as {"messages": [...]}, read from disk when asked."""

    def __init__(self, path: Path | None) -> None:
        self._file = LineFile(path, json.loads) if path is not None else None

    def __len__(self) -> int:
        return len(self._file) if self._file is not None else 0

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._file is None or not 0 <= index < len(self._file):
            raise IndexError(index)
        return self._file.read(index)


class Prepared(NamedTuple):
    """Data that is ready to train on.

    train, val : the rows; val is None where there is no validation.
    report     : what became of the rows.
    val_rows   : where validation was split off, its rows as {"messages": [...]}, in order; else none.
    first      : the first training sample, to show.
    folder     : where it lies; `open_prepared(folder)` opens it in another process.
    """

    train: PackedRows
    val: PackedRows | None
    report: Report
    val_rows: Sequence[dict[str, Any]]
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
    sources, val_sources = find_sources(options)
    stamps = {path: Stamp.of(path) for source in (*sources, *val_sources) for path in source.paths}
    cache_dir = options.cache_dir or default_cache_dir()
    digests = [hash_files(source.paths, remembered=cache_dir / HASHES) for source in (*sources, *val_sources)]
    ingredients = list_ingredients(options, tokenizer, template, (*sources, *val_sources), digests)
    builder = Builder(options, tokenizer, template, sources, val_sources, stamps)

    def build(staging: Path) -> None:
        builder.build(staging)
        write_checked(staging / INGREDIENTS, ingredients)

    entry = build_once(
        cache_dir,
        key_of(ingredients),
        build=build,
        check=_check_entry,
        use_cache=options.use_cache and options.download_mode == "reuse_dataset_if_exists",
        why=partial(explain_miss, cache_dir, ingredients),
    )
    return open_prepared(entry.folder)


def find_sources(options: DataOptions, *, streaming: bool = False) -> tuple[list[Source], list[Source]]:
    """The files behind --dataset, those at a hub left there if streaming, and behind --val_dataset; raises as `find_source` does."""
    lookup = make_lookup(
        use_hf=options.use_hf,
        hub_token=options.hub_token,
        download_mode=options.download_mode,
        custom_dataset_info=options.custom_dataset_info,
        custom_register_path=options.custom_register_path,
    )
    sources = [find_source(value, lookup=lookup, streaming=streaming) for value in options.dataset]
    val_sources = [find_source(value, lookup=lookup, flag="--val_dataset") for value in options.val_dataset]
    if any(source.needs_identity for source in (*sources, *val_sources)):
        for flag, values in (("model_name", options.model_name), ("model_author", options.model_author)):
            if not values:
                get_logger().warning("--%s is not given: its place in the self-cognition rows stays as it is", flag)
    return sources, val_sources


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`; Damaged where it is not whole."""
    outcome = read_checked(folder / OUTCOME)
    train = PackedRows(folder / "train")
    val = PackedRows(folder / "val") if outcome["has_val"] else None
    report = Report.from_json(outcome["report"])
    rows = folder / VAL_ROWS if outcome["val_rows"] is not None else None
    if rows is not None and not rows.is_file():
        raise Damaged(f"{rows} is missing")
    return Prepared(train, val, report, SplitRows(rows), train.row(0)[0], folder)


def _check_entry(folder: Path) -> None:
    prepared = open_prepared(folder)
    for rows in (prepared.train, prepared.val):
        if rows is not None:
            rows.check()
            if not len(rows):
                raise Damaged(f"{rows.folder} is empty")
    checksum = read_checked(folder / OUTCOME)["val_rows"]
    if checksum is not None and file_checksum(folder / VAL_ROWS) != checksum:
        raise Damaged(f"{folder / VAL_ROWS} has changed")


__all__ = ["DataOptions", "Prepared", "open_prepared", "prepare"]
