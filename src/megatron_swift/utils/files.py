"""Files written so that a crash leaves either the old content or the new, and storage errors named for what they are."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_swift.utils.errors import StorageError

TRACKER = "latest_checkpointed_iteration.txt"  # by which Megatron knows a folder of checkpoints
_STORAGE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.EBUSY,
    errno.EFBIG,
    errno.ESTALE,
}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that means "the disk cannot take this" into a StorageError naming the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE_ERRNOS:
            raise StorageError(
                f"cannot write to {path}: {error.strerror}", do="free space or choose another folder"
            ) from error
        raise


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable (a rename, a new file)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: a reader sees the old content or the new."""
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with storage_errors(path):
        with open(staging, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest(path: Path) -> str:
    """blake2b of a file's content, 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
