"""`ckpt_format torch`: the files of any number of ranks put together to the last bit, and what is said where they do not fit."""

from __future__ import annotations

import os

import pytest
import torch
from foreign import MODELS, Foreign, write_torch_files
from tiny_weights import random_weights

from megatron_swift.checkpoint.formats import open_tensors
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.torch_folder import TorchFolder, rank_files
from megatron_swift.utils.errors import CheckpointError

LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2-local-padded": {"tp": 2, "local": True, "padded": 20},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-padded": {"pp": 2, "padded": 20},
}
EXPERTS = {"one": {}, "ep2": {"ep": 2}, "tp2-ep2": {"tp": 2, "ep": 2}, "tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2}}


def made(model, **layout):
    return Foreign(MODELS[model], random_weights(tensor_specs(MODELS[model])), **layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_layouts(tmp_path, model, layout):
    foreign = made(model, **LAYOUTS[layout])
    assert not foreign.differences(write_torch_files(tmp_path, foreign))


@pytest.mark.parametrize("kind", ["sequential", "te", "legacy"])
@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize("model", ["moe", "mixed"])
def test_experts(tmp_path, model, layout, kind):
    foreign = made(model, **EXPERTS[layout])
    assert not foreign.differences(write_torch_files(tmp_path, foreign, experts=kind))


@pytest.mark.parametrize("model", MODELS)
def test_an_interleaved_pipeline(tmp_path, model):
    foreign = made(model, pp=2)
    assert not foreign.differences(write_torch_files(tmp_path, foreign, chunks=2))


def test_whole_experts_under_tensor_parallelism(tmp_path):
    """Megatron's expert_tensor_parallel_size 1: two ranks, each with a half of every matrix and experts of its own."""
    foreign, whole = made("moe", tp=2, ep=2), made("moe", ep=2)
    write_torch_files(tmp_path, foreign)
    write_torch_files(tmp_path / "whole", whole)
    for tp, ep in ((0, 0), (1, 1)):
        path = tmp_path / f"mp_rank_{tp:02d}_{ep:03d}" / "model_optim_rng.pt"
        value = torch.load(path, weights_only=False)
        other = torch.load(tmp_path / "whole" / f"mp_rank_00_{ep:03d}" / path.name, weights_only=False)["model"]
        value["model"] |= {key: tensor for key, tensor in other.items() if ".local_experts." in key}
        torch.save(value, path)
    for name in ("mp_rank_00_001", "mp_rank_01_000"):
        (tmp_path / name / "model_optim_rng.pt").unlink()
    assert not foreign.differences(tmp_path)


def test_a_wrong_value_is_seen(tmp_path):
    foreign = made("tied", tp=2, pp=2)
    write_torch_files(tmp_path, foreign)
    foreign.weights["decoder.layers.2.mlp.linear_fc1.weight"][-1, -1] += 1
    assert foreign.differences(tmp_path) == ["decoder.layers.2.mlp.linear_fc1.weight"]


# What does not fit


@pytest.fixture
def folder(tmp_path):
    return write_torch_files(tmp_path, made("tied", tp=2, pp=2))


def edit(path, change):
    value = torch.load(path, weights_only=False)
    change(value["model"])
    torch.save(value, path)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["mp_rank_00_000", "mp_rank_01_000"], ["pipeline-parallel ranks are missing"]),
        (["mp_rank_00_000", "mp_rank_00_001"], ["tensor-parallel ranks are missing"]),
        (["mp_rank_01_000", "mp_rank_01_001"], ["has shape", "the model needs"]),
        (["mp_rank_01_001"], ["do not cover"]),
        (["mp_rank_00_001", "mp_rank_01_001"], ["missing: ['decoder.final_layernorm.weight'"]),
    ],
)
def test_missing_files(folder, gone, words):
    for name in gone:
        (folder / name / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        made("tied").differences(folder)
    assert all(word in error.value.block() for word in words), error.value.block()


def test_another_model(folder):
    with pytest.raises(CheckpointError, match="do not fit the model"):
        made("untied").differences(folder)


def test_tied_embeddings_that_differ(folder):
    """The last stage's copy may be left out only if it is one."""
    edit(folder / "mp_rank_01_001" / "model_optim_rng.pt", lambda model: model["output_layer.weight"].add_(1))
    with pytest.raises(CheckpointError, match="do not fit the model") as error:
        made("tied").differences(folder)
    assert "unexpected: ['output_layer.weight']" in error.value.why


def test_keys_that_the_model_has_not(folder):
    key = "decoder.layers.0.self_attention.linear_proj.bias"
    edit(folder / "mp_rank_00_001" / "model_optim_rng.pt", lambda model: model.update({key: torch.ones(8)}))
    with pytest.raises(CheckpointError) as error:
        made("tied").differences(folder)
    assert "unexpected: ['decoder.layers.2.self_attention.linear_proj.bias']" in error.value.why


@pytest.mark.parametrize("value", [{}, {"model": 1}, {"model": {}}, {"language_model": {}}, [], 3])
def test_files_of_something_else(tmp_path, value):
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(value, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="holds no model"):
        made("tied").differences(tmp_path)


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_file_runs(folder, tmp_path):
    canary, path = tmp_path / "canary", folder / "mp_rank_00_000" / "model_optim_rng.pt"
    value = torch.load(path, weights_only=False)
    torch.save({"evil": _Canary(canary), **value, "rng_state": [_Canary(canary)]}, path)
    assert not made("tied").differences(folder) and not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the file would have been a real danger"


def test_the_format_is_found_out(folder):
    foreign = made("tied")
    assert isinstance(open_tensors(folder, foreign.specs, num_layers=4), TorchFolder)
    assert len(rank_files(folder)) == 4 and not rank_files(folder.parent)
