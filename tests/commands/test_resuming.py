"""Going on with --load auto: a stopped job, a finished one, damaged ones, and machines that do not see the same."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from faults import before
from runs import _rank, contents, differences, go, set_up, write_rows

from megatron_swift.checkpoint.publish import TRACKER, iteration_folder, published
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train import loop
from megatron_swift.utils.errors import CheckpointError, DataError, Stopped, UsageError
from megatron_swift.utils.log import set_up_logging

LENGTH = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming")
    make_tiny_model(folder / "model", dtype="bfloat16", layers=1)
    write_rows(folder / "rows.jsonl")
    return folder


def command(place, save, *more):
    """The one command line that a scheduler starts again and again."""
    set_up_logging()  # onto the stderr of this test
    source = ("--model", str(place / "model"), "--dataset", str(place / "rows.jsonl"))
    lengths = ("--train_iters", str(LENGTH), "--lr_decay_iters", str(LENGTH), "--lr_warmup_iters", "2")
    return (*source, *lengths, "--save", str(save), "--load", "auto", *more)


@pytest.fixture(scope="module")
def golden(place, tmp_path_factory):
    """The undisturbed run of two ranks."""
    return go(*command(place, tmp_path_factory.mktemp("golden")), ranks=2)


def folders(save):
    return sorted(path.name for path in save.iterdir())


def _stopped(rank, setup, iteration):
    """A rank of a run to which SIGTERM is sent in an iteration."""
    seen = []

    def now(*_: object) -> bool:
        seen.append(1)
        return len(seen) == iteration

    before(loop, "train_step", now, lambda: os.kill(os.getpid(), signal.SIGTERM), rank=1)(rank)
    return _rank(rank, setup)


@pytest.mark.parametrize("add_version", ["true", "false"])
def test_a_stopped_job_started_again_is_the_undisturbed_one(place, golden, tmp_path, add_version):
    """Twice stopped with exit code 75, three times the same command: bit for bit."""
    words = command(place, tmp_path, "--add_version", add_version)
    steps = []
    for count in (2, 1):
        results = run_ranks(_stopped, 2, set_up(*words, ranks=2), count, timeout=60)
        errors = [error for _, error in results]
        assert all(isinstance(error, Stopped) and error.exit_code == 75 for error in errors)
        assert "--load auto" in errors[0].do
        steps += results[0][0]
    last = go(*words, ranks=2)
    assert len(steps) == 3 and steps + last.steps == golden.steps
    assert differences(contents(golden.run_dir, LENGTH), contents(last.run_dir, LENGTH)) == []
    if add_version == "false":
        assert last.run_dir == tmp_path and published(tmp_path) == [2, 3, LENGTH]
    else:
        assert [name[:3] for name in folders(tmp_path)] == ["v0-", "v1-", "v2-"]


@pytest.mark.parametrize("iters", [LENGTH, LENGTH - 1])
def test_a_finished_job_started_again_has_nothing_to_do(place, golden, capfd, iters):
    """No error, one line, and no folder."""
    save = golden.run_dir.parent
    there, before_it = folders(save), contents(golden.run_dir, LENGTH)
    capfd.readouterr()
    again = go(*command(place, save, "--train_iters", str(iters)), ranks=2)
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("nothing left to train")]
    assert said == [
        f"nothing left to train: {iteration_folder(golden.run_dir, LENGTH)} stands at iteration {LENGTH}, --train_iters is {iters}"
    ]
    assert again.steps == [] and not again.run_dir.exists() and folders(save) == there
    assert differences(before_it, contents(golden.run_dir, LENGTH)) == []


def test_a_finished_job_in_the_users_own_folder(place, tmp_path):
    """--add_version false: what is there stays."""
    words = command(place, tmp_path, "--add_version", "false")
    whole = contents(go(*words).run_dir, LENGTH)
    (tmp_path / "notes.txt").write_text("mine")
    assert go(*words).steps == []
    assert (tmp_path / "notes.txt").exists() and published(tmp_path) == [LENGTH]
    assert differences(whole, contents(tmp_path, LENGTH)) == []


def test_finished_but_more_is_asked_for(place, golden, tmp_path):
    save = shutil.copytree(golden.run_dir.parent, tmp_path / "copy")
    more = go(*command(place, save, "--train_iters", str(LENGTH + 1)), ranks=2)
    assert len(more.steps) == 1 and published(more.run_dir) == [LENGTH + 1]


def test_a_named_run_without_anything_left_is_an_error(place, golden, tmp_path):
    """Whoever types a folder wants it trained. No folder is left of the attempt."""
    with pytest.raises(UsageError, match=f"stands at iteration {LENGTH} already"):
        go(*command(place, tmp_path), "--load", str(golden.run_dir))
    assert folders(tmp_path) == []


def test_refused_data_leave_no_folder(place, golden, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "rows.jsonl", 30)
    (other / "model").symlink_to(place / "model")
    words = (*command(other, tmp_path / "out"), "--load", str(golden.run_dir), "--train_iters", "9")
    with pytest.raises(DataError, match="are not those of"):
        go(*words, ranks=2)
    assert folders(tmp_path / "out") == []


def damage(run):
    for iteration in published(run):
        (iteration_folder(run, iteration) / "state.json").write_text("{")


def test_a_damaged_run_falls_back_to_the_one_before(place, golden, tmp_path, capfd):
    save = tmp_path / "out"
    old = shutil.copytree(golden.run_dir, save / "v0-20260101-000000")
    damage(shutil.copytree(old, save / "v1-20260101-000000"))
    run = go(*command(place, save, "--train_iters", str(LENGTH + 1)), ranks=2)
    assert len(run.steps) == 1 and run.run_dir.name.startswith("v2-")
    assert (
        "v1-20260101-000000" in (text := capfd.readouterr().err)
        and f"FALLING BACK to the checkpoint before it, {old}" in text
    )


def test_all_are_damaged(place, golden, tmp_path):
    """Never a silent new start."""
    save = tmp_path / "out"
    for name in ("v0-20260101-000000", "v1-20260101-000000"):
        damage(shutil.copytree(golden.run_dir, save / name))
    with pytest.raises(CheckpointError, match=r"v1-20260101-000000/iter_0000006/state.json is damaged") as error:
        go(*command(place, save))
    assert error.value.exit_code == 4 and "those before it are damaged too" in error.value.why


def test_a_tracker_without_checkpoints(place, tmp_path):
    run = tmp_path / "v0-20260101-000000"
    run.mkdir()
    (run / TRACKER).write_text("3")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint|iter_0000003"):
        go(*command(place, tmp_path))


def _on_two_disks(rank, setup, loads):
    """A rank whose machine has found a checkpoint of its own with --load auto, or none."""
    return _rank(rank, dataclasses.replace(setup, load=loads[rank]))


def refused(setup, loads: list[Path | None]):
    results = run_ranks(_on_two_disks, 2, setup, loads, timeout=60)
    errors = [error for _, error in results]
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    return errors[0]


@pytest.mark.parametrize("blind", [0, 1])
def test_a_machine_that_sees_no_checkpoint(place, golden, tmp_path, blind):
    """The ranks would train different models."""
    setup = set_up(*command(place, tmp_path), ranks=2)
    error = refused(setup, [None if rank == blind else golden.run_dir for rank in range(2)])
    assert f"ranks [{blind}] see no checkpoint to start from, the others do" in error.what
    assert "docs/checkpoints.md" in error.do


def test_machines_that_see_different_runs(place, golden, tmp_path):
    """Each is whole, and of the same name; a mixture of both is nothing."""
    other = go(*command(place, tmp_path / "other", "--lr", "2e-2"), ranks=2)
    setup = set_up(*command(place, tmp_path / "out", "--train_iters", "9"), ranks=2)
    error = refused(setup, [golden.run_dir, other.run_dir])
    assert "ranks [1] see another checkpoint under this name than rank 0" in error.what
