"""What tells that a file is still the same one, and hashes of files that are not computed twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_swift.utils.errors import DataError

SETTLED = (
    2_000_000_000  # ns: a file written later than this before it is hashed could change again within its clock's tick
)


END = 1 << 16  # bytes of a file's beginning and end that `ends_hash` sees


class Stamp(NamedTuple):
    """What tells that a file is still the one that was indexed."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file. DataError where it cannot be had."""
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read", why=str(error)) from error
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


def changed(path: object) -> DataError:
    """The error for a file that is no longer what it was when it was indexed."""
    return DataError(
        f"{path} has changed while it was read",
        do="start again when nothing writes to the file any more, or use a copy",
    )


def hash_files(paths: Sequence[Path], *, remembered: Path | None = None) -> str:
    """A hash of the files' content and order, not of their names: 32 hexadecimal digits.

    remembered : a folder for the files' own hashes. A file whose size, times and inode are those of its hash there is not read.
    """
    memory = _memory_file(paths, remembered) if remembered is not None else None
    known = _recall(memory) if memory is not None else {}
    total = hashlib.blake2b(digest_size=16)
    found: dict[str, list[object]] = {}
    for path in paths:
        name, now = str(path), time.time_ns()
        try:
            stamp = _full_stamp(path)
            entry = known.get(name)
            if entry is not None and entry[:-1] == stamp:
                digest = str(entry[-1])
            else:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read", why=str(error)) from error
        total.update(bytes.fromhex(digest))
        if max(stamp[1], stamp[3]) + SETTLED < now:
            found[name] = [*stamp, digest]
    if memory is not None and found != known:
        _remember(memory, found)
    return total.hexdigest()


def hash_values(values: Any) -> str:
    """A hash of plain values: 24 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def ends_hash(path: Path) -> tuple[int, str]:
    """Bytes of a file, and a hash of its beginning and end: cheap for a file of any size, and blind to what is changed in between."""
    size = Stamp.of(path).size
    with path.open("rb") as file:
        ends = hashlib.blake2b(file.read(END), digest_size=16)
        file.seek(max(size - END, 0))
        ends.update(file.read(END))
    return size, ends.hexdigest()


def _full_stamp(path: Path) -> list[int]:
    """With the time of the last change to the file's entry: unlike the other, no program can set it back."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ino, now.st_ctime_ns]


def _memory_file(paths: Sequence[Path], folder: Path) -> Path:
    names = "\0".join(str(path.absolute()) for path in paths)
    return folder / f"{hashlib.blake2b(os.fsencode(names), digest_size=12).hexdigest()}.json"


def _recall(memory: Path) -> dict[str, list[object]]:
    """What was remembered; nothing where the file is absent or not ours: then the hashes are computed again."""
    try:
        value = json.loads(memory.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(value, dict) and all(isinstance(entry, list) and len(entry) == 5 for entry in value.values())
    return value if whole else {}


def _remember(memory: Path, found: dict[str, list[object]]) -> None:
    """Write by renaming, so that another run never reads half of it. Where that is impossible, the next run hashes again."""
    draft = memory.with_name(f".{memory.name}.{uuid.uuid4().hex[:8]}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(found), encoding="ascii")
        draft.replace(memory)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def tree_stamps(folder: Path) -> dict[str, list[int]]:
    """The stamps of all files in the folder, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _full_stamp(path) for path in files}
