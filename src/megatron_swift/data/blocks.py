"""Files cut into blocks that can be read each for itself, so that no reader must have seen what comes before its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_swift.data.readers import RowFile, Stamp, changed, open_file, parse_json, parse_line
from megatron_swift.data.registry import Fixup, Row
from megatron_swift.data.sources import Source

LARGEST = 1 << 22  # bytes of text in a block
SMALLEST = 1 << 10
GUESS = 2048  # bytes of a row of a file without lines, for what is held in memory
ROWS = 1000  # rows in a block of a file that has no lines to look for
LINES: Mapping[str, Callable[[bytes], Row]] = {".jsonl": parse_json, ".txt": parse_line}


class Item(NamedTuple):
    """A row that was found: how to make it, which raises RowError where it is malformed, where it stands, and about how many bytes it has."""

    make: Callable[[], Row]
    where: Callable[[], str]
    size: int


@dataclass(frozen=True)
class Part:
    """One file as read for one data set. stop: how far it is read, in bytes (of lines) or rows (of the other kinds)."""

    path: Path
    fixup: Fixup
    stamp: Stamp
    stop: int

    @property
    def by_lines(self) -> bool:
        """Whether blocks are ranges of bytes, not of rows."""
        return self.path.suffix.lower() in LINES


@dataclass(frozen=True)
class Blocks:
    """The blocks of a data set, numbered through.

    size   : of a block of lines, in bytes.
    rows   : of a block of any other file, in rows.
    starts : for each part the number of its first block, then the number of all blocks.
    """

    parts: tuple[Part, ...]
    size: int
    rows: int
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, number: int) -> Iterator[tuple[Item, Fixup]]:
        """The rows of block `number`, in order. DataError where the file is no longer what it was."""
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        part, inner = self.parts[at], number - self.starts[at]
        step = self.size if part.by_lines else self.rows
        start, stop = inner * step, min((inner + 1) * step, part.stop)
        items = _lines(part, start, stop) if part.by_lines else _rows(part, start, stop)
        return ((item, part.fixup) for item in items)


def cut(sources: Sequence[Source], *, at_least: int) -> Blocks:
    """The blocks of these files, about `at_least` of them or more where the files are long enough.

    A file of lines is neither read nor indexed for it; a file of another kind is opened. A data set's `#N` leaves its
    first N rows, which costs reading up to there.
    """
    parts = [part for source in sources for part in _parts(source)]
    lines = [part.stop for part in parts if part.by_lines]
    counted = [part.stop for part in parts if not part.by_lines]
    size = min(max(sum(lines) // at_least, SMALLEST), LARGEST)
    rows = min(max(sum(counted) // at_least, 1), ROWS)
    counts = [-(-part.stop // (size if part.by_lines else rows)) for part in parts]
    return Blocks(tuple(parts), size, rows, (0, *np.cumsum(counts, dtype=np.int64).tolist()))


def _parts(source: Source) -> Iterator[Part]:
    left = source.request.limit
    for path, subset in source.parts:
        if left == 0:
            return
        stamp = Stamp.of(path)
        if path.suffix.lower() in LINES:
            stop, found = _limited(path, stamp.size, left)
        else:
            total = len(_opened(path, stamp))
            stop = found = total if left is None else min(left, total)
        left = None if left is None else left - found
        yield Part(path, subset.fixup, stamp, stop)


def _limited(path: Path, size: int, limit: int | None) -> tuple[int, int]:
    """Where the first `limit` lines that are not blank end, in bytes, and how many there are."""
    if limit is None:
        return size, 0
    found = offset = 0
    with path.open("rb") as file:
        for line in file:
            offset += len(line)
            found += bool(line.strip())
            if found == limit:
                break
    return offset, found


@lru_cache(maxsize=16)
def _opened(path: Path, stamp: Stamp) -> RowFile:
    """A file that must be opened whole to find its rows, once for all readers of this process."""
    if Stamp.of(path) != stamp:
        raise changed(path)
    return open_file(path)


def _rows(part: Part, start: int, stop: int) -> Iterator[Item]:
    file = _opened(part.path, part.stamp)
    for index in range(start, stop):
        yield Item(lambda index=index: file.read(index), lambda index=index: file.where(index), GUESS)  # type: ignore[misc]


def _lines(part: Part, start: int, stop: int) -> Iterator[Item]:
    """The lines that begin in [start, stop), blank ones left out."""
    if Stamp.of(part.path) != part.stamp:
        raise changed(part.path)
    parse = LINES[part.path.suffix.lower()]
    with part.path.open("rb") as file:
        offset = 0
        if start:
            file.seek(start - 1)
            offset = start - 1 + len(file.readline())  # the end of a line that began before, or just its line end
        while offset < stop:
            line = file.readline()
            if not line:
                raise changed(part.path)
            raw = line.removesuffix(b"\n")
            if raw.strip():
                yield Item(
                    lambda raw=raw: parse(raw),  # type: ignore[misc]
                    lambda offset=offset: f"{part.path}:{_line_number(part.path, offset)}",  # type: ignore[misc]
                    len(raw),
                )
            offset += len(line)


def _line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at this byte, from 1. It reads all of the file before: for messages only."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(LARGEST, offset))):
            number += block.count(b"\n")
            offset -= len(block)
    return number
