"""The only way a checkpoint appears: staged, checksummed, renamed, then named by the tracker file. Published folders are never written into.

RUN/.iter_0000100.tmp-<token>/   written by all ranks
RUN/iter_0000100/                the same folder, renamed once manifest.json (checksums of all files) is in it
RUN/latest_checkpointed_iteration.txt
RUN/.writer                      locked by the run that writes here; the kernel frees it when the run dies
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_swift.checkpoint.manifest import MANIFEST, Entry, sum_file, write_file, write_manifest
from megatron_swift.checkpoint.ranks import Group
from megatron_swift.checkpoint.verify import failure_of, is_ours
from megatron_swift.utils.errors import StorageError, SwiftError, UsageError
from megatron_swift.utils.files import TRACKER, fsync_folder, storage_errors, write_text
from megatron_swift.utils.log import get_logger

RELEASE = "release"  # what Megatron's converters call a checkpoint that belongs to no training
_PUBLISHED = re.compile(r"^iter_(\d{7,})$")
_LOCK = ".writer"
_LEFTOVERS = (".iter_*.tmp-*", ".trash-*")


class Published(NamedTuple):
    """The folder, and whether it was there already and was kept."""

    folder: Path
    kept: bool = False


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
    write: Callable[[Path], Mapping[str, Entry]],
    *,
    group: Group,
    finish: Callable[[Path], None] | None = None,
) -> Published:
    """Publish one checkpoint; every rank calls it and every rank gets the same result or the same error.

    run             : the run's folder on this rank's disk, which must exist: one that vanished may be a disk that was unmounted.
    write(staging)  : called on every rank, to write its files; returns what it knows of their checksums.
    finish(staging) : called on rank 0 once all ranks have written (a Hugging Face folder, for instance).
    An iteration that is published already is kept if it is whole; the tracker names it then. A damaged one is put aside.
    """
    final = iteration_folder(run, iteration)
    staging = run / group.gather(f".{final.name}.tmp-{secrets.token_hex(4)}")[0]
    if any(group.gather(iteration in published(run) or is_ours(final))) and _keep(final, group):
        return Published(final, kept=True)
    try:
        group.together(staging, lambda: _make(staging) if group.leads else None)
        entries = _merged(group.together(staging, lambda: dict(write(staging))))
        others = group.together(staging, lambda: _complete(staging, entries, finish, group) if group.rank == 0 else {})
        entries |= {name: entry for name, (entry, _) in others[0].items()}
        group.together(staging, lambda: _list(staging, entries, others[0], group) if group.leads else None)
    except Exception:
        if group.leads:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    group.together(final, lambda: _rename(staging, final) if group.leads else None)
    return Published(final)


def _keep(final: Path, group: Group) -> bool:
    """Whether a published checkpoint stays; every rank looks at its part."""
    failure = failure_of(final, group)
    if failure is None:
        # A crash between the renaming and the tracker leaves an older number in it.
        group.together(final, lambda: _point_to(final) if group.leads else None)
        return True
    aside = final.with_name(f".damaged-{final.name}-{secrets.token_hex(4)}")
    if group.rank == 0:
        get_logger().error("%s; it is renamed to %s and written anew", failure, aside.name)
    group.together(final, lambda: os.rename(final, aside) if group.leads and final.exists() else None)
    return False


def _make(staging: Path) -> None:
    if not staging.parent.is_dir():
        raise StorageError(
            f"cannot write to {staging.parent}: the folder has vanished",
            why="it was deleted or renamed, or its disk was unmounted",
            do="make it again, and resume from the last checkpoint that is left",
        )
    staging.mkdir()


def _merged(written: list[dict[str, Entry]]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for mine in written:
        assert not entries.keys() & mine.keys(), sorted(entries.keys() & mine.keys())
        entries |= mine
    return entries


# A file that nobody has summed while writing it, and its content where a disk that rank 0 does not see needs it.
_Others = dict[str, tuple[Entry, bytes | None]]


def _complete(staging: Path, entries: dict[str, Entry], finish: Callable[[Path], None] | None, group: Group) -> _Others:
    """Rank 0's last files, and the checksums of all that have none yet; other disks get their small ones."""
    if finish is not None:
        finish(staging)
    found: _Others = {}
    for path in sorted(staging.rglob("*")):
        name = str(path.relative_to(staging))
        if not path.is_file():
            fsync_folder(path)
        elif name not in entries:
            found[name] = sum_file(path), None if group.one_disk else path.read_bytes()
        elif not group.one_disk and not name.endswith(".distcp"):
            found[name] = entries[name], path.read_bytes()
    return found


def _list(staging: Path, entries: dict[str, Entry], others: _Others, group: Group) -> None:
    """The manifest, the same on every disk, and a look at the sizes of the files that are on this one."""
    if group.rank != 0:
        for name, (_, content) in others.items():
            assert content is not None
            if not (staging / name).exists():
                write_file(staging / name, content)
    here = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    assert here <= entries.keys(), f"nobody knows the checksums of {sorted(here - entries.keys())}"
    for name, entry in entries.items():
        path = staging / name
        if (group.one_disk or path.exists()) and path.stat().st_size != entry.bytes:
            raise StorageError(f"{path} has {path.stat().st_size} bytes, but {entry.bytes} were written to it")
    write_manifest(staging, entries)
    fsync_folder(staging)


def _rename(staging: Path, final: Path) -> None:
    try:
        with storage_errors(final):  # a folder of that name that is no checkpoint of ours is in the way
            os.rename(staging, final)
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_folder(final.parent)
    _point_to(final)


def _point_to(final: Path) -> None:
    write_text(final.parent / TRACKER, final.name.removeprefix("iter_").lstrip("0") or "0")


def latest(run: Path) -> Path | None:
    """The checkpoint the tracker names, or the newest published one when the tracker is missing or wrong; None where there is none."""
    found = candidates(run)
    return found[0] if found else None


def candidates(run: Path) -> list[Path]:
    """`latest`, then the published ones below it, newest first: what to fall back to where it is damaged."""
    found = published(run)
    tracker = run / TRACKER
    text = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    if text == RELEASE and (run / RELEASE).is_dir():
        return [run / RELEASE]
    named = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    # The folder may be one that Megatron itself wrote, without a manifest.
    if named is None or not (named in found or iteration_folder(run, named).is_dir()):
        if found:
            said = f"{tracker} says {text[:40]!r}, which is no checkpoint" if text else f"{tracker} is missing or empty"
            get_logger().warning("%s; taking the newest published one, iteration %d", said, found[-1])
        named = found[-1] if found else None
    if named is None:
        return []
    return [iteration_folder(run, i) for i in (named, *reversed([i for i in found if i < named]))]


def keep_last(run: Path, limit: int) -> None:
    """Delete all but `limit` published checkpoints: the tracker's stays, and the newest of the others.

    Each is renamed away first, so that a crash leaves no half of one.
    """
    for trash in run.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)
    current = [folder.name for folder in candidates(run)[:1]]
    others = [i for i in published(run) if iteration_folder(run, i).name not in current]
    for iteration in others[: max(len(others) - max(limit, 1) + len(current), 0)]:
        folder = iteration_folder(run, iteration)
        trash = run / f".trash-{folder.name}-{secrets.token_hex(4)}"
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """While it is open this process alone publishes in the folder; what runs that died have left half-done is removed first.

    Raises UsageError when another process that is alive writes there.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors(run):
            file = stack.enter_context(open(run / _LOCK, "a"))
        # A record lock: a forked data-loading process that outlives its rank does not hold it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(
                f"another run is writing into {run}", do="wait until it has ended, or give another --save"
            ) from None
        except OSError as error:  # a file system without locks: nobody knows whose the leftovers are
            get_logger().info("%s cannot be locked (%s); leftovers of killed runs stay", run, error.strerror)
            yield
            return
        _clean(run)
        yield


def clean_leftovers(run: Path) -> None:
    """Remove what runs that died have left half-done in a folder that this process does not write to, unless a live run does."""
    if any(found for pattern in _LEFTOVERS for found in run.glob(pattern)):
        with contextlib.suppress(SwiftError), writing(run):
            pass


def _clean(run: Path) -> None:
    for pattern in _LEFTOVERS:
        for folder in run.glob(pattern):
            get_logger().info("removing %s, which a run that died has left", folder)
            shutil.rmtree(folder, ignore_errors=True)
