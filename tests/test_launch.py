"""Ranks that fail: one error block and the right exit code, whatever happened on how many of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_swift import launch
from megatron_swift.checkpoint.publish import latest
from megatron_swift.launch import FAILURES, guarded, torchrun_options, wants_torchrun
from megatron_swift.testing import free_port, make_tiny_model
from megatron_swift.utils.errors import DataError, NonFiniteError, UsageError
from scripts import Said, call, command, environment


@pytest.mark.parametrize(
    ("env", "wanted", "options"),
    [
        ({}, False, None),
        ({"NPROC_PER_NODE": "", "NNODES": ""}, False, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False, None),
        ({"NPROC_PER_NODE": "2"}, True, ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]),
        ({"NPROC_PER_NODE": "2", "MASTER_PORT": "29501"}, True, ["--nproc_per_node=2", "--master_port=29501"]),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5", "NPROC_PER_NODE": "8"},
            True,
            ["--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--master_addr=a", "--master_port=5"],
        ),
    ],
)
def test_torchrun_options(env, wanted, options):
    assert wants_torchrun(env) == wanted
    if wanted:
        found = torchrun_options(env)
        assert [option for option in found if not option.startswith("--rdzv_id=")] == options
        assert any(option.startswith("--rdzv_id=") for option in found) == ("--rdzv_backend=c10d" in options)


def leave(folder: Path, rank: int, when: float, code: int, block: str) -> None:
    (folder / f"rank{rank}.json").write_text(json.dumps({"time": when, "exit_code": code, "block": block}))


@pytest.mark.parametrize(
    ("written", "codes", "code", "said"),
    [
        ([(1, 5.0, 4, "error: first"), (0, 6.0, 7, "error: later")], {0: 7, 1: 4}, 4, "error: first\n"),
        ([], {0: 1}, 7, "error: the training processes ended with {0: 1}\n"),
        # Killed from outside: the other rank reports a broken connection.
        (
            [(0, 5.0, 7, "error: peer closed")],
            {0: 7, 1: -9},
            7,
            "error: rank 1 was killed by SIGKILL\n  why : the system may have run out of memory\n",
        ),
        ([], {0: -15, 1: -11}, 7, "error: rank 1 was killed by SIGSEGV\n"),
        ([], {1: -11, 0: -15}, 7, "error: rank 1 was killed by SIGSEGV\n"),
        # torchrun ends the others with SIGTERM once one has failed.
        ([(1, 5.0, 3, "error: data")], {0: -15, 1: 3}, 3, "error: data\n"),
        ([], {0: -15}, 7, "error: rank 0 was killed by SIGTERM\n"),
        ([(1, 5.0, 7, "error: odd")], {0: -15, 1: 7}, 7, "error: odd\n"),
        # An abort for want of a peer, which had said why it went.
        ([(1, 5.0, 4, "error: damaged")], {0: -6, 1: 4}, 4, "error: damaged\n"),
        ([(1, 5.0, 7, "error: peer closed")], {0: -6, 1: 7}, 7, "error: rank 0 was killed by SIGABRT\n"),
    ],
)
def test_report(tmp_path, capsys, written, codes, code, said):
    for failure in written:
        leave(tmp_path, *failure)
    assert launch._report(tmp_path, codes) == code
    assert capsys.readouterr().err == said


def _raise(error: BaseException):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("w", why="y", do="d"), 2, "error: w\n  why : y\n  do  : d\n"),
        (DataError("w"), 3, "error: w\n"),
        (NonFiniteError("w"), 5, "error: w\n"),
        (ValueError("odd"), 7, "error: a failure of the program: ValueError: odd"),
        (RuntimeError("not enough memory: tried 8 GB. More"), 8, "error: out of memory: not enough memory: tried 8 GB"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_guarded(error, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(FAILURES, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert guarded(_raise(error)) == code
    assert words in capsys.readouterr().err
    monkeypatch.setenv(FAILURES, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert guarded(_raise(error)) == code
    assert capsys.readouterr().err == ""  # a rank leaves its block to the launcher
    if words:
        left = json.loads((tmp_path / "rank3.json").read_text())
        assert left["exit_code"] == code and words.split(":")[0] in left["block"]


# Real launches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    make_tiny_model(folder / "model")
    rows = [{"query": f"who is {i}", "response": "it is you " * (1 + i % 5)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SFT = (
    "megatron",
    "sft",
    "--dataset",
    "rows.jsonl",
    "--global_batch_size",
    "4",
    "--num_workers",
    "0",
    "--report_to",
    "none",
)


def test_weights_that_are_not_numbers(place):
    """Both ranks find the loss not finite; one block, exit code 5, and no checkpoint of it."""
    poisoned = shutil.copytree(place / "model", place / "poisoned")
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, poisoned / "model.safetensors")
    said = call(*SFT, "--model", "poisoned", "--train_iters", "9", "--save", "nan", cwd=place, NPROC_PER_NODE="2")
    assert said.code == 5, said.err
    assert len(said.blocks) == 1 and "is not finite for 4 steps in a row" in said.blocks[0] and "--lr" in said.blocks[0]
    assert "Traceback" not in said.err
    (run,) = (place / "nan").iterdir()
    assert latest(run) is None
    line = json.loads((run / "logging.jsonl").read_text().splitlines()[0])
    assert line["lm loss"] is None and line["skipped_iterations"] == 1


@pytest.fixture(scope="module")
def trained(place):
    """A run of two ranks, by the launcher."""
    said = call(*SFT, "--model", "model", "--train_iters", "2", "--save", "good", cwd=place, NPROC_PER_NODE="2")
    assert said.code == 0, said.err
    assert "cpu x 2, backend gloo" in said.out and said.out.count("iteration        2/") == 1 and not said.blocks
    (run,) = (place / "good").iterdir()
    return run


def test_damaged_checkpoint_found_by_the_ranks(place, trained):
    path = shutil.copytree(trained, place / "damaged") / "iter_0000002" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    flags = ("--load", "damaged", "--train_iters", "4", "--save", "out")
    said = call(*SFT, *flags, cwd=place, NPROC_PER_NODE="2")
    assert said.code == 4, said.err
    assert len(said.blocks) == 1 and "__1_0.distcp is damaged" in said.blocks[0] and "Traceback" not in said.err


def children(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found += children(int(stat.parent.name))
    return found


def rank_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes()
        if b"megatron_swift.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return next((e[5:].decode() for e in text.split(b"\0") if e.startswith(b"RANK=")), None)
    return None


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Interrupted:
    """A long run of two ranks; `at(line)` waits until it has printed that, `ended()` until it is over."""

    def __init__(self, place: Path, save: str):
        flags = (
            "--model",
            "model",
            "--train_iters",
            "100000",
            "--save",
            save,
            "--save_interval",
            "20",
            "--log_interval",
            "10",
        )
        self.process = subprocess.Popen(
            command(*SFT, *flags),
            cwd=place,
            env=environment(NPROC_PER_NODE="2", PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.place = place
        assert self.process.stdout
        if not any(line.startswith("saved") for line in self.process.stdout):
            pytest.fail(self.process.communicate()[1])
        self.pids = children(self.process.pid)
        self.ranks = {rank: pid for pid in self.pids if (rank := rank_of(pid)) is not None}
        assert sorted(self.ranks) == ["0", "1"]

    def ended(self, seconds: float) -> Said:
        """It ends in time and leaves no process."""
        began = time.monotonic()
        out, err = self.process.communicate(timeout=60)
        assert time.monotonic() - began < seconds
        while any(map(alive, self.pids)) and time.monotonic() - began < seconds:
            time.sleep(0.1)
        assert not [pid for pid in self.pids if alive(pid)]
        return Said(self.process.returncode, out, err)


def test_killed_rank(place):
    """Exit code 7, the rank and the signal in one block, soon, and the last checkpoint is good."""
    run = Interrupted(place, "killed")
    os.kill(run.ranks["1"], signal.SIGKILL)
    said = run.ended(15)
    assert said.code == 7, said.err
    assert len(said.blocks) == 1 and said.blocks[0].startswith("error: rank 1 was killed by SIGKILL")
    (folder,) = (place / "killed").iterdir()
    checkpoint = latest(folder)
    assert checkpoint is not None
    assert int(checkpoint.name.removeprefix("iter_")) % 20 == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_told_to_stop(place, number, whom):
    """F34: the ranks save the iteration they are in; 75 tells a scheduler to start the run again."""
    run = Interrupted(place, f"told{whom}{number}")
    for pid in [run.process.pid] if whom == "launcher" else run.pids:
        os.kill(pid, number)
    said = run.ended(60)
    assert said.code == 75 and "Traceback" not in said.err, said.err
    (folder,) = (place / f"told{whom}{number}").iterdir()
    saved = latest(folder)
    assert saved is not None and not list(folder.glob(".iter_*"))
    iteration = int(saved.name.removeprefix("iter_"))
    assert f"stopped: {number.name} at iteration {iteration}, which is saved in {folder}" in said.err
    flags = ("--load", folder, "--train_iters", iteration + 1, "--save", "again", "--num_workers", "0")
    assert call(*SFT, *flags, cwd=place, NPROC_PER_NODE="2").code == 0


def test_two_nodes_without_a_shared_disk(place):
    """F40: it is said at the start; each node has its own part, and together they are a checkpoint."""
    port = str(free_port())
    nodes = []
    for node in ("0", "1"):
        flags = ("--model", "model", "--train_iters", "2", "--save", f"node{node}")
        env = environment(
            NNODES="2", NODE_RANK=node, NPROC_PER_NODE="1", MASTER_ADDR=socket.gethostname(), MASTER_PORT=port
        )
        pipe = subprocess.PIPE
        nodes.append(subprocess.Popen(command(*SFT, *flags), cwd=place, env=env, stdout=pipe, stderr=pipe, text=True))
    said = [process.communicate(timeout=120) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert "--save is no shared disk: ranks [0] and [1] each write to one of their own" in said[0][1]
    folders = [next((place / f"node{node}").iterdir()) for node in (0, 1)]
    assert folders[0].name == folders[1].name
    parts = [folder / "iter_0000002" for folder in folders]
    files = [{path.name for path in part.iterdir()} for part in parts]
    assert files[0] - files[1] == {"__0_0.distcp"} and files[1] - files[0] == {"__1_0.distcp", "rng_00001.json"}
    assert (parts[0] / "manifest.json").read_bytes() == (parts[1] / "manifest.json").read_bytes()
    flags = ("--load", folders[1], "--model", "model", "--train_iters", "3", "--save", "merged")
    alone = call(*SFT, *flags, cwd=place, NPROC_PER_NODE="2")
    assert alone.code == 4 and "__0_0.distcp is missing" in alone.err and "another node" in alone.err
    shutil.copytree(parts[0], parts[1], dirs_exist_ok=True)
    merged = call(*SFT, *flags, cwd=place, NPROC_PER_NODE="2")
    assert merged.code == 0, merged.err


def test_a_bad_row_that_a_loader_process_meets(place, tmp_path):
    """Said once, in its own words, and the run ends: one process, with loader processes that ignore SIGTERM."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "who", "response": "me"}\n' * 200 + "{\n")
    command = [path if word == "rows.jsonl" else word for word in SFT]
    flags = ("--model", "model", "--streaming", "true", "--train_iters", "200", "--num_workers", "1")
    said = call(*command, *flags, "--save", tmp_path / "out", cwd=place)
    assert said.code == 3, said.err
    assert said.err.count(f"{path}:201: bad JSON") == 1 and "Traceback" not in said.err


@pytest.mark.slow
def test_launcher_is_told_to_stop_at_once(place):
    run = Interrupted(place, "stopped")
    run.process.send_signal(signal.SIGINT)
    number, code = signal.SIGINT, 130
    said = run.ended(40)
    assert said.code == code and "Traceback" not in said.err and f"stopped by {number.name}" in said.err


@pytest.mark.slow
def test_launcher_is_killed(place):
    """Its ranks do not live on."""
    run = Interrupted(place, "orphans")
    run.process.kill()
    said = run.ended(15)
    assert said.code == -signal.SIGKILL
