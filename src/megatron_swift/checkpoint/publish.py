"""The only way a checkpoint appears: staged, checksummed, renamed, then named by the tracker file. Published folders are never written into.

RUN/.iter_0000100.tmp-<token>/   written by all ranks
RUN/iter_0000100/                the same folder, renamed once manifest.json (a checksum per file) is in it
RUN/latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_swift.utils.errors import CheckpointError, StorageError, SwiftError
from megatron_swift.utils.files import digest, fsync_folder, storage_errors, write_text
from megatron_swift.utils.log import get_logger

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_PUBLISHED = re.compile(r"^iter_(\d{7,})$")


@dataclass(frozen=True)
class Group:
    """What publishing needs of the ranks: my number, and a gather of small objects to every rank."""

    rank: int
    gather: Callable[[Any], list[Any]]


def single() -> Group:
    """The group of one process."""
    return Group(0, lambda value: [value])


def iteration_folder(run: Path, iteration: int) -> Path:
    """RUN/iter_0000100, Megatron's name."""
    return run / f"iter_{iteration:07d}"


def published(run: Path) -> list[int]:
    """Iterations that are published in a run folder, ascending. A folder without a manifest is not one."""
    if not run.is_dir():
        return []
    found = (_PUBLISHED.match(p.name) for p in run.iterdir() if (p / MANIFEST).is_file())
    return sorted(int(m[1]) for m in found if m)


def publish(
    run: Path,
    iteration: int,
    write: Callable[[Path], None],
    *,
    group: Group,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Publish one checkpoint; every rank calls it and every rank gets the same result or the same error.

    write(staging)  : called on every rank, to write its files.
    finish(staging) : called on rank 0 once all ranks have written (a Hugging Face folder, for instance).
    An iteration that is published already is left as it is, with a warning; the tracker names it then.
    """
    final = iteration_folder(run, iteration)
    staging = run / group.gather(f".{final.name}.tmp-{secrets.token_hex(4)}")[0]
    if any(group.gather(iteration in published(run))):
        if group.rank == 0:
            get_logger().warning("%s is published already and is kept, not written again", final)
        # A crash between the renaming and the tracker leaves an older number in it.
        _together(group, staging, lambda: _point_to(final) if group.rank == 0 else None)
        return final
    _together(group, staging, lambda: _make(staging) if group.rank == 0 else None)
    _together(group, staging, lambda: write(staging))
    _together(group, staging, lambda: _complete(staging, final, finish) if group.rank == 0 else None)
    return final


def _make(staging: Path) -> None:
    with storage_errors(staging):
        staging.mkdir(parents=True)


def _together(group: Group, staging: Path, action: Callable[[], None]) -> None:
    """Run a step on every rank; if it failed on any, remove the staging folder and raise the first rank's error on all of them."""
    failure: SwiftError | None = None
    try:
        with storage_errors(staging):
            action()
    except SwiftError as error:
        failure = error
    except Exception as error:  # whatever it was, the other ranks must hear of it rather than wait
        failure = StorageError(f"writing {staging} failed: {error!r}")
    failures = [f for f in group.gather(failure) if f is not None]
    if failures:
        if group.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise failures[0]


def _complete(staging: Path, final: Path, finish: Callable[[Path], None] | None) -> None:
    if finish is not None:
        finish(staging)
    files = {
        str(p.relative_to(staging)): {"bytes": p.stat().st_size, "blake2b": digest(p)}
        for p in sorted(staging.rglob("*"))
        if p.is_file()
    }
    write_text(staging / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1) + "\n")
    with storage_errors(final):  # a folder of that name that is no checkpoint of ours is in the way
        os.rename(staging, final)
    fsync_folder(final.parent)
    _point_to(final)


def _point_to(final: Path) -> None:
    write_text(final.parent / TRACKER, final.name.removeprefix("iter_").lstrip("0") or "0")


def verify(folder: Path) -> None:
    """Compare every file of a published folder with its manifest. Raises CheckpointError naming the first that differs."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", do="use another checkpoint")
            if path.stat().st_size != entry["bytes"] or digest(path) != entry["blake2b"]:
                raise CheckpointError(
                    f"{path} is damaged: its checksum is not the one in {MANIFEST}", do="use another checkpoint"
                )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error!r}", do="use another checkpoint") from None


def latest(run: Path) -> Path | None:
    """The checkpoint the tracker names, or the newest published one when the tracker is missing or wrong; None where there is none."""
    found = published(run)
    tracker = run / TRACKER
    text = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    named = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    # The folder may be one that Megatron itself wrote, without a manifest.
    if named is not None and (named in found or iteration_folder(run, named).is_dir()):
        return iteration_folder(run, named)
    if text and found:
        get_logger().warning("%s says %r, which is no checkpoint; taking the newest published one", tracker, text[:40])
    return iteration_folder(run, found[-1]) if found else None


def keep_last(run: Path, limit: int) -> None:
    """Delete all but the newest `limit` published checkpoints; each is renamed away first, so that a crash leaves no half of one."""
    for trash in run.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)
    for iteration in published(run)[: -max(limit, 1)]:
        folder = iteration_folder(run, iteration)
        trash = run / f".trash-{folder.name}-{secrets.token_hex(4)}"
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
