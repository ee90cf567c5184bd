"""Rows that are chosen before training and encoded when they are asked for: an index on disk instead of encoded rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_swift.data.cache import build_once, default_cache_dir
from megatron_swift.data.choice import choose
from megatron_swift.data.chunks import Fault, Index, Rows, conversation_json, encode_chunk, encoder, refusal
from megatron_swift.data.ingredients import OPTIONS
from megatron_swift.data.messages import RowError
from megatron_swift.data.options import DataOptions, check_options
from megatron_swift.data.readers import Spans, TextFile
from megatron_swift.data.registry import Identity
from megatron_swift.data.sources import Source, Table
from megatron_swift.data.stamps import ends_hash, hash_values
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

LAZY_VERSION = 1  # raise it when the same input gives other rows
SKIP_HINT = "use --strict false to have the next row in its place"
SAID = 3  # rows replaced by others that are shown, for each process


class OnDisk(Spans):
    """The spans of a file with memory-mapped arrays. Sent to another process as the files' names."""

    place: str

    def __reduce__(self) -> tuple:
        return (open_spans, (self.place, self.style))


def open_spans(place: str, style: str) -> OnDisk:
    """The spans that lie under this name."""
    starts, stops, numbers = (_mapped(f"{place}.{name}.npy") for name in ("starts", "stops", "numbers"))
    spans = OnDisk(starts, stops, numbers, style)
    spans.place = place
    return spans


def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r" if Path(path).stat().st_size > 128 else None, allow_pickle=False)


class Numbers:
    """Row numbers, memory-mapped, int64 [n]. Sent to another process as the name of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, _mapped(str(path))

    def __reduce__(self) -> tuple:
        return (Numbers, (self.path,))


class LazyRows:
    """One sample a row, encoded when it is asked for. May be sent to another process.

    A row that cannot be used is an error where rows must be good; elsewhere the next one that can be used stands in its place, the same
    one at any time.
    """

    def __init__(self, rows: Rows, numbers: Numbers, options: DataOptions, tokenizer: Tokenizer) -> None:
        self.rows, self.numbers, self.options, self.tokenizer = rows, numbers, options, tokenizer
        self.replaced = 0
        assert not isinstance(options.template, str)
        self._encode = encoder(options, options.template, tokenizer)

    def __len__(self) -> int:
        return len(self.numbers.array)

    def row(self, index: int) -> list[Sample]:
        """The sample of row `index`. DataError names file and line of a row that cannot be used, or says that none can."""
        for step in range(len(self)):
            number = int(self.numbers.array[(index + step) % len(self)])
            encoded = encode_chunk(self.rows, self._encode, np.array([number]))
            if not encoded.faults:
                return [Sample(encoded.ids, encoded.labels, encoded.weights)]
            self._note(encoded.faults[0])
        raise DataError("no row of the data set is left to train on", do="look at the reasons above")

    def _note(self, fault: Fault) -> None:
        text = f"{self.rows.where(fault.number)}: {fault.text}"
        do = refusal(fault, self.options, skip=SKIP_HINT)
        if do is not None:
            raise DataError(text, do=do)
        self.replaced += 1
        if self.replaced <= SAID:
            more = ", …" if self.replaced == SAID else ""
            get_logger().warning("the next row stands in for %s%s", text, more)


@dataclass(frozen=True)
class Lazy:
    """What `open_lazy` found.

    fingerprint : of data, options and tokenizer.  rows_read: rows of each data set.
    val_rows    : where validation was split off, its rows as {"messages": [...]}, in order; else [].
    """

    train: LazyRows
    val: LazyRows | None
    fingerprint: str
    rows_read: dict[str, int]
    val_rows: list[dict[str, Any]]


def open_lazy(
    options: DataOptions, tokenizer: Tokenizer, sources: Sequence[Source], val_sources: Sequence[Source]
) -> Lazy:
    """Index the files and choose rows, as `prepare` does where all rows are good. No row is read.

    The index lies in the cache, where the ranks of this run map it; it is made anew each time, for it is quickly made.
    """
    check_options(options)
    identity = Identity(options.model_name, options.model_author)
    tables = [Table(source, identity=identity) for source in (*sources, *val_sources)]
    rows = Rows(tables, options.columns)
    usable = [np.arange(start, stop) for start, stop in zip(rows.starts[:-1], rows.starts[1:], strict=True)]
    counts: dict[str, int] = {}
    for table, found in zip(tables, usable, strict=True):
        value = table.source.request.value
        counts[value] = counts.get(value, 0) + len(found)
        if not len(found):
            raise DataError(f"data set {value} has no usable row", why="it is empty")
    chosen = dict(zip(("train", "val"), choose(options, sources, val_sources, usable), strict=True))
    fingerprint = _fingerprint(options, tokenizer, [*sources, *val_sources])
    files = {str(number): file for number, file in enumerate(file for table in tables for file in table.files)}
    texts = {place: file for place, file in files.items() if isinstance(file, TextFile)}
    cache = options.cache_dir or default_cache_dir()
    folder = build_once(
        cache, fingerprint, build=partial(_write, texts, chosen), check=lambda folder: None, use_cache=False
    ).folder
    for place, file in texts.items():
        file.spans = open_spans(str(folder / place), file.spans.style)
    train, val = (Numbers(folder / f"{name}.npy") for name in chosen)
    val_rows = LazyRows(rows, val, options, tokenizer) if len(val.array) else None
    split = [] if val_sources else chosen["val"].tolist()
    return Lazy(LazyRows(rows, train, options, tokenizer), val_rows, fingerprint, counts, _readable(rows, split))


def _readable(rows: Rows, numbers: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for number in numbers:
        with contextlib.suppress(RowError):  # said when it is evaluated on
            found.append(conversation_json(rows.read(number)))
    return found


def _write(texts: Mapping[str, TextFile], chosen: Mapping[str, Index], folder: Path) -> None:
    for place, file in texts.items():
        for name in ("starts", "stops", "numbers"):
            np.save(folder / f"{place}.{name}.npy", getattr(file.spans, name))
    for name, numbers in chosen.items():
        np.save(folder / f"{name}.npy", numbers)


def _fingerprint(options: DataOptions, tokenizer: Tokenizer, sources: Sequence[Source]) -> str:
    parts = {
        "lazy": LAZY_VERSION,
        "files": [[path.suffix.lower(), *ends_hash(path)] for source in sources for path in source.paths],
        "sets": [[source.request.limit, [subset.name for _, subset in source.parts]] for source in sources],
        "tokenizer": [tokenizer.fingerprint(), tokenizers.__version__],
        "options": {name: getattr(options, name) for name in OPTIONS if name != "packing"},
        "template": repr(options.template),
        "columns": sorted(options.columns.items()),
    }
    return f"lazy-{hash_values(parts)}"
