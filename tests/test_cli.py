"""The command line: what is refused is refused at once, before torch is imported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from megatron_swift import __version__
from megatron_swift.cli import main
from megatron_swift.testing import make_tiny_model
from scripts import call, command, environment

ROW = {"query": "who is it", "response": "it is you"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, good rows, a bad row and a folder that holds nothing."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_model(folder / "model")
    good = json.dumps(ROW) + "\n"
    (folder / "rows.jsonl").write_text(good * 20)
    (folder / "bad.jsonl").write_text(good * 6 + '{"query": 5}\n' + good)
    (folder / "empty").mkdir()
    (folder / "garbage").mkdir()
    (folder / "garbage" / "latest_checkpointed_iteration.txt").write_text("../..")
    (folder / "file").write_text("")
    (folder / "run.yaml").write_text(
        "model: model\ndataset: [rows.jsonl]\ntrain_iters: 4\nmicro_batch_size: 2\nglobal_batch_size: 7\nsave: out\n"
    )
    return folder


SFT = ("megatron", "sft", "--model", "model", "--train_iters", "2")
GOOD = (*SFT, "--dataset", "rows.jsonl")
REFUSED = [
    (("megatron", "sft", "--trian_iters", "1"), 2, ["unknown parameter --trian_iters", "did you mean --train_iters?"]),
    (("megatron", "rlhf", "--model", "x"), 2, ["megatron rlhf is not built yet", "megatron sft"]),
    (("megatron", "stf"), 2, ["megatron has no command 'stf'", "did you mean sft?"]),
    (("swift", "sft"), 2, ["swift has no command 'sft'", "commands: export, infer"]),
    (("swift", "merge_lora"), 2, ["swift merge_lora is not built yet"]),
    ((*GOOD, "--tensor_model_parallel_size", "4"), 2, ["2 processes cannot be split", "tensor_model_parallel_size 4"]),
    ((*GOOD, "--ckpt_format", "zarr"), 2, ["--ckpt_format zarr", "read, but not written", "use torch_dist or torch"]),
    ((*GOOD, "--lr", "fast"), 2, ["--lr", "fast"]),
    (
        (*GOOD, "--global_batch_size", "7", "--micro_batch_size", "2"),
        2,
        ["--global_batch_size 7", "--global_batch_size 4 or 8"],
    ),
    (SFT, 2, ["no training data"]),
    ((*SFT, "--dataset", "missing.jsonl"), 3, ["missing.jsonl does not exist"]),
    ((*SFT, "--dataset", "bad.jsonl"), 3, ["bad.jsonl:7", "--strict"]),
    (("megatron", "sft", "--load", "nowhere", "--dataset", "rows.jsonl", "--train_iters", "2"), 2, ["--load nowhere"]),
    (
        ("megatron", "sft", "--load", "empty", "--dataset", "rows.jsonl", "--train_iters", "2"),
        2,
        ["holds no checkpoint"],
    ),
    (("megatron", "sft", "--config", "missing.yaml"), 2, ["missing.yaml"]),
    (("megatron", "sft", "--config", "run.yaml"), 2, ["--global_batch_size 7"]),
    ((*GOOD, "--save", "file"), 9, ["cannot write to", "file"]),
    (("swift", "export", "--to_mcore", "true"), 2, ["needs the model to convert"]),
    (("swift", "export", "--model", "model", "--to_mcore", "true", "--output_dir", "empty/../file"), 2, ["is a file"]),
    (("swift", "infer", "--model", "model"), 2, ["2 processes cannot be used", "unset NPROC_PER_NODE"]),
]
ALL = """
import json, sys
from megatron_swift.cli import main
for argv in json.load(sys.stdin):
    print("code", main(argv[0], argv[1:]), flush=True)
    print("---", file=sys.stderr, flush=True)
print("torch", "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def refused(place):
    """Each command's (exit code, stderr), all run in one process; and whether that process has imported torch."""
    argvs = json.dumps([argv for argv, *_ in REFUSED])
    env = environment(NPROC_PER_NODE="2")
    done = subprocess.run(
        [sys.executable, "-c", ALL],
        cwd=place,
        env=env,
        input=argvs,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("code ")]
    return list(zip(codes, done.stderr.split("---\n"), strict=False)), done.stdout.splitlines()[-1]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda n: " ".join(REFUSED[n][0][:2] + REFUSED[n][0][-2:]))
def test_refused(refused, number):
    """One block that says what and what to do, once, although two ranks are asked for."""
    _, expected, words = REFUSED[number]
    code, said = refused[0][number]
    assert (code, said.count("error: ")) == (expected, 1), said
    for word in words:
        assert word in said
    assert "Traceback" not in said


def test_refused_without_torch(refused):
    assert refused[1] == "torch False"


def test_nothing_is_left_behind(refused, place):
    assert not (place / "out").exists() and not (place / "megatron_output").exists()


def test_overview_and_version(capsys):
    assert main("megatron", []) == 2
    assert main("megatron", ["--help"]) == 0
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second and "sft" in first and "megatron COMMAND --help" in first
    assert main("swift", ["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-swift {__version__}\n"


@pytest.mark.parametrize(("program", "name"), [("megatron", "sft"), ("swift", "export"), ("swift", "infer")])
def test_help(program, name, capsys):
    assert main(program, [name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"{program} {name}" in out and "--model" in out


def spent_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick(tmp_path):
    """Half a second of a processor, at best of three: torch alone takes longer."""
    times = []
    for _ in range(3):
        began = spent_by_children()
        done = subprocess.run(command("megatron", "sft", "--help"), capture_output=True, env=environment(), check=True)
        times.append(spent_by_children() - began)
    assert min(times) < 0.5 and b"--tensor_model_parallel_size" in done.stdout


def test_help_into_a_closed_pipe():
    """`megatron sft --help | head -1` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command("megatron", "sft", "--help"), stdout=write, stderr=subprocess.PIPE, env=environment(), check=False
    )
    os.close(write)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_config_file_and_flag(place):
    """A flag wins over the file; the file's settings reach the run."""
    said = call("megatron", "sft", "--config", "run.yaml", "--global_batch_size", "4", "--report_to", "none", cwd=place)
    assert said.code == 0, said.err
    (run,) = (place / "out").iterdir()
    args = json.loads((run / "args.json").read_text())
    assert (args["train_iters"], args["micro_batch_size"], args["global_batch_size"]) == (4, 2, 4)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4"
