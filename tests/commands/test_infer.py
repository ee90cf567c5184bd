"""`swift infer` from parsed arguments to answers on stdout and in the result file."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest

from megatron_swift.args.commands import InferArguments, parse
from megatron_swift.commands.infer import run
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("m") / "tiny", dtype="bfloat16")


@pytest.fixture
def infer(model, tmp_path, monkeypatch, capsys):
    """Run with arguments; returns stdout and the rows of the result file."""
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC_PER_NODE", "NNODES"):
        monkeypatch.delenv(name, raising=False)

    def start(*argv: str, folder=model, stdin: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        run(parse(InferArguments, ["--model", str(folder), *argv]))
        out = capsys.readouterr().out
        path = tmp_path / argv[argv.index("--result_path") + 1] if "--result_path" in argv else None
        return out, [json.loads(line) for line in path.read_text().splitlines()] if path else []

    return start


@pytest.fixture
def data(tmp_path):
    rows = [{"query": "who is it " * n, "response": str(n)} for n in (1, 7, 2, 5, 3)]
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FEW = ("--max_new_tokens", "6", "--result_path", "r.jsonl")


def test_conversation(infer, caplog):
    with caplog.at_level(logging.INFO, "megatron_swift"):
        out, rows = infer(*FEW, "--stream", "true", "--temperature", "0", stdin="Hi\nexit\n")
    assert out == f"<<< {rows[0]['response']}\n{'-' * 50}\n<<< "
    assert "float32 on cpu" in caplog.text and "template chatml" in caplog.text and "greedy" in caplog.text


def test_data_set_in_batches(infer, data):
    answers = []
    for size in ("1", "2", "8"):
        out, rows = infer(*FEW, "--val_dataset", data, "--max_batch_size", size, "--temperature", "0.9")
        answers.append([row["response"] for row in rows][-5:])
        totals = json.loads(out.strip().splitlines()[-1].removeprefix("[rank0] "))
        assert totals["num_samples"] == 5 and totals["num_generated_tokens"] <= 30
    assert answers[0] == answers[1] == answers[2]
    assert len(rows) == 15  # the file is appended to
    assert [row["labels"] for row in rows[-5:]] == ["1", "7", "2", "5", "3"]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[0]["messages"][-1]["content"] == rows[0]["response"]


def test_data_set_streamed_with_metric(infer, data, tmp_path):
    flags = ("--dataset", f"{data}#2", "--stream", "true", "--max_new_tokens", "4")
    _, rows = infer(*flags, "--result_path", "first.jsonl")
    with open(data, "w") as file:
        file.writelines(json.dumps({"messages": row["messages"]}) + "\n" for row in rows)
    out, _ = infer(*flags, "--metric", "acc")
    for row in rows:
        labels = row["response"]
        query = row["messages"][-2]["content"]
        assert f"[QUERY] {query}\n[LABELS] {labels}\n[RESPONSE] {row['response']}\n{'-' * 50}\n" in out
    assert json.loads(out.strip().splitlines()[-1].removeprefix("[rank0] "))["acc"] == 1
    assert len(list((tmp_path / "result" / "tiny" / "infer_result").glob("*.jsonl"))) == 1


def test_settings_from_args_json(infer, tmp_path, caplog):
    folder = make_tiny_model(tmp_path / "run-hf")
    (folder / "args.json").write_text(json.dumps({"system": "Be\\nbrief.", "template": "qwen2_5", "torch_dtype": None}))
    with caplog.at_level(logging.INFO, "megatron_swift"):
        infer("--max_new_tokens", "3", folder=folder, stdin="Hi\n")
    (path,) = (folder / "infer_result").glob("*.jsonl")
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "Be\nbrief."}
    assert "template='qwen2_5'" in caplog.text and "template qwen2_5" in caplog.text
    (folder / "args.json").write_text(json.dumps({"use_chat_template": False}))
    with caplog.at_level(logging.INFO, "megatron_swift"):
        infer("--max_new_tokens", "3", folder=folder, stdin="Hi\n")
    assert "template generation" in caplog.text


def test_errors(infer, model, data, tmp_path, monkeypatch):
    megatron = tmp_path / "run"
    megatron.mkdir()
    (megatron / "latest_checkpointed_iteration.txt").write_text("1")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"query": "a"}\n{"query": "' + "x " * 600 + '"}\n')
    with pytest.raises(UsageError, match="Megatron checkpoint") as error:
        infer(folder=megatron)
    assert "--to_hf true" in error.value.do
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        infer(folder=empty)
    with pytest.raises(UsageError, match="rouge"):
        infer("--val_dataset", data, "--metric", "rouge")
    with pytest.raises(DataError, match=r"broken\.jsonl:2: the prompt has \d+ tokens"):
        infer("--val_dataset", str(broken))
    with pytest.raises(DataError, match="--metric acc"):
        infer("--val_dataset", str(broken), "--metric", "acc")
    flags = ("--val_dataset", str(broken), "--max_length", "100", "--truncation_strategy", "delete")
    assert len(infer(*FEW, *flags)[1]) == 1
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(UsageError, match="2 processes"):
        infer("--val_dataset", data)


def test_import_needs_no_torch():
    code = "import sys, megatron_swift.commands.infer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
