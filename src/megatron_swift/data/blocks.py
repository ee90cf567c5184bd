"""Files cut into blocks that can be read each for itself, so that no reader must have seen what comes before its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from megatron_swift.data.readers import (
    GLANCE,
    RowFile,
    Stamp,
    changed,
    group_sizes,
    holds_lines,
    open_file,
    parse_json,
    parse_line,
    read_group,
)
from megatron_swift.data.registry import Fixup, Row
from megatron_swift.data.remote import AnyFile, RemoteFile, stamp_of
from megatron_swift.data.sources import Source

LARGEST = 1 << 22  # bytes of text in a block
SMALLEST = 1 << 10
GUESS = 2048  # bytes of a row of a file without lines, for what is held in memory
ROWS = 1000  # rows in a block of a file that has no lines to look for
GROUPED = (
    8  # times fewer blocks of Parquet files are enough: to read the middle of a row group is to read its beginning, too
)
AT_ONCE = 16  # ends of Parquet files at a hub
LINES: Mapping[str, Callable[[bytes], Row]] = {".jsonl": parse_json, ".json": parse_json, ".txt": parse_line}

Kind = Literal["lines", "groups", "rows"]


class Item(NamedTuple):
    """A row that was found: how to make it, which raises RowError where it is malformed, where it stands, and about how many bytes it has."""

    make: Callable[[], Row]
    where: Callable[[], str]
    size: int


@dataclass(frozen=True)
class Part:
    """One file as read for one data set.

    kind  : what its blocks are made of: bytes of lines, rows of one Parquet row group, or rows of anything else.
    stop  : how far it is read, in bytes (of lines) or rows (of the other kinds).
    edges : of a Parquet file, the rows at which its row groups begin, then all rows; then those at which blocks do.
    """

    file: AnyFile
    fixup: Fixup
    stamp: Stamp
    kind: Kind
    stop: int
    groups: tuple[int, ...] = ()
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """The blocks of a data set, numbered through.

    size   : of a block of lines, in bytes.
    rows   : of a block of any other file, in rows; no block has rows of two Parquet row groups.
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
        if part.kind == "groups":
            items = _grouped(part, part.edges[inner], part.edges[inner + 1])
        else:
            step = self.size if part.kind == "lines" else self.rows
            start, stop = inner * step, min((inner + 1) * step, part.stop)
            items = _lines(part, start, stop) if part.kind == "lines" else _rows(part, start, stop)
        return ((item, part.fixup) for item in items)


def cut(sources: Sequence[Source], *, at_least: int) -> Blocks:
    """The blocks of these files, about `at_least` of them or more where the files are long enough.

    A file of lines is neither read nor indexed for it; of a Parquet file the end is read; a file of another kind is
    opened. A data set's `#N` leaves its first N rows, which costs reading lines up to there.
    """
    parts = [part for source in sources for part in _parts(source)]
    lines = sum(part.stop for part in parts if part.kind == "lines")
    rows = sum(part.stop for part in parts if part.kind == "rows")
    grouped = sum(part.stop for part in parts if part.kind == "groups")
    size = min(max(lines // at_least, SMALLEST), LARGEST)
    step = min(max(rows // at_least, 1), ROWS)
    enough = max(grouped // max(at_least // GROUPED, 1), 1)
    parts = [replace(part, edges=_edges(part, enough)) if part.kind == "groups" else part for part in parts]
    counts = [_count(part, size, step) for part in parts]
    return Blocks(tuple(parts), size, step, (0, *np.cumsum(counts, dtype=np.int64).tolist()))


def _count(part: Part, size: int, rows: int) -> int:
    if part.kind == "groups":
        return len(part.edges) - 1
    return -(-part.stop // (size if part.kind == "lines" else rows))


def _edges(part: Part, rows: int) -> tuple[int, ...]:
    """Where blocks begin, and the end of the last one: each row group by itself, in parts of about `rows` rows."""
    edges = [0]
    for begin, end in zip(part.groups, part.groups[1:], strict=False):
        end = min(end, part.stop)
        pieces = max(round((end - begin) / rows), 1)
        edges += [begin + (end - begin) * piece // pieces for piece in range(1, pieces + 1) if end > begin]
    return tuple(dict.fromkeys(edges))


def _parts(source: Source) -> Iterator[Part]:
    left = source.request.limit
    sizes = _group_sizes(source)
    for file, subset in source.files:
        if left == 0:
            return
        stamp, kind = stamp_of(file), _kind(file)
        groups: tuple[int, ...] = ()
        if kind == "lines":
            stop, found = _limited(file, stamp.size, left)
        else:
            if kind == "groups":
                groups = (0, *np.cumsum(sizes.get(file) or group_sizes(file), dtype=np.int64).tolist())
                total = groups[-1]
            else:
                assert isinstance(file, Path)
                total = len(_opened(file, stamp))
            stop = found = total if left is None else min(left, total)
        left = None if left is None else left - found
        yield Part(file, subset.fixup, stamp, kind, stop, groups)


def _kind(file: AnyFile) -> Kind:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return "groups"
    if suffix not in LINES:
        return "rows"
    if suffix != ".json" or isinstance(file, RemoteFile):  # at a hub an array is never left to be read here
        return "lines"
    with _open(file, 0, GLANCE) as opened:
        return "lines" if holds_lines(opened.read(GLANCE)) else "rows"


def _group_sizes(source: Source) -> dict[AnyFile, tuple[int, ...]]:
    """Of Parquet files, where all of them are wanted; several at once, for at a hub there may be thousands."""
    files = [file for file, _ in source.files if _kind(file) == "groups"]
    if source.request.limit is not None or not files:
        return {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(files, pool.map(group_sizes, files), strict=True))


def _open(file: AnyFile, start: int, stop: int) -> BinaryIO:
    """A file to be read between these bytes, and a little further."""
    return file.open(start, stop) if isinstance(file, RemoteFile) else file.open("rb")


def _limited(file: AnyFile, size: int, limit: int | None) -> tuple[int, int]:
    """Where the first `limit` lines that are not blank end, in bytes, and how many there are."""
    if limit is None:
        return size, 0
    found = offset = 0
    with _open(file, 0, size) as opened:
        for line in opened:
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
    assert isinstance(part.file, Path)
    file = _opened(part.file, part.stamp)
    for index in range(start, stop):
        yield Item(lambda index=index: file.read(index), lambda index=index: file.where(index), GUESS)  # type: ignore[misc]


def _grouped(part: Part, start: int, stop: int) -> Iterator[Item]:
    """Rows [start, stop), which are of one row group."""
    group = bisect_right(part.groups, start) - 1
    rows = read_group(part.file, part.stamp, group=group, start=start - part.groups[group])
    for index, row in enumerate(islice(rows, stop - start), start):
        yield Item(lambda row=row: row, lambda index=index: f"{part.file}[{index}]", len(str(row)))  # type: ignore[misc]


def _lines(part: Part, start: int, stop: int) -> Iterator[Item]:
    """The lines that begin in [start, stop), blank ones left out."""
    if stamp_of(part.file) != part.stamp:
        raise changed(part.file)
    parse = LINES[part.file.suffix.lower()]
    begin = max(start - 1, 0)
    with _open(part.file, begin, stop) as file:
        file.seek(begin)
        # The end of a line that began before, or just its line end.
        offset = begin + len(file.readline()) if start else 0
        while offset < stop:
            line = file.readline()
            if not line:
                raise changed(part.file)
            raw = line.removesuffix(b"\n")
            if raw.strip():
                yield Item(
                    lambda raw=raw: parse(raw),  # type: ignore[misc]
                    lambda offset=offset: _where(part.file, offset),  # type: ignore[misc]
                    len(raw),
                )
            offset += len(line)


def _where(file: AnyFile, offset: int) -> str:
    """File and line for people; at a hub the byte, for to count lines is to fetch all that comes before."""
    return f"{file} at byte {offset}" if isinstance(file, RemoteFile) else f"{file}:{_line_number(file, offset)}"


def _line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at this byte, from 1. It reads all of the file before: for messages only."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(LARGEST, offset))):
            number += block.count(b"\n")
            offset -= len(block)
    return number
