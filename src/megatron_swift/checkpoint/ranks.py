"""What publishing and verifying need of the ranks: who I am, who shares my disk, and a step that succeeds or fails on all alike."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_swift.utils.errors import StorageError, SwiftError, out_of_memory
from megatron_swift.utils.files import storage_errors

T = TypeVar("T")
_ROOM = "leave more memory to these processes, or use fewer of them on one machine"


@dataclass(frozen=True)
class Group:
    """rank: my number. gather: every rank's small object, on every rank. peers: the ranks that write to the same disk as I do.

    one_disk      : whether that is true of all ranks. process_group : None in a run of one process.
    """

    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    peers: tuple[int, ...] = (0,)
    one_disk: bool = True
    process_group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether I make and rename folders on my disk."""
        return self.rank == self.peers[0]

    def together(self, where: Path, action: Callable[[], T]) -> list[T]:
        """Run a step on every rank; every rank's result, or the first failing rank's error, raised on all of them.

        where : the folder that is written, named by an error that is none of ours.
        """
        result, failure = None, None
        try:
            with storage_errors(where):
                result = action()
        except SwiftError as error:
            failure = error
        except Exception as error:  # whatever it was, the other ranks must hear of it rather than wait
            failure = out_of_memory(error, do=_ROOM) or StorageError(f"writing {where} failed: {error!r}")
        outcomes = self.gather((failure, result))
        for failed, _ in outcomes:
            if failed is not None:
                raise failed
        return [value for _, value in outcomes]


def single() -> Group:
    """The group of one process."""
    return Group()


def all_ranks(*, timeout_minutes: float = 10) -> Group:
    """All ranks, over gloo connections of their own, so that a background thread may use them; every rank calls it.

    They are taken to share a disk. Without a process group it is the group of one process.
    """
    if not dist.is_available() or not dist.is_initialized():
        return single()
    world = dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value, group=group)
        return values

    return Group(dist.get_rank(), gather, tuple(range(world)), True, group)


def with_disks(group: Group, folder: Path) -> Group:
    """The group with those ranks as `peers` that see the same `folder`: each leaves a file in it and looks for the others'.

    The folder is made where it is missing. Raises StorageError on all ranks where it cannot be written.
    """
    tokens = group.gather(uuid.uuid4().hex)
    probe = folder / f".probe-{tokens[group.rank]}"

    def leave() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()

    try:
        group.together(folder, leave)
        seen = [rank for rank, token in enumerate(tokens) if (folder / f".probe-{token}").exists()]
        everyone = group.gather(tuple(seen))  # nobody removes a file before all have looked
    finally:
        probe.unlink(missing_ok=True)
    return replace(group, peers=everyone[group.rank], one_disk=len(set(everyone)) == 1)
