"""`swift export` there and back, and what it does to a folder that is there already."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.checkpoint.dcp import DcpFolder
from megatron_swift.checkpoint.manifest import verify
from megatron_swift.checkpoint.publish import published
from megatron_swift.commands import export
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, StorageError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "Qwen2.5-tiny", tied=False, dtype="bfloat16")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: export.run(parse(ExportArguments, [str(flag) for flag in flags]))


def content(path):
    """A file's bytes; of weights the tensors, whose order in the file is the writer's."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {name: (value.dtype, value.view(torch.uint8).numpy().tobytes()) for name, value in load_file(path).items()}


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "args.json"]
    return {str(path.relative_to(folder)): content(path) for path in found}


def test_there_and_back(run, model, tmp_path, capsys):
    run("--model", model, "--to_mcore", "true")
    mcore = tmp_path / "Qwen2.5-tiny-mcore"  # the source has no args.json: the current folder
    assert capsys.readouterr().out.startswith("wrote Qwen2.5-tiny-mcore in ")
    assert sorted(p.name for p in mcore.iterdir()) == [
        "args.json",
        "huggingface",
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]
    assert published(mcore) == [1] and (mcore / "latest_checkpointed_iteration.txt").read_text() == "1"
    verify(mcore / "iter_0000001")
    assert len(list((mcore / "iter_0000001").glob("*.distcp"))) == 2  # --thread_count's default
    stored = json.loads((mcore / "args.json").read_text())
    assert stored["model"] == str(model) and stored["torch_dtype"] == "bfloat16" and stored["template"] == "qwen2_5"
    run("--mcore_model", mcore, "--to_hf", "true")
    assert files(tmp_path / "Qwen2.5-tiny-mcore-hf") == files(model)


def test_without_the_original(run, model, tmp_path):
    """The Megatron folder carries what it needs."""
    copy = shutil.copytree(model, tmp_path / "gone" / "Qwen2.5-tiny")
    run("--model", copy, "--to_mcore", "true", "--output_dir", "mcore", "--system", "Be brief.")
    shutil.rmtree(copy)
    run("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "hf")
    assert files(tmp_path / "hf") == files(model)
    stored = json.loads((tmp_path / "hf" / "args.json").read_text())
    assert stored["system"] == "Be brief." and stored["template"] == "qwen2_5" and stored["model"] == str(copy)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_thread_count_changes_files_alone(run, model, tmp_path, threads):
    flags = () if threads is None else ("--thread_count", threads)
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore", "--torch_dtype", "float32", *flags)
    folder = tmp_path / "mcore" / "iter_0000001"
    assert len(list(folder.glob("*.distcp"))) == (threads or 2)
    run("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "hf", "--torch_dtype", "bfloat16")
    assert files(tmp_path / "hf") == files(model)
    assert {stored.dtype for stored in DcpFolder(folder).tensors.values()} == {torch.float32}


def test_dtype_and_shards(run, model, tmp_path):
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore")
    run(
        "--mcore_model",
        "mcore",
        "--to_hf",
        "true",
        "--output_dir",
        "hf",
        "--torch_dtype",
        "float32",
        "--max_shard_size",
        "200KB",
    )
    shards = [load_file(path) for path in sorted((tmp_path / "hf").glob("model-*.safetensors"))]
    whole = load_file(model / "model.safetensors")
    assert len(shards) > 1 and {k: v for s in shards for k, v in s.items()}.keys() == whole.keys()
    assert all(torch.equal(v, whole[k].float()) for s in shards for k, v in s.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_existing_folder(run, model, tmp_path):
    out = tmp_path / "out"
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore")
    again = ("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", out)
    out.mkdir()
    run(*again, "--max_shard_size", "200KB")  # an empty folder is fine
    assert (out / "model.safetensors.index.json").exists()
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(*again)
    (out / "notes.txt").write_text("mine")
    (out / "infer_result").mkdir()
    (out / "infer_result" / "a.jsonl").write_text("mine")
    inode = out.stat().st_ino
    run(*again, "--exist_ok", "true")
    mine = {"notes.txt": b"mine", "infer_result/a.jsonl": b"mine"}
    assert files(out) == files(model) | mine  # no shard of before is left, nothing of mine is gone
    assert (
        out.stat().st_ino == inode
    )  # the folder itself is not exchanged: it may be a mount, or somebody's current one


def test_existing_megatron_folder(run, model, tmp_path):
    """Another iteration in it is left alone."""
    out = tmp_path / "mcore"
    flags = ("--model", model, "--to_mcore", "true", "--output_dir", out)
    run(*flags)
    shutil.copytree(out / "iter_0000001", out / "iter_0000007")
    (out / "latest_checkpointed_iteration.txt").write_text("7")
    before = files(out / "iter_0000007")
    run(*flags, "--exist_ok", "true", "--torch_dtype", "float32")
    assert published(out) == [1, 7] and files(out / "iter_0000007") == before
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "1"
    verify(out / "iter_0000001")


@pytest.mark.parametrize("exists", [True, False])
def test_failure_leaves_what_was(run, model, tmp_path, exists, monkeypatch):
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore")
    if exists:
        run("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "out")
    before = files(tmp_path)

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_args", fail)
    with pytest.raises(StorageError, match=r"cannot write to .*out: No space left"):
        run("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "out", "--exist_ok", "true")
    assert files(tmp_path) == before and (tmp_path / "out").exists() == exists
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_died_while_merging(run, model, tmp_path, monkeypatch):
    """Without its marker the folder is no model: nobody takes the half for the whole."""
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore")
    again = ("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "out", "--exist_ok", "true")
    run(*again)
    inner = os.replace

    def die(source, target):
        if str(target).endswith("tokenizer.json"):
            raise KeyboardInterrupt
        inner(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run(*again)
    assert not (tmp_path / "out" / "config.json").exists()
    run(*again)
    assert files(tmp_path / "out") == files(model)


@pytest.mark.parametrize(
    ("flags", "kind", "words"),
    [
        (("--to_hf", "true"), UsageError, "needs the Megatron checkpoint"),
        (("--model", "x"), UsageError, "exactly one of"),
        (("--model", "./x", "--to_mcore", "true"), UsageError, "is not an existing folder"),
        (("--mcore_model", "nowhere", "--to_hf", "true"), UsageError, "does not exist"),
        (("--mcore_model", "empty", "--to_hf", "true"), UsageError, "holds no checkpoint"),
        (("--mcore_model", "garbage", "--model", "MODEL", "--to_hf", "true"), CheckpointError, "holds no checkpoint"),
        (("--model", "MODEL", "--to_mcore", "true", "--output_dir", "file"), UsageError, "is a file"),
        (("--model", "MODEL", "--to_mcore", "true", "--output_dir", "file/x"), StorageError, "cannot write to"),
        (("--model", "broken", "--to_mcore", "true", "--output_dir", "out"), CheckpointError, "do not fit"),
    ],
)
def test_errors(run, model, tmp_path, flags, kind, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    (tmp_path / "file").write_text("")
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "model_type": "qwen2"}))
    with pytest.raises(kind, match=words):
        run(*(str(model) if flag == "MODEL" else flag for flag in flags))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_damaged_checkpoint(run, model, tmp_path):
    run("--model", model, "--to_mcore", "true", "--output_dir", "mcore")
    path = tmp_path / "mcore" / "iter_0000001" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        run("--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "out")
    assert not (tmp_path / "out").exists()
