"""`megatron export`: ranks that share the work write what one process writes, whatever layout the checkpoint was saved under."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.checkpoint import huggingface
from megatron_swift.checkpoint.dcp import DcpFolder, pieces_of, save_pieces
from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.manifest import verify
from megatron_swift.checkpoint.publish import published
from megatron_swift.commands import export
from megatron_swift.commands.export import prepare_export, run_rank
from megatron_swift.models.families import describe
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.utils.errors import StorageError
from scripts import environment


def plan(*flags):
    return prepare_export(parse(ExportArguments, [str(flag) for flag in flags]))


def on_ranks(ranks, *flags):
    run_ranks(_rank, ranks, plan(*flags), timeout=60)


def _rank(rank, made):
    run_rank(made)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "args.json"
    }


def tensors(folder):
    found = DcpFolder(folder)
    return {key: found.read(key, (0,) * len(stored.shape), stored.shape) for key, stored in found.tensors.items()}


def save_cut(model, out, *, row_cuts, column_cuts):
    """A checkpoint as ranks of some layout leave it: every matrix in boxes, dealt out over files."""
    cfg = describe(model, model_type=None, template=None, chat_template=None).config
    source, pieces = HuggingFaceWeights(model, cfg), []
    for spec in tensor_specs(cfg).values():
        whole = source.read(spec)
        step = -(-spec.shape[0] // row_cuts)
        for start in range(0, spec.shape[0], step):
            rows = whole[start : start + step]
            if len(spec.shape) < 2 or spec.experts or spec.shape[1] % column_cuts:
                pieces += pieces_of(spec, rows, start, num_layers=cfg.num_layers)
                continue
            width = spec.shape[1] // column_cuts
            for left in range(0, spec.shape[1], width):
                part = rows[:, left : left + width].contiguous()
                pieces += pieces_of(spec, part, start, num_layers=cfg.num_layers, columns=(left, left + width))
    folder = out / "iter_0000005"
    folder.mkdir(parents=True)
    save_pieces(folder, pieces, distributed=False, threads=row_cuts)
    (out / "latest_checkpointed_iteration.txt").write_text("5")
    return out


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def model(request, tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("hf") / request.param, family=request.param, tied=False, dtype="bfloat16", layers=3
    )


def test_same_bytes_from_every_layout_and_number_of_ranks(model, tmp_path):
    export.run(
        parse(ExportArguments, ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "m")])
    )
    flags = ("--to_hf", "true", "--max_shard_size", "100KB", "--torch_dtype", "float16")
    export.run(
        parse(ExportArguments, ["--mcore_model", str(tmp_path / "m"), "--output_dir", str(tmp_path / "one"), *flags])
    )
    expected = files(tmp_path / "one")
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 4
    for number, (rows, columns, ranks) in enumerate([(1, 1, 2), (2, 2, 1), (3, 4, 3), (5, 1, 2)]):
        cut = save_cut(model, tmp_path / f"cut{number}", row_cuts=rows, column_cuts=columns)
        out = tmp_path / f"out{number}"
        on_ranks(ranks, "--mcore_model", cut, "--model", model, "--output_dir", out, *flags)
        assert files(out) == expected, (rows, columns, ranks)


def test_to_mcore_on_ranks(model, tmp_path):
    """Files are named after ranks; what is in them is the same."""
    export.run(
        parse(ExportArguments, ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "m")])
    )
    on_ranks(3, "--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "m3")
    folder = tmp_path / "m3" / "iter_0000001"
    assert {p.name for p in folder.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    sizes = [p.stat().st_size for p in folder.glob("*.distcp")]
    assert published(tmp_path / "m3") == [1]
    verify(folder)
    one, three = tensors(tmp_path / "m" / "iter_0000001"), tensors(folder)
    assert one.keys() == three.keys() and all(torch.equal(one[key], three[key]) for key in one)
    assert min(sizes) > 0.2 * sum(sizes)  # a fair share each
    on_ranks(2, "--mcore_model", tmp_path / "m3", "--to_hf", "true", "--output_dir", tmp_path / "hf")
    written, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", model))
    assert written.keys() == source.keys() and all(torch.equal(written[key], source[key]) for key in source)


def _failing(rank, made):
    inner = huggingface.write_safetensors

    def fail(path, tensors, read):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return inner(path, tensors, read)

    huggingface.write_safetensors = fail  # in a fork of the test
    with pytest.raises(StorageError, match=r"cannot write to .*/out: No space left"):
        run_rank(made)


def test_one_rank_fails(model, tmp_path):
    export.run(
        parse(ExportArguments, ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "m")])
    )
    flags = ("--mcore_model", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "out")
    run_ranks(_failing, 2, plan(*flags, "--max_shard_size", "100KB"), timeout=60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def _forgetting(path, tensors, read):
    entry = INNER(path, tensors, read)
    with open(path, "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x7f")
    return entry


INNER = huggingface.write_safetensors


def test_what_was_written_is_read_again(model, tmp_path, monkeypatch):
    """A disk that gives back something else than was written to it."""
    export.run(
        parse(ExportArguments, ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "m")])
    )
    monkeypatch.setattr(huggingface, "write_safetensors", _forgetting)
    flags = ["--mcore_model", str(tmp_path / "m"), "--to_hf", "true", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(StorageError, match="does not hold what was written"):
        export.run(parse(ExportArguments, flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_line(model, tmp_path):
    """As a user starts it: torchrun and all."""
    argv = [sys.executable, "-c", "from megatron_swift.cli import megatron; megatron()", "export"]
    env = environment(NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    steps = (
        ["--model", str(model), "--to_mcore", "true", "--output_dir", "m"],
        ["--mcore_model", "m", "--to_hf", "true", "--output_dir", "hf", "--test_convert_precision", "true"],
    )
    for flags in steps:
        done = subprocess.run(
            [*argv, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "same arg-max" in done.stdout and done.stdout.count("wrote hf in") == 1
    assert json.loads((tmp_path / "hf" / "args.json").read_text())["to_hf"] is True
    again = subprocess.run(
        [*argv, *steps[1]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
