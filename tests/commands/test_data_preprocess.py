"""`megatron preprocess`: a training run with the same flags finds the rows; Megatron's indexed data goes there and back."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from megatron_swift.args.commands import PreprocessArguments, PtArguments, SftArguments, parse
from megatron_swift.commands import preprocess
from megatron_swift.commands.setup import prepare_run
from megatron_swift.data.indexed import IndexedFile
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import UsageError

CHATS = [{"query": f"question {n}", "response": f"answer {n} " * (n % 7 + 1)} for n in range(40)]
TEXTS = [{"text": f"document {n} " * (n % 9 + 1)} for n in range(40)]
RUN = (
    "--max_length",
    "96",
    "--train_iters",
    "2",
    "--micro_batch_size",
    "1",
    "--global_batch_size",
    "2",
    "--lr",
    "1e-4",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pre")
    make_tiny_model(folder / "model")
    for name, rows in (("chats", CHATS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def prepared(place, tmp_path, monkeypatch, caplog, capsys):
    """Runs `megatron preprocess` with these flags and gives what it printed."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MEGATRON_SWIFT_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)

    def run(*flags: str) -> str:
        preprocess.run(parse(PreprocessArguments, ["--model", "model", *flags]))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (SftArguments, ("--dataset", "chats.jsonl", *RUN)),
        (SftArguments, ("--dataset", "chats.jsonl", *RUN, "--packing", "true", "--dataset_num_proc", "2")),
        (PtArguments, ("--dataset", "texts.jsonl", *RUN)),
        (PtArguments, ("--dataset", "texts.jsonl", *RUN, "--truncation_strategy", "delete")),
    ],
)
def test_a_run_finds_the_rows(prepared, tmp_path, caplog, command, flags):
    out = prepared(*flags, "--prepare_for", command.prog.split()[-1])
    folder = next(line for line in out.splitlines() if line.startswith("the rows are in ")).split()[-1]
    assert "40 rows read" in out
    assert "data cache: miss" in caplog.text
    caplog.clear()
    setup = prepare_run(parse(command, ["--model", "model", *flags, "--save", str(tmp_path / "run")]), {})
    assert "data cache: hit" in caplog.text
    assert str(setup.data) == folder


def test_indexed_data_there_and_back(prepared, place, tmp_path, capsys):
    prefix = tmp_path / "texts é 1"
    out = prepared("--dataset", "texts.jsonl", "--prepare_for", "pt", "--output_prefix", str(prefix))
    assert "40 documents are in" in out and f"--data_path '{prefix}'" in out
    file = IndexedFile(prefix)
    assert len(file) == 40  # in the files' order, each with its end token
    ends = {int(file.read(number)[-1]) for number in range(40)}
    assert len(ends) == 1
    assert not any(end in file.read(number)[:-1] for number in range(40) for end in ends)
    flags = ["--model", "model", *RUN, "--data_path", "0.5", str(prefix), "0.5", str(prefix)]
    setup = prepare_run(parse(PtArguments, [*flags, "--save", str(tmp_path / "run")]), {})
    assert setup.lazy is not None
    tokens = int(file.lengths[:39].sum())  # the last 1 % are too few to evaluate on
    assert setup.num_rows in (2 * ((int(file.lengths.sum()) - 1) // 95), 2 * ((tokens - 1) // 95))
    report = json.loads((setup.run_dir / "data_report.json").read_text())
    assert report["data_path"] == [[str(prefix), 40], [str(prefix), 40]]
    assert sum(report["drawn"]) == setup.num_rows
    assert f"rows from 40 documents of {prefix}" in capsys.readouterr().out


def test_chats_lose_what_is_trained(prepared, tmp_path, caplog):
    prepared("--dataset", "chats.jsonl", "--output_prefix", str(tmp_path / "chats"))
    assert "which tokens are trained is not stored" in caplog.text


def test_what_is_refused(prepared):
    with pytest.raises(UsageError, match="needs --dataset and --model"):
        prepared()
    with pytest.raises(UsageError, match="nothing is prepared with --streaming"):
        prepared("--dataset", "chats.jsonl", "--streaming", "true")


def test_without_torch(place, tmp_path):
    code = (
        "import sys; from megatron_swift.cli import main\n"
        "code = main('megatron', ['preprocess', '--model', 'model', '--dataset', 'chats.jsonl', '--max_length', '96'])\n"
        "assert code == 0 and 'torch' not in sys.modules, code"
    )
    environment = {"MEGATRON_SWIFT_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place, env=environment, capture_output=True)
