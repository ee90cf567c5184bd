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
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import config, pieces_of_rank, random_weights

from megatron_swift.checkpoint import publish as publishing
from megatron_swift.checkpoint.dcp import save_pieces
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.publish import (
    MANIFEST,
    TRACKER,
    Group,
    iteration_folder,
    keep_last,
    latest,
    publish,
    published,
    single,
    verify,
)
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import CheckpointError, StorageError

CONTENT = {"a.bin": b"first", "sub/b.bin": b"second" * 1000}


def write(staging: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(data)


def put(run: Path, iteration: int, **kwargs: object) -> Path:
    return publish(run, iteration, write, group=single(), **kwargs)


def leftovers(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob(".*"))


def test_appears_whole(tmp_path):
    run = tmp_path / "run"
    seen = []

    def look(staging):
        write(staging)
        seen.append((published(run), latest(run), [p.name for p in run.iterdir() if not p.name.startswith(".")]))

    final = publish(run, 100, look, group=single(), finish=lambda staging: look(staging) or write(staging, {"c": b"3"}))
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
    final = publish(tmp_path, 6, lambda staging: write(staging, {"a.bin": b"other"}), group=single())
    assert final == tmp_path / "iter_0000006" and {p: p.read_bytes() for p in before} == before
    assert (tmp_path / TRACKER).read_text() == "6" and not leftovers(tmp_path)
    assert "published already and is kept" in caplog.text


def test_a_folder_in_the_way(tmp_path):
    """Megatron's own, of the same number: it is not ours to replace."""
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "theirs").write_text("x")
    with pytest.raises(StorageError, match=r"iter_0000002: Directory not empty"):
        put(tmp_path, 2)
    assert [p.name for p in (tmp_path / "iter_0000002").iterdir()] == ["theirs"] and not leftovers(tmp_path)


# Crashes. Each point is a function that publishing calls; the process dies (or raises) right before it.

POINTS = ["mkdir", "write", "finish", "digest", "write_text", "rename", "fsync_folder", "replace_tracker"]


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
        case "digest" | "write_text":
            before(publishing, point)
        case "fsync_folder":
            before(publishing, "fsync_folder")
        case "rename":
            before(os, "rename")
        case "replace_tracker":
            before(os, "replace", lambda source, target: Path(target).name == TRACKER)


def attempt(run: Path, iteration: int, point: str, action) -> None:
    def stage(staging):
        write(staging)
        if point == "write":
            action()

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
    there = [1, 2] if point in ("fsync_folder", "replace_tracker") else [1]
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

    def gather(value):
        values = [None, None]
        dist.all_gather_object(values, value)
        return values

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
        save_pieces(staging, pieces, distributed=True)
        if rank == broken_rank and where == "after":
            _no_space()

    try:
        publish(run, 1, stage, group=Group(rank, gather))
    except BaseException as error:  # CheckpointException is no Exception
        first = type(error).__name__, str(error)
    else:
        first = "", ""
    publish(
        run,
        2,
        lambda staging: save_pieces(
            staging, pieces_of_rank(specs, weights, rank, 2, num_layers=cfg.num_layers), distributed=True
        ),
        group=Group(rank, gather),
    )
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


# Damage


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    run = tmp_path_factory.mktemp("good")
    cfg = config()
    specs = tensor_specs(cfg)
    pieces = pieces_of_rank(specs, random_weights(specs), 0, 1, num_layers=cfg.num_layers)
    return publish(run, 7, lambda staging: save_pieces(staging, pieces, distributed=False), group=single())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(good, data):
    names = sorted(str(p.relative_to(good)) for p in good.rglob("*") if p.is_file() and p.name != MANIFEST)
    path = good / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    for damaged in (bytes(changed), content[: at // 8], content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged") as error:
            verify(good)
        assert error.value.exit_code == 4
    path.write_bytes(content)
    verify(good)


def test_missing_file(good):
    path = good / "metadata.json"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing"):
        verify(good)
    path.write_bytes(content)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_flipped_bits_of_the_manifest(good, data):
    """Found, or without meaning (spaces, the format's number); never another exception."""
    path = good / MANIFEST
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    path.write_bytes(changed)
    try:
        verify(good)
    except CheckpointError as error:
        found = str(error)
    else:
        found = ""
    path.write_bytes(content)
    meaningless = content[at // 8 : at // 8 + 1] in b' \n1"format:'
    assert found or meaningless
    assert not found or "use another checkpoint" in found or str(good) in found


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"{}", b'{"files": []}', b'{"files": {"a": 1}}', b"\xff"])
def test_manifest_that_is_none(good, content):
    path = good / MANIFEST
    before = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(good)
    path.write_bytes(before)


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
        put(tmp_path / "file" / "run", 1)


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
    """The manifest is synced before the rename, the rename before the tracker: a power cut leaves no empty shell."""
    events = []
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, inner=inner: events.append(name) or inner(*a))
    put(tmp_path, 1)
    at = events.index("rename")
    assert events[:at] == ["fsync", "replace", "fsync"]  # manifest: file, rename, folder
    assert events[at + 1 :] == ["fsync", "fsync", "replace", "fsync"]  # run folder; tracker: file, rename, folder
