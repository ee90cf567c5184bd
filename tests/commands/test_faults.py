"""Whatever befalls a run while it saves or resumes, a resume reaches the last bit of the undisturbed run (docs/checkpoints.md, Faults)."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import LENGTH, World, before, flip, half_done, kill, killed_at, on_write
from torch import Tensor

from megatron_swift.checkpoint import publish as publishing
from megatron_swift.checkpoint.dcp import DcpFolder, Piece
from megatron_swift.checkpoint.manifest import MANIFEST, sum_file, write_manifest
from megatron_swift.checkpoint.publish import TRACKER, iteration_folder, publish, published
from megatron_swift.checkpoint.ranks import single
from megatron_swift.checkpoint.snapshot import Snapshot
from megatron_swift.train import loop
from megatron_swift.utils.errors import CheckpointError, Stopped, StorageError, UsageError

BESIDE = ("--async_save", "true")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(world):
    """Checkpoints 3, 6, 9 and 12; tests copy it."""
    return world.golden.run_dir


def of(iteration: int):
    """Whether a path or the last of two arguments is that iteration's folder."""
    return lambda *paths: Path(paths[-1]).name == f"iter_{iteration:07d}"


# F13 to F20: faults while saving


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("more", [(), BESIDE], ids=["", "async"])
def test_f13_killed_while_writing(world, tmp_path, rank, more):
    run = tmp_path / "run"
    assert world.disturb(run, on_write(rank, 6, lambda _: kill()), *more) is None
    # A rank 0 that lives on hears of it and tidies up.
    assert published(run) == [3] and len(half_done(run)) in ((1,) if rank == 0 else (0, 1))
    world.resume(run, *more, expected_start=3)
    assert published(run) == [3, 6, 9, 12]


def test_f14_killed_before_the_renaming(world, tmp_path):
    run = tmp_path / "run"
    assert world.disturb(run, before(os, "rename", of(6), kill)) is None
    (staging,) = run.glob(".iter_0000006.tmp-*")
    assert (staging / MANIFEST).is_file() and published(run) == [3]
    world.resume(run, expected_start=3)


def test_f14_killed_before_the_tracker(world, tmp_path):
    """The tracker decides, so 6, which is whole, is met again, looked through and kept."""
    run = tmp_path / "run"
    said = before(os, "replace", lambda _, target: Path(target).name == TRACKER and 6 in published(run), kill)
    assert world.disturb(run, said) is None
    assert published(run) == [3, 6] and (run / TRACKER).read_text() == "3"
    written = (iteration_folder(run, 6) / MANIFEST).stat().st_mtime_ns
    world.resume(run, expected_start=3)
    assert (iteration_folder(run, 6) / MANIFEST).stat().st_mtime_ns == written


def _no_space(_path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
def test_f15_one_writer_fails(world, tmp_path, rank):
    run = tmp_path / "run"
    error = world.disturb(run, on_write(rank, 6, _no_space))
    assert isinstance(error, StorageError) and "No space left on device" in str(error)
    assert published(run) == [3] and half_done(run) == []
    world.resume(run, expected_start=3)


def test_f15_a_failed_save_beside_training_is_said_and_the_next_one_is_made_in_front_of_it(world, tmp_path, capfd):
    run = tmp_path / "run"
    assert world.disturb(run, on_write(1, 6, _no_space), *BESIDE) is None
    assert published(run) == [3, 9, 12] and half_done(run) == []
    said = capfd.readouterr()
    assert "SAVING ITERATION 6 IN THE BACKGROUND FAILED" in said.err and "No space left on device" in said.err


def test_f15_a_failed_last_save_beside_training_ends_the_run_with_its_error(world, tmp_path):
    run = tmp_path / "run"
    error = world.disturb(run, on_write(0, LENGTH, _no_space), *BESIDE)
    assert isinstance(error, StorageError) and error.exit_code == 9
    assert published(run) == [3, 6, 9] and half_done(run) == []
    world.resume(run, expected_start=9)


def test_f16_back_to_back(world, tmp_path, capfd):
    """A checkpoint after every iteration, each slower to write than an iteration."""
    run = tmp_path / "run"
    slow = before(publishing, "write_manifest", lambda *_: True, lambda: time.sleep(0.1))
    assert world.disturb(run, slow, *BESIDE, "--save_interval", "1") is None
    out = capfd.readouterr().out
    saved = [line for line in out.splitlines() if line.startswith("saved")]
    assert [int(line.split("iter_")[1].split()[0]) for line in saved] == list(range(1, LENGTH + 1))
    assert all("training stood still for" in line for line in saved) and "for the checkpoint before" in saved[3]
    shutil.rmtree(iteration_folder(run, LENGTH))
    (run / TRACKER).write_text("7")
    world.resume(run, expected_start=7)


def test_f17_disk_full(world, tmp_path):
    """No file may grow beyond 20 kB from iteration 6 on, as on a full disk."""
    run = tmp_path / "run"

    def fill(_: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    error = world.disturb(run, on_write(1, 6, fill))
    assert isinstance(error, StorageError) and error.exit_code == 9 and "cannot write to" in error.what and error.do
    assert published(run) == [3] and half_done(run) == []
    world.resume(run, expected_start=3)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=4m tmpfs {disk} 2>/dev/null"):
        pytest.skip("a file system can be mounted by root only, and not in every container")
    yield disk
    os.system(f"umount {disk}")


def test_f17_a_disk_that_is_really_full(world, small_disk, tmp_path):
    run = small_disk / "run"
    error = world.disturb(run, lambda rank: None, "--save_interval", "1")
    assert isinstance(error, StorageError) and error.exit_code == 9
    assert published(run) and published(run)[-1] < LENGTH and half_done(run) == []
    world.resume(run, into=tmp_path / "elsewhere", expected_start=published(run)[-1])


def test_f18_a_folder_that_cannot_be_written(world, tmp_path):
    """Known before the first step."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        world.start(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write to"):
        world.start(tmp_path / "file" / "below")


def test_f18_the_folder_vanishes(world, tmp_path):
    """It is not made anew: it may be an unmounted disk, whose mount point is on a small one."""
    run = tmp_path / "run"
    gone = before(
        publishing, "_make", lambda staging: "iter_0000006" in staging.name, lambda: run.rename(tmp_path / "gone")
    )
    error = world.disturb(run, gone)
    assert isinstance(error, StorageError) and "the folder has vanished" in error.what and not run.exists()
    (tmp_path / "gone").rename(run)
    world.resume(run, expected_start=3)


def test_f19_killed_while_deleting(world, tmp_path):
    run = tmp_path / "run"
    limit = ("--save_total_limit", "2")
    dying = before(publishing.shutil, "rmtree", lambda folder, **_: ".trash-" in str(folder), kill)
    assert world.disturb(run, dying, *limit) is None
    assert published(run) == [6, 9] and len(half_done(run)) == 1
    world.resume(run, *limit, expected_start=9)
    assert published(run) == [9, 12]


def test_f20_the_same_iteration_again(world, finished, tmp_path, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / TRACKER).write_text("6")
    before_ = {path: path.stat().st_mtime_ns for path in run.glob("iter_*/*")}
    world.resume(run, expected_start=6)
    assert {path: path.stat().st_mtime_ns for path in run.glob("iter_*/*")} == before_
    out = capfd.readouterr().out
    assert out.count("\nkept ") == 2 and "\nsaved " not in out


def test_another_run_writes_there(world, finished, tmp_path):
    """A live run's half-written checkpoint is not removed, and nobody writes beside it."""
    run = shutil.copytree(finished, tmp_path / "run")
    live = run / ".iter_0000015.tmp-live"
    holder = os.fork()
    if holder == 0:
        with publishing.writing(run):
            live.mkdir()
            signal.pause()
    try:
        end = time.monotonic() + 20
        while not live.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(UsageError, match="another run is writing into"):
            world.start(run, "--load", str(run), "--finetune", "true")
        world.start(tmp_path / "elsewhere", "--load", str(run), "--finetune", "true", "--train_iters", "1")
        assert live.exists()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    world.start(tmp_path / "later", "--load", str(run), "--finetune", "true", "--train_iters", "1")
    assert not live.exists()  # its writer is gone


# F26 to F30: what a resume finds


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "f26 weights": ("__0_0.distcp", lambda path: flip(path, random.Random(1))),
    "f26 the other rank's": ("__1_0.distcp", lambda path: flip(path, random.Random(2))),
    "f26 .metadata": (".metadata", lambda path: flip(path, random.Random(3))),
    "f26 state": ("state.json", lambda path: flip(path, random.Random(4))),
    "f26 random numbers": ("rng_00001.json", lambda path: flip(path, random.Random(5))),
    "f26 manifest": (MANIFEST, lambda path: path.write_bytes(path.read_bytes().replace(b'"sum64"', b'"sum63"', 1))),
    "f27 truncated": ("__1_0.distcp", _truncate),
    "f27 empty": ("__0_0.distcp", lambda path: path.write_bytes(b"")),
    "f27 missing": ("__0_0.distcp", Path.unlink),
    "f27 no manifest": (MANIFEST, Path.unlink),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_f26_f27_damage_is_found_and_the_checkpoint_before_is_taken(world, finished, tmp_path, capfd, name):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("iter_0000012"))
    (run / TRACKER).write_text("9")
    file, damage = DAMAGE[name]
    damage(iteration_folder(run, 9) / file)
    world.resume(run, expected_start=6)
    said = capfd.readouterr().err
    assert said.count("FALLING BACK to the checkpoint before it") == 1 and file in said
    assert published(run) == [3, 6, 9, 12]


def test_f26_all_damaged(world, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for iteration in published(run):
        flip(iteration_folder(run, iteration) / "__1_0.distcp", random.Random(iteration))
    with pytest.raises(CheckpointError, match=r"iter_0000012.__1_0\.distcp is damaged") as error:
        world.resume(run)
    assert "iter_0000003" in error.value.why and error.value.exit_code == 4


@pytest.mark.parametrize("tracker", [None, b"", b"\x00\xff\xfe\n", b"../../etc", b"999", b"0"])
def test_f30_a_tracker_that_names_nothing(world, finished, tmp_path, capfd, tracker):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("iter_0000012"))
    (run / TRACKER).unlink()
    if tracker is not None:
        (run / TRACKER).write_bytes(tracker)
    world.resume(run, expected_start=9)
    assert "taking the newest published one, iteration 9" in capfd.readouterr().err


@pytest.mark.parametrize(
    "key",
    ["decoder.layers.mlp.linear_fc1.weight", "optimizer.state.exp_avg.decoder.final_layernorm.weight"],
)
def test_f28_a_tensor_of_another_precision(world, finished, tmp_path, key):
    """Whole, but not what the run would write: a cast would go unnoticed."""
    run, folder = tmp_path / "run", iteration_folder(finished, 9)
    files = DcpFolder(folder)
    pieces = []
    for name, stored in files.tensors.items():
        values = files.read(name, (0,) * len(stored.shape), stored.shape)
        values = values.to(torch.float16) if name == key else values
        pieces.append(
            Piece(name, partial(Tensor.clone, values), values.dtype, stored.shape, (0,) * values.dim(), stored.shape)
        )
    run.mkdir()
    others = {path.name: path.read_bytes() for pattern in ("state.json", "rng_*") for path in folder.glob(pattern)}
    publish(run, 9, lambda staging: Snapshot(pieces, others).write(staging, single()), group=single())
    with pytest.raises(CheckpointError, match=f"{key} is stored as float16, unlike the rest") as error:
        world.resume(run)
    assert error.value.exit_code == 4


def test_f25_another_model(world, finished, tmp_path):
    with pytest.raises(CheckpointError, match="made with another model: it differs in num_layers") as error:
        world.start(tmp_path / "run", "--load", str(finished), "--num_layers", "2")
    assert error.value.exit_code == 4


class _Canary:
    """Pickled as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "file",
    [".metadata", "optimizer/.metadata", "common.pt", "rng_00000.json", "state.json", "metadata.json", MANIFEST],
)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_no_pickle_runs(world, finished, tmp_path, file, ours):
    """Whatever file of a checkpoint is one, and whether there is a manifest that vouches for it or none at all."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    folder = shutil.copytree(iteration_folder(finished, 9), run / "iter_0000009")
    (run / TRACKER).write_text("9")
    (folder / file).write_bytes(pickle.dumps(_Canary(canary)))
    if file != MANIFEST:
        (folder / MANIFEST).unlink()
        if ours:
            files = [path for path in folder.rglob("*") if path.is_file()]
            write_manifest(folder, {str(path.relative_to(folder)): sum_file(path) for path in files})
        else:
            (folder / "state.json").unlink(missing_ok=True)
    more = ("--finetune", "true") if not ours else ()
    with contextlib.suppress(CheckpointError):
        world.start(
            tmp_path / "out", "--load", str(run), "--model", str(world.place / "model"), "--train_iters", "10", *more
        )
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Canary(canary)))
    assert canary.exists(), "the file would have been a real danger"


# F34, here without a launcher, and F50


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_f34_a_rank_is_told_to_stop(world, tmp_path, rank, number):
    """All ranks save the iteration they are in and end with 75."""
    run, seen = tmp_path / "run", []

    def told(*_: object) -> bool:
        seen.append(1)
        return len(seen) == 5

    error = world.disturb(
        run, before(loop, "train_step", told, lambda: os.kill(os.getpid(), number), rank=rank), *BESIDE
    )
    assert isinstance(error, Stopped) and error.exit_code == 75
    assert f"{number.name} at iteration 5" in error.what and published(run) == [3, 5]
    world.resume(run, expected_start=5)


def _killed_at_random(world: World, run: Path, seed: int) -> None:
    """Killed at any time, perhaps twice, perhaps before there was anything to resume."""
    generator = random.Random(seed)
    more = BESIDE if generator.random() < 0.5 else ()
    kills = generator.choice([1, 1, 2])
    load: tuple[str, ...] = ()
    for _ in range(kills):
        fault = killed_at(generator.uniform(0, world_seconds(world)), generator.randrange(2))
        world.disturb(run, fault, *more, "--save_interval", "2", *load)
        load = ("--load", str(run), "--model", str(world.place / "model"), "--exit_on_missing_checkpoint", "false")
        if LENGTH in published(run):
            break
    if LENGTH in published(run):  # it came too late
        world.check(run)
        return
    world.resume(run, *more)


def world_seconds(world: World) -> float:
    """How long a run takes here and now."""
    if not hasattr(world, "seconds"):
        began = time.monotonic()
        world.start(world.place / "timed", "--save_interval", "2")
        world.seconds = time.monotonic() - began
    return world.seconds


@pytest.mark.parametrize("seed", range(4))
def test_f50_killed_at_a_random_time(world, tmp_path, seed):
    _killed_at_random(world, tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 34))
def test_f50_killed_at_random_times(world, tmp_path, seed):
    _killed_at_random(world, tmp_path / "run", seed)
