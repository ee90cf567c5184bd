"""The folder of a run: its name, and what lies in it before the first step."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from runs import set_up, write_rows

from megatron_swift.commands.run_folder import make_run_dir
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import StorageError


def test_versions_count_up(tmp_path):
    save = tmp_path / "a" / "b"
    for number in range(3):
        assert re.fullmatch(rf"v{number}-\d{{8}}-\d{{6}}", make_run_dir(str(save), add_version=True).name)
    (save / "v11-x").mkdir()
    (save / "v5").write_text("a file counts too")
    (save / "version99").mkdir()
    assert make_run_dir(str(save), add_version=True).name.startswith("v12-")


def test_without_version(tmp_path):
    for _ in range(2):
        assert make_run_dir(str(tmp_path / "run"), add_version=False) == tmp_path / "run"
    assert list((tmp_path / "run").iterdir()) == []  # the probe is gone


def test_relative_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert make_run_dir("out", add_version=False) == tmp_path / "out"
    assert make_run_dir("~/out", add_version=False) == tmp_path / "home" / "out"


@pytest.mark.parametrize("add_version", [True, False])
@pytest.mark.parametrize("save", ["file", "file/below"])
def test_a_file_in_the_way(tmp_path, save, add_version):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        make_run_dir(str(tmp_path / save), add_version=add_version)
    assert error.value.exit_code == 9 and str(tmp_path / save) in error.value.what and error.value.do


@pytest.mark.parametrize("add_version", [True, False])
def test_read_only(add_version):
    """Not in tmp_path, whose parents others than root may not enter."""
    with tempfile.TemporaryDirectory() as name:
        save = Path(name) / "out"
        save.mkdir()

        def as_nobody():
            os.chmod(name, 0o755)
            os.chmod(save, 0o555)
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                make_run_dir(str(save), add_version=add_version)
            except StorageError as error:
                os._exit(error.exit_code)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=as_nobody)
        process.start()
        process.join(30)
        assert process.exitcode == 9


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def test_files_before_the_first_step(place):
    setup = set_up(
        "--model",
        "model",
        "--dataset",
        "rows.jsonl",
        "--train_iters",
        "3",
        "--save",
        "out",
        "--hub_token",
        "secret",
        "--split_dataset_ratio",
        "0.1",
    )
    run = setup.run_dir
    assert sorted(p.name for p in run.iterdir()) == [
        "args.json",
        "data_report.json",
        "huggingface",
        "val_dataset.jsonl",
    ]
    args = json.loads((run / "args.json").read_text())
    assert args["model"] == str(place / "model") and args["save"] == str(run)
    assert args["template"] == "chatml" and args["torch_dtype"] == "float32" and args["train_iters"] == 3
    assert "secret" not in (run / "args.json").read_text()
    rows = [json.loads(line) for line in (run / "val_dataset.jsonl").read_text().splitlines()]
    assert len(rows) == setup.num_val_rows == 2
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert json.loads((run / "data_report.json").read_text())
    carried = {p.name: p.read_bytes() for p in (run / "huggingface").iterdir()}
    assert carried == {p.name: p.read_bytes() for p in (place / "model").iterdir() if p.suffix != ".safetensors"}


def test_same_folder_another_model(place):
    """The companions are those of the model that is trained now; where they are the model, they stay."""
    flags = ("--dataset", "rows.jsonl", "--train_iters", "3", "--save", "out", "--add_version", "false")
    set_up("--model", "model", *flags)
    make_tiny_model(place / "other", family="llama")
    run = set_up("--model", "other", *flags).run_dir
    config = (place / "other" / "config.json").read_bytes()
    assert (run / "huggingface" / "config.json").read_bytes() == config
    shutil.rmtree(place / "other")
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    setup = set_up("--load", "out", *flags)
    assert setup.model_dir == Path("out/huggingface") and (run / "huggingface" / "config.json").read_bytes() == config
    assert json.loads((run / "args.json").read_text())["model"] == str(place / "other")
