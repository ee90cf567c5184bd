"""Files of rows: lines of JSON, JSON arrays, CSV, plain text, Parquet. A file is indexed once and its rows are read when asked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_swift.data.lines import LineFile
from megatron_swift.data.messages import RowError
from megatron_swift.data.registry import Row
from megatron_swift.data.remote import AnyFile, RemoteFile, stamp_of
from megatron_swift.data.stamps import Stamp, changed
from megatron_swift.utils.errors import DataError, UsageError

GLANCE = 1 << 12  # bytes of a file's beginning that tell its kind
SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
PARQUET_BLOCK = 256  # rows turned into Python values at a time
PARQUET_BUFFER = 1 << 23  # bytes read ahead of a row group's columns, of all of them together


class RowFile(Protocol):
    """The rows of one file, read one by one. May be sent to another process."""

    path: Path
    stamp: Stamp

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """Row `index`; RowError where it is malformed, DataError where the file has changed since it was opened."""
        ...

    def where(self, index: int) -> str:
        """`file.jsonl:12` for a line, `file.json[11]` for an element."""
        ...

    def close(self) -> None:
        """Hold nothing open. The next `read` opens the file again."""
        ...


def open_file(path: Path) -> RowFile:
    """The rows of `path`, whose suffix is in READERS. DataError where the file cannot be read as what its suffix says."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=str(error)) from error
    if head.startswith(b"version https://git-lfs."):
        raise DataError(f"{path} is a placeholder of Git LFS, not the data", do="run `git lfs pull` in its folder")
    return READERS[path.suffix.lower()](path)


class Spans(NamedTuple):
    """The rows of one file of text.

    starts, stops : int64 [n], the bytes [start, stop) of each row.
    numbers       : int64 [n], the number that the user knows the row by.
    style         : how that number follows the file's name in a message: ":{}" for a line, "[{}]" for an element.
    """

    starts: np.ndarray
    stops: np.ndarray
    numbers: np.ndarray
    style: str


class TextFile:
    """A RowFile whose rows are ranges of bytes. parse : bytes of a row -> the row; raises RowError."""

    def __init__(self, path: Path, spans: Spans, parse: Callable[[bytes], Row], stamp: Stamp) -> None:
        self.path, self.spans, self.parse, self.stamp = path, spans, parse, stamp
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.spans.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. The next `read` opens it again."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def read(self, index: int) -> Row:
        """Row `index`."""
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read", why=str(error)) from error
        start = int(self.spans.starts[index])
        raw = os.pread(self._file, int(self.spans.stops[index]) - start, start)
        now = os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns, now.st_ino) != self.stamp:
            raise changed(self.path)
        return self.parse(raw)

    def where(self, index: int) -> str:
        """File and line or element."""
        return f"{self.path}{self.spans.style.format(int(self.spans.numbers[index]))}"


# --- lines and JSON --------------------------------------------------------------------------------------------------


def open_json(path: Path) -> RowFile:
    """The elements of a JSON array. A file that does not begin with [ is read as lines."""
    with path.open("rb") as file:
        head = file.read(GLANCE)
    return LineFile(path, parse_json) if holds_lines(head) else _open_array(path)


def holds_lines(head: bytes) -> bool:
    """Whether a .json file that begins so is read as lines, not as an array."""
    return head.removeprefix(BOM).lstrip(b" \t\r\n")[:1] not in (b"[", b"")


def _open_array(path: Path) -> RowFile:
    stamp = Stamp.of(path)
    spans = index_array(path)
    return TextFile(path, spans, parse_json, stamp) if spans is not None else LineFile(path, parse_json)


def index_array(path: Path) -> Spans | None:
    """Each element of a JSON array, numbered from 0; None for a file that does not begin with [."""
    raw = path.read_bytes()
    if not raw.removeprefix(BOM).lstrip(b" \t\r\n").startswith(b"["):
        return None
    try:
        text = raw.decode("utf-8")
        return _scan_array(text, ascii_only=len(text) == len(raw))
    except UnicodeDecodeError as error:
        line, why = raw.count(b"\n", 0, error.start) + 1, "it is not UTF-8"
    except json.JSONDecodeError as error:
        line, why = error.lineno, error.msg
    except RecursionError:
        line, why = 1, "it is nested too deeply"
    raise DataError(f"{path}:{line}: not a JSON array", why=why, do="mend the file, or write one row per line (.jsonl)")


def _skip_space(text: str, start: int) -> int:
    match = SPACE.match(text, start)
    assert match
    return match.end()


def _scan_array(text: str, *, ascii_only: bool) -> Spans:
    # Only the ends matter, so no value is built: an object becomes its length, and a number of any size is accepted.
    scan = json.JSONDecoder(object_pairs_hook=len, parse_int=len, parse_float=len, parse_constant=len).raw_decode
    at = _skip_space(text, text.index("[") + 1)
    spans: list[tuple[int, int]] = []
    closed = text[at : at + 1] == "]"
    while not closed:
        _, stop = scan(text, at)
        spans.append((at, stop))
        at = _skip_space(text, stop)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise json.JSONDecodeError("the array is cut off" if at >= len(text) else "a comma is missing", text, at)
        at = at if closed else _skip_space(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("text after the array's end", text, at + 1)
    offsets = np.array(spans, np.int64).reshape(-1, 2)
    if not ascii_only:
        edges, position, total = offsets.ravel().tolist(), 0, 0
        for index, edge in enumerate(edges):
            total += len(text[position:edge].encode("utf-8"))
            position, edges[index] = edge, total
        offsets = np.array(edges, np.int64).reshape(-1, 2)
    return Spans(offsets[:, 0], offsets[:, 1], np.arange(len(offsets)), "[{}]")


class _Broken(ValueError):
    """JSON that Python's reader accepts and we do not."""


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _Broken("duplicate key")
    return row


def _constant(name: str) -> None:
    raise _Broken(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse_json(raw: bytes) -> Row:
    """One JSON object; RowError for anything else. Escaped NULs and lone surrogates are left to `to_conversation`."""
    if raw.startswith(BOM):
        raise RowError("byte order mark", "save the file as UTF-8 without BOM")
    try:
        row = _DECODER.decode(_decode(raw))
    except _Broken as error:
        raise RowError("bad JSON", str(error)) from None
    except json.JSONDecodeError as error:
        raise RowError("bad JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("bad JSON", "nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise RowError("bad JSON", "a number is too long") from None
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    return row


def parse_line(raw: bytes) -> Row:
    """A line of plain text as a row to pre-train on."""
    return {"text": _decode(raw.removeprefix(BOM)).removesuffix("\r")}


def _decode(raw: bytes) -> str:
    if b"\x00" in raw:
        raise RowError("NUL character")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None


# --- CSV -------------------------------------------------------------------------------------------------------------

# A field in quotes, in which "" is a quote, or one that does not begin with a quote.
CSV_FIELD = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=,|\Z)|((?!")[^,]*)(?=,|\Z)')


def open_csv(path: Path) -> TextFile:
    """The rows below the header line, known by the line that they begin in. Every value is text."""
    stamp = Stamp.of(path)
    rows = list(_csv_rows(path))
    spans = np.array(rows, np.int64).reshape(-1, 3)
    header: tuple[str, ...] = ()
    if rows:
        start, stop, line = rows[0]
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        try:
            header = tuple(name.strip() for name in split_csv(raw.removeprefix(BOM)))
        except RowError as error:
            raise DataError(f"{path}:{line}: {error}", do="the first line must name the columns") from None
        if len(set(header)) < len(header):
            raise DataError(f"{path}:{line}: two columns have one name", do="give each column a name of its own")
    body = spans[1:]
    return TextFile(path, Spans(body[:, 0], body[:, 1], body[:, 2], ":{}"), partial(parse_csv, header=header), stamp)


def parse_csv(raw: bytes, *, header: tuple[str, ...]) -> Row:
    """One row of a CSV file with these columns."""
    fields = split_csv(raw)
    if len(fields) != len(header):
        raise RowError("wrong number of columns", f"{len(fields)}, but the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def split_csv(raw: bytes) -> list[str]:
    """The fields of one row, without its line end."""
    text = _decode(raw).removesuffix("\r")
    if '"' not in text:
        return text.split(",")
    fields: list[str] = []
    at = 0
    while True:
        match = CSV_FIELD.match(text, at)
        if not match:
            raise RowError("bad CSV", f"text follows the closing quote of column {len(fields) + 1}")
        fields.append(match[1].replace('""', '"') if match[1] is not None else match[2])
        at = match.end()
        if at == len(text):
            return fields
        at += 1


def _csv_rows(path: Path) -> Iterator[tuple[int, int, int]]:
    """(start, stop, line number) of each row that is not blank, the header being the first."""
    start = offset = 0
    first, inside = 1, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            offset += len(line)
            if inside or b'"' in line:
                inside = _ends_inside_quotes(line.removeprefix(BOM) if number == 1 else line, inside)
            if inside:
                continue
            stop = offset - line.endswith(b"\n")
            if first < number or line.strip():
                yield start, stop, first
            start, first = offset, number + 1
    if inside:
        raise DataError(f"{path}:{first}: a quoted field is never closed", do='close it; a quote in it is written ""')


def _ends_inside_quotes(line: bytes, inside: bool) -> bool:
    """Whether a quoted field reaches over the line's end; `inside`: one reaches over its beginning."""
    at = 0
    if not inside and line.startswith(b'"'):
        inside, at = True, 1
    while True:
        if inside:
            at = line.find(b'"', at) + 1
            if not at:
                return True
            if line[at : at + 1] == b'"':
                at += 1
                continue
        at = line.find(b",", at) + 1
        if not at:
            return False
        inside = line[at : at + 1] == b'"'
        at += inside


# --- Parquet ---------------------------------------------------------------------------------------------------------


class ParquetFile:
    """A RowFile of a Parquet file. One row group is held in memory at a time: read rows in order."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, Stamp.of(path)
        self._ends = np.cumsum([0, *group_sizes(path)])
        self._forget()

    def _forget(self) -> None:
        self._group, self._table = -1, None
        self._block, self._rows = -1, []  # type: tuple[int, list[Row]]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stamp": self.stamp, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, index: int) -> Row:
        """Row `index`."""
        group = int(np.searchsorted(self._ends, index, side="right")) - 1
        if group != self._group:
            self._forget()
            self._table, self._group = self._read_group(group), group
        local = index - int(self._ends[group])
        if local // PARQUET_BLOCK != self._block:
            self._block = local // PARQUET_BLOCK
            assert self._table is not None
            self._rows = self._table.slice(self._block * PARQUET_BLOCK, PARQUET_BLOCK).to_pylist()
        return self._rows[local % PARQUET_BLOCK]

    def _read_group(self, group: int) -> Any:
        if Stamp.of(self.path) != self.stamp:
            raise changed(self.path)
        try:
            return _open_parquet(self.path).read_row_group(group)
        except OSError as error:  # pyarrow's name for damaged pages, too
            raise _damaged(self.path, group, error) from error

    def close(self) -> None:
        """Drop the row group in memory."""
        self._forget()

    def where(self, index: int) -> str:
        """File and row, counted from 0."""
        return f"{self.path}[{index}]"


def _open_parquet(file: AnyFile, **how: Any) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(
            f"{file} cannot be read: the package pyarrow is not installed",
            do="pip install 'megatron-swift[parquet]', or convert the file to .jsonl",
        ) from None
    source = file.random_access() if isinstance(file, RemoteFile) else file
    try:
        return parquet.ParquetFile(source, **how)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file", why=str(error), do="fetch it again") from error


def _damaged(file: AnyFile, group: int, error: Exception) -> DataError:
    return DataError(f"{file} is damaged in row group {group}", why=str(error), do="fetch it again")


@lru_cache(maxsize=16)
def _footer(file: AnyFile, stamp: Stamp) -> Any:
    if stamp_of(file) != stamp:
        raise changed(file)
    return _open_parquet(file).metadata


def group_sizes(file: AnyFile) -> tuple[int, ...]:
    """Rows of each row group of a Parquet file, of which nothing but the end is read."""
    metadata = _footer(file, stamp_of(file))
    return tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


def read_group(file: AnyFile, stamp: Stamp, *, group: int, start: int) -> Iterator[Row]:
    """The rows of a row group from its row `start` on. The group is read from its beginning, as far as rows are asked for, and never held whole."""
    if stamp_of(file) != stamp:
        raise changed(file)
    metadata = _footer(file, stamp)
    buffer = max(PARQUET_BUFFER // max(metadata.num_columns, 8), GLANCE)
    opened = _open_parquet(file, metadata=metadata, buffer_size=buffer, pre_buffer=False)
    try:
        for batch in opened.iter_batches(batch_size=PARQUET_BLOCK, row_groups=[group], use_threads=False):
            if start < batch.num_rows:
                yield from batch.slice(start).to_pylist()
            start = max(start - batch.num_rows, 0)
    except OSError as error:
        raise _damaged(file, group, error) from error
    finally:
        opened.close()


READERS: dict[str, Callable[[Path], RowFile]] = {
    ".jsonl": partial(LineFile, parse=parse_json),
    ".json": open_json,
    ".csv": open_csv,
    ".txt": partial(LineFile, parse=parse_line),
    ".parquet": ParquetFile,
}

__all__ = [
    "READERS",
    "ParquetFile",
    "RowFile",
    "Spans",
    "Stamp",
    "TextFile",
    "changed",
    "group_sizes",
    "holds_lines",
    "open_file",
    "parse_csv",
    "parse_json",
    "parse_line",
    "read_group",
    "split_csv",
]
