"""Data set strings to tables of rows. A table knows where each row lies on disk and reads it when asked."""

from __future__ import annotations

import bisect
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_swift.data.messages import RowError
from megatron_swift.data.registry import Fixup, Identity, Registered, Row, find_registered, plain
from megatron_swift.utils.errors import DataError, UsageError

NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "configuration.json")
BLOCK = 1 << 24  # bytes read at a time
SPACE = re.compile(r"[ \t\r\n]*")


class Request(NamedTuple):
    """What a data set string asks for.

    value   : the string as the user typed it.
    name    : a path that exists or a hub id.
    subsets : names after the colon.
    limit   : the number after #, or None.
    """

    value: str
    name: str
    subsets: tuple[str, ...] = ()
    limit: int | None = None


def parse_dataset(value: str) -> Request:
    """Read `[hf::|ms::]id|dir|file[:subset1/subset2][#N]`; a string that exists on disk is taken literally."""
    if not value.strip():
        raise UsageError("--dataset has an empty value", do="give a file, a folder or a data set's name")
    if os.path.exists(value):
        return Request(value, value)
    name = value.removeprefix("hf::").removeprefix("ms::")
    limit = None
    if "#" in name:
        name, _, number = name.rpartition("#")
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise UsageError(
                f"--dataset {value}: {number!r} after # is not a number of rows", do="write for example FILE#500"
            )
        limit = int(number)
    subsets: tuple[str, ...] = ()
    if not os.path.exists(name) and ":" in name:
        name, _, subset = name.partition(":")
        subsets = tuple(part for part in subset.split("/") if part)
    return Request(value, name, subsets, limit)


class Spans(NamedTuple):
    """The rows of one file.

    starts, stops : int64 [n], the bytes [start, stop) of each row.
    numbers       : int64 [n], the number that the user knows the row by.
    style         : how that number follows the file's name in a message: ":{}" for a line, "[{}]" for an element.
    """

    starts: np.ndarray
    stops: np.ndarray
    numbers: np.ndarray
    style: str


class Reader(NamedTuple):
    """How to read one kind of file.

    locate : path -> the byte range of each row.
    parse  : bytes of a row -> the row; raises RowError.
    """

    locate: Callable[[Path], Spans]
    parse: Callable[[bytes], Row]


def index_lines(path: Path) -> Spans:
    """Each line that is not blank, numbered from 1."""
    ends: list[np.ndarray] = []
    offset = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + offset)
            offset += len(block)
        stops = np.concatenate([*ends, np.array([offset], np.int64)]).astype(np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
        keep = stops > starts
        for number in np.flatnonzero(keep & (stops - starts < 64)):  # a blank line longer than that is an error row
            keep[number] = bool(
                os.pread(file.fileno(), int(stops[number] - starts[number]), int(starts[number])).strip()
            )
    return Spans(starts[keep], stops[keep], np.flatnonzero(keep) + 1, ":{}")


def index_array(path: Path) -> Spans:
    """Each element of a JSON array, numbered from 0. A file that does not begin with [ is read as lines."""
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"["):
        return index_lines(path)
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
    """One JSON object; RowError for anything else. Escaped NULs and lone surrogates are left to `to_messages`."""
    if raw.startswith(b"\xef\xbb\xbf"):
        raise RowError("byte order mark", "save the file as UTF-8 without BOM")
    if b"\x00" in raw:
        raise RowError("NUL character")
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None
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


READERS: dict[str, Reader] = {
    ".jsonl": Reader(index_lines, parse_json),
    ".json": Reader(index_array, parse_json),
}


class DataFile:
    """The rows of one file, read one by one. May be sent to another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = READERS[path.suffix.lower()]
        self.spans = self.reader.locate(path)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.spans.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def read(self, index: int) -> Row:
        """Row `index`; RowError where it is malformed."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        start = int(self.spans.starts[index])
        raw = os.pread(self._file, int(self.spans.stops[index]) - start, start)
        return self.reader.parse(raw)

    def where(self, index: int) -> str:
        """`file.jsonl:12`."""
        return f"{self.path}{self.spans.style.format(int(self.spans.numbers[index]))}"


class Source(NamedTuple):
    """A data set string resolved to files, before any row is read.

    paths      : the files in order.
    fixups     : each file is read once per fixup.
    registered : the entry whose fixups these are, or None.
    """

    request: Request
    paths: tuple[Path, ...]
    fixups: tuple[Fixup, ...]
    registered: Registered | None

    @property
    def needs_identity(self) -> bool:
        """True where rows have placeholders for a name and an author."""
        return self.registered is not None and self.registered.asset == "self_cognition.jsonl"


def find_source(value: str) -> Source:
    """The files behind a data set string. DataError where there are none; UsageError for an unknown subset."""
    request = parse_dataset(value)
    path = Path(request.name)
    registered = find_registered(path.stem if path.suffix.lower() in READERS else path.name)
    fixups = _find_fixups(request, registered)
    if path.is_dir():
        paths = _list_folder(path)
    elif path.exists():
        if path.suffix.lower() not in READERS:
            kinds = " and ".join(READERS)
            raise DataError(
                f"--dataset {value}: files of kind {path.suffix or 'no suffix'!r} cannot be read",
                do=f"convert it to {kinds}",
            )
        paths = (path,)
    elif registered and registered.asset and request.name.lower() in (name.lower() for name in registered.ids):
        paths = (Path(str(importlib.resources.files("megatron_swift.data") / "assets" / registered.asset)),)
    else:
        raise _missing(request)
    return Source(request, paths, fixups, registered)


def _find_fixups(request: Request, registered: Registered | None) -> tuple[Fixup, ...]:
    known = registered.subsets if registered else {}
    if not request.subsets:
        return (known.get("default", plain),)
    names = tuple(known) if request.subsets == ("all",) and known else request.subsets
    for name in names:
        if name not in known:
            choices = f"choose {', '.join(known)}" if known else "leave it out: this data set has none"
            raise UsageError(f"--dataset {request.value}: there is no subset {name!r}", do=choices)
    return tuple(known[name] for name in names)


def _list_folder(folder: Path) -> tuple[Path, ...]:
    paths = tuple(
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in READERS and path.name not in NOT_DATA and path.name[0] != "." and path.is_file()
    )
    if not paths:
        raise DataError(f"{folder} holds no {' or '.join(READERS)} file", do="give the folder that holds the rows")
    return paths


def _missing(request: Request) -> DataError:
    """What to say of a name that is neither on disk nor shipped."""
    name = request.name
    looks_like_file = Path(name).suffix.lower() in (*READERS, ".csv", ".txt", ".parquet", ".arrow")
    if looks_like_file or name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return DataError(f"--dataset {request.value}: {name} does not exist", do="check the path")
    return DataError(
        f"--dataset {request.value}: {name} was not found",
        why="there is no such file or folder here, and data sets are not downloaded",
        do="download it from its hub and give the path of the folder",
    )


class Table:
    """The rows of one data set string, read one by one. May be sent to another process."""

    def __init__(self, source: Source, *, identity: Identity) -> None:
        self.source = source
        self.identity = identity
        self.files = [DataFile(path) for path in source.paths]
        self._parts = [(file, fixup) for fixup in source.fixups for file in self.files]
        self._ends = np.cumsum([len(file) for file, _ in self._parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[DataFile, Fixup, int]:
        part = bisect.bisect_right(self._ends, index)
        file, fixup = self._parts[part]
        return file, fixup, index - (self._ends[part - 1] if part else 0)

    def read(self, index: int) -> Row:
        """Row `index` with its fixup; RowError where it is malformed."""
        file, fixup, local = self._find(index)
        return fixup(file.read(local), self.identity)

    def where(self, index: int) -> str:
        """`file.jsonl:12`, or `file.json[11]` for an element of an array."""
        file, _, local = self._find(index)
        return file.where(local)


def hash_files(paths: Sequence[Path]) -> str:
    """A hash of the files' content and order, not of their names: 32 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, hashlib.blake2b).digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read", why=str(error)) from error
    return total.hexdigest()
