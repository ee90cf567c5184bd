"""A checkpoint is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_weights import config, pieces_of_rank, random_weights

from megatron_swift.checkpoint import manifest as manifests
from megatron_swift.checkpoint import publish as publishing
from megatron_swift.checkpoint.dcp import save_pieces
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.manifest import MANIFEST, verify
from megatron_swift.checkpoint.publish import TRACKER, iteration_folder, keep_last, latest, publish, published
from megatron_swift.checkpoint.ranks import all_ranks, single
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import CheckpointError, StorageError

CONTENT = {"a.bin": b"first", "sub/b.bin": b"second" * 1000}


def write(staging: Path, content: dict[str, bytes] = CONTENT) -> dict[str, manifests.Entry]:
    """Files whose checksums nobody has taken."""
    for name, data in content.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(data)
    return {}


def put(run: Path, iteration: int, **kwargs: object) -> Path:
    run.mkdir(exist_ok=True)
    return publish(run, iteration, write, group=single(), **kwargs).folder


def leftovers(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob(".*"))


def test_appears_whole(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    seen = []

    def look(staging):
        seen.append((published(run), latest(run), [p.name for p in run.iterdir() if not p.name.startswith(".")]))
        return write(staging)

    final, kept = publish(
        run, 100, look, group=single(), finish=lambda staging: look(staging) or write(staging, {"c": b"3"})
    )
    assert not kept
    assert seen == [([], None, [])] * 2
    assert final == run / "iter_0000100" == latest(run) and published(run) == [100]
    assert (run / TRACKER).read_text() == "100"
    listed = json.loads((final / MANIFEST).read_text())["files"]
    on_disk = {str(p.relative_to(final)): p.stat().st_size for p in final.rglob("*") if p.is_file()}
    assert on_disk.pop(MANIFEST) and {name: entry["bytes"] for name, entry in listed.items()} == on_disk
    assert set(listed) == {"a.bin", "sub/b.bin", "c"} and not leftovers(run)
    verify(final)


def test_same_iteration_is_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    put(tmp_path, 5)
    put(tmp_path, 6)
    (tmp_path / TRACKER).write_text("4")  # as after a crash between renaming and writing the tracker
    before = {p: p.read_bytes() for p in (tmp_path / "iter_0000006").rglob("*") if p.is_file()}
    final, kept = publish(tmp_path, 6, lambda staging: write(staging, {"a.bin": b"other"}), group=single())
    assert kept and final == tmp_path / "iter_0000006" and {p: p.read_bytes() for p in before} == before
    assert (tmp_path / TRACKER).read_text() == "6" and not leftovers(tmp_path)
    assert not caplog.text


def test_same_iteration_that_is_damaged_is_written_anew(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    put(tmp_path, 5)
    (tmp_path / "iter_0000005" / "a.bin").write_bytes(b"First")
    final, kept = publish(tmp_path, 5, write, group=single())
    assert not kept and (final / "a.bin").read_bytes() == b"first"
    verify(final)
    (aside,) = tmp_path.glob(".damaged-iter_0000005-*")
    assert (aside / "a.bin").read_bytes() == b"First" and "a.bin is damaged" in caplog.text
    keep_last(tmp_path, 1)
    assert aside.is_dir()


def test_a_run_folder_that_has_vanished(tmp_path):
    """It may be a disk that was unmounted: a new folder in its place would fill another one."""
    with pytest.raises(StorageError, match="run: the folder has vanished"):
        publish(tmp_path / "run", 1, write, group=single())
    assert not (tmp_path / "run").exists()


def test_a_folder_in_the_way(tmp_path):
    """Megatron's own, of the same number: it is not ours to replace."""
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "theirs").write_text("x")
    with pytest.raises(StorageError, match=r"iter_0000002: Directory not empty"):
        put(tmp_path, 2)
    assert [p.name for p in (tmp_path / "iter_0000002").iterdir()] == ["theirs"] and not leftovers(tmp_path)


# Crashes. Each point is a function that publishing calls; the process dies (or raises) right before it.

POINTS = ["mkdir", "write", "finish", "sum_file", "manifest", "rename", "after_rename", "replace_tracker"]


def break_at(point: str, action, patch) -> None:
    """Make publishing run into `action` at a point. "write" and "finish" are broken by the caller's functions."""

    def before(owner, name, when=lambda *a: True):
        inner = getattr(owner, name)

        def broken(*args, **kwargs):
            if when(*args):
                action()
            return inner(*args, **kwargs)

        patch.setattr(owner, name, broken)

    match point:
        case "mkdir":
            before(publishing, "_make")
        case "sum_file":
            before(publishing, point)
        case "manifest":
            before(manifests, "write_text")
        case "after_rename":
            before(publishing, "fsync_folder", lambda folder: (folder / "iter_0000002").exists())
        case "rename":
            before(os, "rename")
        case "replace_tracker":
            before(os, "replace", lambda source, target: Path(target).name == TRACKER)


def attempt(run: Path, iteration: int, point: str, action) -> None:
    def stage(staging):
        entries = write(staging)
        if point == "write":
            action()
        return entries

    def finish(staging):
        if point == "finish":
            action()

    with pytest.MonkeyPatch.context() as patch:
        break_at(point, action, patch)
        publish(run, iteration, stage, group=single(), finish=finish)


def in_fork(function, *args) -> int:
    """The exit code of a fork that calls it; negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_previous(run: Path, point: str) -> None:
    """Renamed is published; before that, nothing has happened."""
    there = [1, 2] if point in ("after_rename", "replace_tracker") else [1]
    assert published(run) == there and latest(run) == iteration_folder(run, 1)
    assert (run / TRACKER).read_text() == "1"
    for iteration in there:
        verify(iteration_folder(run, iteration))
    # What comes next works as if nothing had been.
    put(run, 2)
    assert latest(run) == iteration_folder(run, 2)
    put(run, 3)
    assert published(run) == [1, 2, 3] and latest(run) == iteration_folder(run, 3)
    verify(iteration_folder(run, 2))


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point(tmp_path, point):
    put(tmp_path, 1)
    assert in_fork(attempt, tmp_path, 2, point, kill) == -signal.SIGKILL
    check_previous(tmp_path, point)


@pytest.mark.parametrize("point", POINTS)
def test_error_at_any_point(tmp_path, point):
    put(tmp_path, 1)

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        attempt(tmp_path, 2, point, fail)
    assert not [name for name in leftovers(tmp_path) if name.startswith(".iter_")]
    check_previous(tmp_path, point)


@pytest.mark.parametrize("error", [RuntimeError("odd"), CheckpointError("its own")])
def test_errors_of_the_writer(tmp_path, error):
    def fail():
        raise error

    kind = CheckpointError if isinstance(error, CheckpointError) else StorageError
    with pytest.raises(kind, match=str(error)):
        attempt(tmp_path, 2, "write", fail)
    assert published(tmp_path) == [] and not leftovers(tmp_path)


def test_first_of_a_run_killed(tmp_path):
    (tmp_path / "run").mkdir()
    assert in_fork(attempt, tmp_path / "run", 1, "rename", kill) == -signal.SIGKILL
    assert latest(tmp_path / "run") is None
    assert latest(put(tmp_path / "run", 1).parent) is not None


def test_interrupted_leaves_no_checkpoint(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, 1, "write", interrupt)
    assert latest(tmp_path) is None and published(tmp_path) == []


# Several ranks


def _ranks_publish(rank, run, broken_rank, where):
    dist.init_process_group("gloo")
    group = all_ranks()
    cfg = config()
    specs = tensor_specs(cfg)
    weights = random_weights(specs)

    def stage(staging):
        pieces = pieces_of_rank(specs, weights, rank, 2, num_layers=cfg.num_layers)
        if rank == broken_rank and where == "piece":
            broken = pieces[3]
            pieces[3] = type(broken)(broken.key, _no_space, broken.dtype, broken.size, broken.offset, broken.shape)
        if rank == broken_rank and where == "before":
            _no_space()
        entries = save_pieces(staging, pieces, distributed=True, process_group=group.process_group)
        if rank == broken_rank and where == "after":
            _no_space()
        return entries

    try:
        publish(run, 1, stage, group=group)
    except BaseException as error:  # CheckpointException is no Exception
        first = type(error).__name__, str(error)
    else:
        first = "", ""
    pieces = pieces_of_rank(specs, weights, rank, 2, num_layers=cfg.num_layers)
    publish(run, 2, lambda staging: save_pieces(staging, pieces, distributed=True), group=group)
    return first


def _no_space():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize("where", ["piece", "after"])
def test_one_rank_fails(tmp_path, broken_rank, where):
    """Every rank raises the same error, none waits for ever, and the next checkpoint is good."""
    errors = run_ranks(_ranks_publish, 2, tmp_path, broken_rank, where, timeout=30)
    assert errors[0] == errors[1]
    assert errors[0][0] == "StorageError" and "No space left on device" in errors[0][1]
    assert published(tmp_path) == [2] and not leftovers(tmp_path)
    verify(latest(tmp_path))


def test_ranks_agree(tmp_path):
    assert run_ranks(_ranks_publish, 2, tmp_path, None, "") == [("", "")] * 2
    assert published(tmp_path) == [1, 2]
    verify(iteration_folder(tmp_path, 1))


# Which one is the latest


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        ("10", 10),
        ("30\n", 30),
        (None, 30),
        ("", 30),
        ("20", 30),
        ("release", 30),
        ("../../etc", 30),
        ("/10", 30),
        ("-10", 30),
        ("²", 30),
        ("１０", 30),
        ("9" * 5000, 30),
        (b"\x00\xff\xfe", 30),
        ("40", 40),
    ],
)
def test_latest(tmp_path, tracker, expected):
    """10 and 30 are published, 40 is Megatron's own (no manifest), 20 does not exist, 50 was never finished."""
    put(tmp_path, 10)
    put(tmp_path, 30)
    (tmp_path / "iter_0000040").mkdir()
    (tmp_path / "iter_0000050").write_text("a file")
    (tmp_path / ".iter_0000060.tmp-1").mkdir()
    shutil.copytree(tmp_path / "iter_0000010", tmp_path / "iter_9")
    (tmp_path / TRACKER).unlink()
    if tracker is not None:
        (tmp_path / TRACKER).write_bytes(tracker if isinstance(tracker, bytes) else tracker.encode())
    assert latest(tmp_path) == iteration_folder(tmp_path, expected)


def test_nothing_there(tmp_path):
    assert latest(tmp_path / "missing") is None and published(tmp_path / "missing") == []
    (tmp_path / TRACKER).write_text("3")
    assert latest(tmp_path) is None


def test_keep_last(tmp_path):
    for iteration in (1, 2, 3, 9999999, 10000000):
        put(tmp_path, iteration)
    (tmp_path / "iter_0000004").mkdir()  # not ours: no manifest
    (tmp_path / ".trash-iter_0000000-x").mkdir()
    keep_last(tmp_path, 2)
    assert published(tmp_path) == [9999999, 10000000]
    assert not leftovers(tmp_path) and (tmp_path / "iter_0000004").is_dir()
    keep_last(tmp_path, 0)
    assert published(tmp_path) == [10000000] and latest(tmp_path) == tmp_path / "iter_10000000"


def test_killed_while_deleting(tmp_path):
    for iteration in (1, 2):
        put(tmp_path, iteration)

    def attempt_delete():
        shutil.rmtree = lambda *a, **k: kill()
        keep_last(tmp_path, 1)

    assert in_fork(attempt_delete) == -signal.SIGKILL
    assert published(tmp_path) == [2] and len(leftovers(tmp_path)) == 1
    verify(latest(tmp_path))
    keep_last(tmp_path, 1)
    assert not leftovers(tmp_path)


# Disks


def _exit_code(function, *args) -> int:
    code = 0
    try:
        function(*args)
    except StorageError as error:
        code = error.exit_code if "cannot write to" in error.what and error.do else 1
    os._exit(code)


def test_disk_full(tmp_path):
    """No file may grow beyond a limit, as on a full disk: nothing half-written is published."""
    put(tmp_path, 1)
    cfg = config(hidden_size=64, vocab_size=500)
    specs = tensor_specs(cfg)
    pieces = pieces_of_rank(specs, random_weights(specs), 0, 1, num_layers=cfg.num_layers)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        publish(tmp_path, 2, lambda staging: save_pieces(staging, pieces, distributed=False), group=single())

    assert in_fork(_exit_code, limited) == StorageError.exit_code
    assert published(tmp_path) == [1] and not leftovers(tmp_path)
    check_previous(tmp_path, "write")


def test_run_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        publish(tmp_path / "file" / "run", 1, write, group=single())


def test_read_only_folder():
    """Not in tmp_path, whose parents others than root may not enter."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        put(run, 1)

        def as_nobody():
            if os.getuid() == 0:
                os.chmod(name, 0o755)
                os.setuid(65534)
            else:
                os.chmod(run, 0o555)
            put(run, 2)

        assert in_fork(_exit_code, as_nobody) == StorageError.exit_code
        assert published(run) == [1]


def test_files_reach_the_disk_before_they_count(tmp_path, monkeypatch):
    """All files are synced before the rename, the rename before the tracker: a power cut leaves no empty shell."""
    events = []

    def note(owner, name, what):
        inner = getattr(owner, name)

        def noting(*args):
            events.append((name, what(*args)))
            return inner(*args)

        monkeypatch.setattr(owner, name, noting)

    note(os, "fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".tmp-")[0])
    note(os, "rename", lambda _, target: Path(target).name)
    note(os, "replace", lambda _, target: Path(target).name)
    put(tmp_path, 1)
    at = events.index(("rename", "iter_0000001"))
    assert {("fsync", name) for name in ("a.bin", "b.bin", "sub", f".{MANIFEST}", ".iter_0000001")} == {
        event for event in events[:at] if event[0] == "fsync"
    }
    assert events[at - 1] == ("fsync", ".iter_0000001") and ("replace", MANIFEST) in events[:at]
    run = tmp_path.name
    tracker = [("fsync", f".{TRACKER}"), ("replace", TRACKER), ("fsync", run)]
    assert events[at + 1 :] == [("fsync", run), *tracker]
