"""A folder that appears under its name in one step, written by one process or by all ranks of a group."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_swift.checkpoint.companions import CONFIG
from megatron_swift.checkpoint.ranks import Group, with_disks
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.files import fsync_folder, storage_errors


def replace_folder(final: Path, write: Callable[[Path], None], *, marker: str, group: Group) -> None:
    """Write a folder that appears under its name in one rename; every rank of the group calls it, and its disk must be shared.

    Where it exists, the new entries take the place of those of the same name and of old weights; whatever else is there stays.
    write(staging) : called on every rank. What fails there on one rank must be raised on all of them.
    marker : the file without which the folder is none of its kind; there it is taken away first and put last.
    """
    final = final.absolute()
    token = group.gather(secrets.token_hex(4))[0]
    exists = group.gather(final.is_dir())[0]
    name = f".{final.name}.tmp-{token}"
    staging = final / name if exists else final.with_name(name)  # inside: the folder may be a mount of its own
    group.together(final, lambda: staging.mkdir(parents=True) if group.rank == 0 else None)
    try:
        if not with_disks(group, staging).one_disk:
            raise UsageError(
                f"the ranks do not share the disk of {final}",
                do="name a folder that all machines see, or export on one machine",
            )
        with storage_errors(final):
            write(staging)
        group.together(final, lambda: _put(staging, final, exists, marker) if group.rank == 0 else None)
    finally:
        if group.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, final: Path, exists: bool, marker: str) -> None:
    if exists:
        _merge(staging, final, marker)
    else:
        os.rename(staging, final)
    fsync_folder(final.parent)


def _merge(staging: Path, final: Path, marker: str) -> None:
    (final / marker).unlink(missing_ok=True)
    stale = ("model*.safetensors", "model.safetensors.index.json") if marker == CONFIG else ()
    for path in [path for pattern in stale for path in final.glob(pattern)]:
        path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == marker):
        target = final / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
    fsync_folder(final)
