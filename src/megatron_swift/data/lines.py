"""Files whose rows are lines, of any length: the index holds a few numbers for 64 KiB of text, not for each line."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_swift.data.registry import Row
from megatron_swift.data.stamps import Stamp, changed
from megatron_swift.utils.errors import DataError

BLOCK = 1 << 22  # bytes read at a time
GROUP = 1 << 16  # rows that begin within so many bytes are found together
BLANK = 64  # a blank line longer than that is an error row


class Groups(NamedTuple):
    """Runs of rows that are read together.

    offsets : int64 [groups + 1], the byte at which each begins; the last one is the end of the file.
    rows    : int64 [groups + 1], the number of its first row; the last one is the number of rows.
    lines   : int64 [groups], the number of its first line, from 1.
    """

    offsets: np.ndarray
    rows: np.ndarray
    lines: np.ndarray


class LineFile:
    """A RowFile: each line that is not blank is a row. parse : bytes of a row -> the row; raises RowError."""

    def __init__(self, path: Path, parse: Callable[[bytes], Row]) -> None:
        self.path, self.parse, self.stamp = path, parse, Stamp.of(path)
        self.groups = index_groups(path)
        self._forget()

    def _forget(self) -> None:
        self._file: int | None = None
        self._group = -1
        self._lines: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return int(self.groups.rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "parse": self.parse, "stamp": self.stamp, "groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file and of what was read. The next `read` opens it again."""
        if self._file is not None:
            os.close(self._file)
        self._forget()

    def read(self, index: int) -> Row:
        """Row `index`. Rows near each other in the file are read at once."""
        return self.parse(self._find(index)[1])

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.path}:{self._find(index)[0]}"

    def _find(self, index: int) -> tuple[int, bytes]:
        group = self._group
        rows = self.groups.rows
        if not (group >= 0 and rows[group] <= index < rows[group + 1]):
            self._lines, self._group = [], -1
            group = bisect_right(rows, index) - 1
            self._lines = self._read_group(group)
            self._group = group
        elif self._now() != self.stamp:
            raise changed(self.path)
        return self._lines[index - int(rows[group])]

    def _now(self) -> Stamp:
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read", why=str(error)) from error
        now = os.fstat(self._file)
        return Stamp(now.st_size, now.st_mtime_ns, now.st_ino)

    def _read_group(self, group: int) -> list[tuple[int, bytes]]:
        """The rows of a group with the numbers of their lines."""
        begin, end = (int(offset) for offset in self.groups.offsets[group : group + 2])
        self._now()
        assert self._file is not None
        raw = os.pread(self._file, end - begin, begin)
        if self._now() != self.stamp or len(raw) != end - begin:
            raise changed(self.path)
        lines = raw.removesuffix(b"\n").split(b"\n")
        first = int(self.groups.lines[group])
        return [(first + at, line) for at, line in enumerate(lines) if len(line) >= BLANK or line.strip()]


def index_groups(path: Path) -> Groups:
    """The groups of a file of lines."""
    offsets: list[int] = []
    rows: list[int] = []
    lines: list[int] = []
    size = num_rows = num_lines = start = 0  # start: where the line begins that the block begins in
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            stops = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size
            size += len(block)
            if not block and start < size:
                stops = np.array([size], np.int64)  # the last line has no line end
            if len(stops):
                starts = np.concatenate([np.array([start], np.int64), stops[:-1] + 1])
                keep = _not_blank(file.fileno(), starts, stops)
                first = starts[keep]
                bucket = first // GROUP
                fresh = np.flatnonzero(np.diff(bucket, prepend=offsets[-1] // GROUP if offsets else -1))
                offsets += first[fresh].tolist()
                rows += (num_rows + fresh).tolist()
                lines += (num_lines + 1 + np.flatnonzero(keep)[fresh]).tolist()
                num_rows, num_lines, start = num_rows + len(first), num_lines + len(stops), int(stops[-1]) + 1
            if not block:
                break
    ends = np.array([*offsets, size], np.int64)
    return Groups(ends, np.array([*rows, num_rows], np.int64), np.array(lines, np.int64))


def _not_blank(file: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    keep = stops > starts
    for at in np.flatnonzero(keep & (stops - starts < BLANK)):
        keep[at] = bool(os.pread(file, int(stops[at] - starts[at]), int(starts[at])).strip())
    return keep
