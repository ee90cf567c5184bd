"""Is a published checkpoint whole? Its files are shared out over the ranks, and all ranks get the same answer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from megatron_swift.checkpoint.manifest import MANIFEST, verify
from megatron_swift.checkpoint.ranks import Group
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.log import get_logger

_OURS = "state.json"  # only a training run writes it, and always with a manifest


def is_ours(folder: Path) -> bool:
    """Whether a training run of ours made the folder, even if its manifest is gone."""
    return (folder / _OURS).is_file()


def failure_of(folder: Path, group: Group) -> CheckpointError | None:
    """What is wrong with a checkpoint, on every rank; None where nothing is. Every rank calls it with the folder on its disk.

    A folder of Megatron's own, without a manifest, cannot be checked and passes.
    """
    manifest, found = folder / MANIFEST, None
    try:
        status = manifest.stat()
        disk = (status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError:
        disk = None
    # Ranks that see one and the same manifest share the work; others have a disk of their own to look at.
    everyone = group.gather(disk)
    peers = [rank for rank, other in enumerate(everyone) if other == disk]
    try:
        if disk is not None:
            verify(folder, part=peers.index(group.rank), of=len(peers))
        elif not folder.is_dir():
            raise CheckpointError(f"{folder} is missing", do="give a folder that holds iter_* folders, on every node")
        elif is_ours(folder):
            raise CheckpointError(f"{manifest} is missing", do="use another checkpoint")
    except CheckpointError as error:
        found = error
    failures = [failure for failure in group.gather(found) if failure is not None]
    return failures[0] if failures else _other_checkpoint(folder, group)


def _other_checkpoint(folder: Path, group: Group) -> CheckpointError | None:
    """Each rank's folder is whole; but on several disks they may be of different runs, of which no one state can be made."""
    manifest = folder / MANIFEST
    everyone = group.gather((zlib.crc32(manifest.read_bytes()) if manifest.exists() else None, folder))
    content, folder = everyone[0]
    others = [rank for rank, (one, _) in enumerate(everyone) if one != content]
    if not others:
        return None
    return CheckpointError(
        f"{folder}: ranks {others} see another checkpoint under this name than rank 0",
        why="their disks hold different runs",
        do="copy the run's checkpoints to every machine, as docs/checkpoints.md says",
    )


def first_whole(folders: Sequence[Path], group: Group) -> Path:
    """The first folder that is whole. Raises CheckpointError of the first one where none is.

    folders : at least one, as rank 0 sees them; the other ranks look for the same names beside their own run's folder.
    """
    failures: list[CheckpointError] = []
    for folder in folders:
        failure = failure_of(folder, group)
        if failure is None:
            if failures and group.rank == 0:
                get_logger().error("%s; FALLING BACK to the checkpoint before it, %s", failures[0], folder)
            return folder
        failures.append(failure)
    if len(failures) > 1:
        names = ", ".join(folder.name for folder in folders[1:])
        raise CheckpointError(failures[0].what, why=f"those before it are damaged too: {names}", do=failures[0].do)
    raise failures[0]
