"""`--test_convert_precision`: exact conversions say 0, coarse types say how much, and a wrong weight fails the export."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.checkpoint import layout
from megatron_swift.commands import export, export_check
from megatron_swift.commands.export import prepare_export
from megatron_swift.commands.export_check import Precision
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe", "mixtral"])
def model(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hf") / request.param, family=request.param)


def run(*flags):
    export.run(parse(ExportArguments, [*(str(flag) for flag in flags), "--test_convert_precision", "true"]))


def test_both_directions(model, tmp_path, capsys):
    run("--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "m")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("logits of 'who are you?' (") and lines[-1].startswith("wrote ")
    assert lines[1].split()[:2] == ["mean_diff", "0.000e+00"] and lines[2].split() == ["max_diff", "0.000e+00"]
    run("--mcore_model", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "hf")
    assert "mean_diff        0.000e+00" in capsys.readouterr().out


def test_the_numbers_are_transformers_numbers(tmp_path, capsys):
    """The differences between the two folders' models, as transformers computes them."""
    model = make_tiny_model(tmp_path / "hf32")
    run("--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "m")
    capsys.readouterr()
    flags = ("--mcore_model", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "hf16")
    made = prepare_export(parse(ExportArguments, [*map(str, flags), "--test_convert_precision", "true"]))
    run(*flags, "--torch_dtype", "bfloat16")
    said = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:3]}
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([made.ids])).logits
            for folder in (model, tmp_path / "hf16")
        )
    difference = (first - second).abs()
    assert said["max_diff"] > 1e-4
    assert said["mean_diff"] == pytest.approx(difference.mean().item(), rel=0.01)
    assert said["max_diff"] == pytest.approx(difference.max().item(), rel=0.01)


def test_a_wrong_conversion_fails(tmp_path, monkeypatch):
    """A mapping that exchanges two matrices: reading and writing agree with each other, the model does not."""
    model = make_tiny_model(tmp_path / "hf", num_key_value_heads=4)
    run("--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "m")
    inner = layout.hugging_face_tensors

    def exchanged(specs):
        found = inner(specs)
        one, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
        found[one], found[other] = found[other], found[one]
        return found

    monkeypatch.setattr("megatron_swift.checkpoint.huggingface.hugging_face_tensors", exchanged)
    with pytest.raises(CheckpointError, match="does not compute what its source does"):
        run("--mcore_model", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mean", "converted", "passes"),
    [(0.05, (1, 2), True), (0.2, (1, 2), False), (0.0, (1, 3), False), (float("nan"), (1, 2), False)],
)
def test_limits(mean, converted, passes):
    found = Precision(mean, 1.0, (1, 2), converted)
    if passes:
        found.check()
        return
    with pytest.raises(CheckpointError, match="does not compute"):
        found.check()


def test_wrong_tokens_are_named():
    with pytest.raises(CheckpointError) as error:
        Precision(0.0, 0.0, (1, 2), (1, 3)).check()
    assert "position 1: token 2 and 3" in error.value.why
    assert export_check.LARGEST_MEAN == 0.1
