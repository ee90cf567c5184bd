"""Checksums of a checkpoint's files: taken while they are written, listed in manifest.json, compared on request.

A `checksum.WordSum` of every 64 MiB, at 20 GB/s on one core here (zlib.crc32 4.2, sha256 1.8, blake2b 0.9). Blocks let several ranks check one
file. A manifest protects from accidents, not from a forger, who could rewrite it too: reading a checkpoint therefore never runs anything
that is in it. Manifests of earlier versions, with crc32 (format 2) or blake2b (1), are checked as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_swift.checkpoint.checksum import WordSum
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.files import digest, write_text

MANIFEST = "manifest.json"
BLOCK = 1 << 26
_READ = 1 << 20
_KINDS = {1: "blake2b", 2: "crc32", 3: "sum64"}  # of checksum, by the manifest's format
_WRITER = re.compile(r"^(?:optimizer/)?__(\d+)_\d+\.distcp$")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file. sums: of each block."""

    bytes: int
    sums: tuple[int, ...]


class Sums:
    """The entry of a file whose bytes pass by in order."""

    def __init__(self) -> None:
        self.size, self._current = 0, WordSum()
        self._done: list[int] = []

    def update(self, data: Any) -> None:
        """The next bytes; anything with a buffer."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK - self.size % BLOCK]
            self._current.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._done.append(self._current.value())
                self._current = WordSum()
            view = view[len(part) :]

    def entry(self) -> Entry:
        """Of all bytes so far."""
        rest = (self._current.value(),) if self.size % BLOCK else ()
        return Entry(self.size, (*self._done, *rest))


class _Summed(io.RawIOBase):
    """A file opened for writing whose bytes are summed as they go to disk."""

    def __init__(self, file: BinaryIO):
        self.file, self.sums = file, Sums()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sums.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


class SummedFiles(FileSystem):
    """The file system of torch's checkpoint writer; `entries` tells of each file what was written.

    failure : what went wrong with one of them. In another thread than the main one, torch's writer lets it go unnoticed.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.failure: Exception | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        try:
            with open(path, mode) as file:
                summed = _Summed(cast(BinaryIO, file))
                yield summed
        except Exception as error:
            self.failure = error
            raise
        self.entries[Path(path).name] = summed.sums.entry()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        os.rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def write_file(path: Path, data: bytes) -> Entry:
    """Write a small file through to the disk."""
    sums = Sums()
    sums.update(data)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return sums.entry()


def sum_file(path: Path) -> Entry:
    """The entry of a file that lies on disk, which is also synced: nobody knows whether its writer did."""
    sums = Sums()
    with open(path, "rb") as file:
        for data in _read(file, path.stat().st_size):
            sums.update(data)
        os.fsync(file.fileno())
    return sums.entry()


def _read(file: BinaryIO, length: int) -> Generator[memoryview, None, None]:
    """The next `length` bytes of a file, or what there is, in parts that are valid until the next one."""
    buffer = memoryview(bytearray(min(_READ, length)))
    while length and (got := file.readinto(buffer[: min(len(buffer), length)])):  # type: ignore[attr-defined]
        yield buffer[:got]
        length -= got


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """List the files of a folder, as its last one."""
    files = {name: {"bytes": e.bytes, "sum64": list(e.sums)} for name, e in sorted(entries.items())}
    write_text(folder / MANIFEST, json.dumps({"format": 3, "files": files}, indent=1) + "\n")


@dataclass(frozen=True)
class _Check:
    """A part of a file and whether it is as the manifest says. size: in bytes, to share checks out evenly."""

    name: str
    size: int
    holds: Callable[[], bool]


def verify(folder: Path, *, part: int = 0, of: int = 1) -> None:
    """Compare a folder with its manifest. Raises CheckpointError naming the first file that differs.

    part, of : check the part-th of `of` equal shares, which together are all of it.
    """
    checks = _checks(folder)
    for check in _share(checks, part, of):
        try:
            good = check.holds()
        except OSError as error:
            raise CheckpointError(f"{folder / check.name} cannot be read: {error}", do=_ANOTHER) from None
        if not good:
            raise CheckpointError(
                f"{folder / check.name} is damaged: its checksum is not the one in {MANIFEST}", do=_ANOTHER
            )


_ANOTHER = "use another checkpoint"


def _share(checks: Sequence[_Check], part: int, of: int) -> Iterable[_Check]:
    """To each rank what it wrote, and will read, where as many wrote as there are shares; else evenly. All ranks compute the same."""
    writers = {int(match[1]) for check in checks if (match := _WRITER.match(check.name))}
    local = writers == set(range(of))
    loads = [0] * of
    for check in sorted(checks, key=lambda c: -c.size):
        match = _WRITER.match(check.name) if local else None
        least = int(match[1]) if match else loads.index(min(loads))
        loads[least] += check.size
        if least == part:
            yield check


def _checks(folder: Path) -> list[_Check]:
    """What there is to check, after a look at the names and sizes of all files."""
    found: list[_Check] = []
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if listed["format"] not in _KINDS:
            raise KeyError(f"format {listed['format']}")
        for name, entry in listed["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise KeyError(f"{name!r} lies outside the folder")
            path = folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing", why="it may lie on the disk of another node, which wrote it", do=_ANOTHER
                )
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{path} is damaged: it has {size} bytes, not {entry['bytes']} as {MANIFEST} says", do=_ANOTHER
                )
            found += _of_file(path, name, entry, _KINDS[listed["format"]])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error!r}", do=_ANOTHER) from None
    return found


def _of_file(path: Path, name: str, entry: dict[str, Any], kind: str) -> list[_Check]:
    size, sums = entry["bytes"], entry[kind]
    if kind == "blake2b":
        return [_Check(name, size, lambda: digest(path) == sums)]
    sum_of = {"crc32": _crc32, "sum64": _sum64}[kind]
    if len(sums) != -(-size // BLOCK):
        raise KeyError(f"{len(sums)} checksums for {name}")

    def block(number: int) -> _Check:
        start = number * BLOCK
        length = min(BLOCK, size - start)
        return _Check(name, length, lambda: sum_of(path, start, length) == sums[number])

    return [block(number) for number in range(len(sums))]


def _sum64(path: Path, start: int, length: int) -> int:
    total = WordSum()
    for data in _block(path, start, length):
        total.update(data)
    return total.value()


def _crc32(path: Path, start: int, length: int) -> int:
    total = 0
    for data in _block(path, start, length):
        total = zlib.crc32(data, total)
    return total


def _block(path: Path, start: int, length: int) -> Generator[memoryview, None, None]:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        yield from _read(cast(BinaryIO, file), length)
