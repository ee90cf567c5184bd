"""torch_dist folders as Megatron-Core's versions write them: every key layout and parallel layout, read to the last bit."""

from __future__ import annotations

import pickle

import pytest
import torch
from foreign import MODELS, Color, Foreign, cut, note_cut, write_common, write_torch_dist
from test_dcp import _Call, _forge, _Named
from tiny_weights import random_weights

from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MASTER
from megatron_swift.checkpoint.publish import candidates
from megatron_swift.utils.errors import CheckpointError

LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "local": {"local": True},
    "local-tp2": {"local": True, "tp": 2},
    "padded-tp2": {"tp": 2, "padded": 20},
}


def made(model, seed=0, dtype=torch.float32, **layout):
    weights = random_weights(tensor_specs(MODELS[model]), dtype)
    return Foreign(MODELS[model], {name: weight + seed for name, weight in weights.items()}, **layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_weights(tmp_path, model, layout, dtype):
    foreign = made(model, dtype=dtype, **LAYOUTS[layout])
    assert not foreign.differences(write_torch_dist(tmp_path, foreign))


def test_a_wrong_value_is_seen(tmp_path):
    """Of the test itself: one value in the last layer."""
    foreign = made("moe", tp=2)
    write_torch_dist(tmp_path, foreign)
    foreign.weights["decoder.layers.3.mlp.experts.linear_fc1.weight"][-1, -1] += 1
    assert foreign.differences(tmp_path) == ["decoder.layers.3.mlp.experts.linear_fc1.weight"]


def test_fewer_rows_of_the_vocabulary_than_tokens(tmp_path):
    foreign = made("untied")
    write_torch_dist(tmp_path, foreign)
    foreign.specs = tensor_specs(MODELS["untied"].replace(vocab_size=13))
    with pytest.raises(CheckpointError, match=r"has shape \(12, 8\), the model needs \(13, 8\)"):
        foreign.differences(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_classes_that_are_not_here(tmp_path, model):
    """0.11's save plans in `.metadata`, enumerations in common.pt."""
    foreign = made(model, tp=2)
    write_torch_dist(tmp_path, foreign)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    plan = _Call(_Named("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"), 1)
    metadata.all_local_plans = [plan, _Call(_Named("apex.thing", "Thing"), Color.RED)]
    metadata.mcore_data = {"decoder.final_layernorm.weight": {}}
    _forge(tmp_path, metadata)
    write_common(tmp_path)
    assert not foreign.differences(tmp_path)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_optimizer_tensors_that_are_cut(tmp_path, model, tp, chained):
    """0.11's fully_sharded_model_space; the optimizers of a mixture of experts are numbered."""
    foreign, more, shapes = made(model, tp=tp), [], {}
    states = {}
    for seed, prefix in enumerate((MASTER, "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."), 1):
        states[prefix] = made(model, seed).weights
        for name, spec in foreign.specs.items():
            number = f"chained_{int(bool(spec.experts))}." if chained else ""
            key = number + prefix + spec.megatron_key
            pieces, shapes[key] = cut(foreign, name, key, states[prefix][name])
            more += pieces
    write_torch_dist(tmp_path, foreign, more=more)
    note_cut(tmp_path, shapes)
    assert not foreign.differences(tmp_path)
    for prefix, values in states.items():
        assert not foreign.differences(tmp_path, prefix, values)


def test_a_release(tmp_path):
    """What Megatron's converters name in the tracker."""
    foreign = made("tied")
    write_torch_dist(tmp_path / "release", foreign)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (folder,) = candidates(tmp_path)
    assert not foreign.differences(folder)
