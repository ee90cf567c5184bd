"""Going on from a checkpoint of Megatron's own: its position and its optimizer's state, bit for bit, under any number of ranks here."""

from __future__ import annotations

import pytest
import torch
from foreign import Foreign, cut, note_cut, write_common, write_torch_dist
from tiny_weights import random_weights

from megatron_swift.checkpoint.dcp import pieces_of
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_state import MegatronState, megatron_state
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.parallel import mesh as meshes
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.state import TrainState, load_optimizer, load_rng, load_training_weights, read_state
from megatron_swift.utils.errors import CheckpointError
from tiny_models import make_engine, read_config

GROUPS = [{"lr": 1e-3, "step": 3, "weight_decay": 0.1}, {"lr": 1e-3, "step": 3, "weight_decay": 0.0}]
STATES = {
    "fully_sharded_model_space": ("fp32_param", "exp_avg", "exp_avg_sq"),
    "fully_reshardable": ("param", "exp_avg", "exp_avg_sq"),
    "plain": ("fp32_param", "exp_avg", "exp_avg_sq"),
}


@pytest.fixture(scope="module", params=["qwen3", "qwen2_moe"])
def model(request, tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("m"),
        family=request.param,
        layers=4,
        hidden_size=32,
        intermediate_size=40,
        vocab_size=262,
    )


def optimizer_entry(layout, chained):
    one = {"optimizer": {"param_groups": GROUPS}}
    one |= {"param_state_sharding_type": layout} if layout != "plain" else {}
    return {0: one, 1: one} if chained else one


def write(folder, model, layout, *, dtype=torch.bfloat16, optimizer=None):
    """Four layers, two tensor-parallel ranks. Returns the state's tensors by kind and name, all different."""
    cfg = read_config(model)
    weights = random_weights(tensor_specs(cfg))
    foreign = Foreign(cfg, {name: weight.to(dtype) for name, weight in weights.items()}, tp=2)
    chained, more, shapes, states = cfg.moe is not None, [], {}, {}
    for seed, kind in enumerate(STATES[layout]):
        states[kind] = {name: weight + seed for name, weight in weights.items()}
        for name, spec in foreign.specs.items():
            prefix = f"optimizer.state.{kind}."
            value = states[kind][name]
            if layout == "fully_sharded_model_space":
                key = (f"chained_{int(bool(spec.experts))}." if chained else "") + prefix + spec.megatron_key
                pieces, shapes[key] = cut(foreign, name, key, value)
                more += pieces
            else:
                more += pieces_of(spec, value, 0, num_layers=4, prefix=prefix)
    write_torch_dist(folder, foreign, more=more)
    if shapes:
        note_cut(folder, shapes)
    write_common(folder, optimizer=optimizer or optimizer_entry(layout, chained))
    return states


def _resume(rank, model, folder, dtype):
    """What an optimizer holds after loading: (boxes and values of masters, moments) by parameter, updates made, position."""
    mesh = meshes.start(backend="gloo", timeout_minutes=1)
    specs = tensor_specs(read_config(model))
    engine, state = make_engine(model, dtype, mesh), read_state(folder)
    source = MegatronWeights(folder, specs, num_layers=4)
    load_training_weights(engine.shards, specs, source)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    load_optimizer(optimizer, specs, source, state)
    load_rng(folder, mesh)
    found = {}
    for shard in engine.shards:
        kinds = [shard.master.detach(), *(optimizer.state(shard, name) for name in optimizer.names)]
        for box in shard.boxes:
            rows = [tensor[box.local : box.local + box.rows].clone() for tensor in kinds]
            found[shard.name, box.start, box.columns] = rows
    return found, optimizer.num_steps, state


def _differences(rank, model, folder, dtype, states, layout):
    """The places where a rank holds something else than was written, how many it looked at, updates made, position."""
    found, steps, state = _resume(rank, model, folder, dtype)
    wrong = [
        (name, kind)
        for (name, start, columns), rows in found.items()
        for kind, values in zip(STATES[layout], rows, strict=True)
        if columns is not None or not torch.equal(values, states[kind][name][start : start + len(values)])
    ]
    return wrong, len(found), steps, state


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", STATES)
def test_state_goes_on(model, tmp_path, layout, dtype, ranks):
    states = write(tmp_path, model, layout, dtype=dtype)
    for wrong, count, steps, state in run_ranks(
        _differences, ranks, model, tmp_path, dtype, states, layout, timeout=60
    ):
        assert not wrong and count >= len(tensor_specs(read_config(model))) // ranks
        assert steps == 3 and state == TrainState(iteration=3, consumed_samples=24, optimizer_steps=3)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"param_state_sharding_type": "dp_reshardable"}, ["layout dp_reshardable", "--no_load_optim true"]),
        ({"param_state_sharding_type": "fully_sharded_bucket_space"}, ["fully_sharded_bucket_space", "reshardable"]),
        ({"param_state_sharding_type": "dp_zero_gather_scatter"}, ["dp_zero_gather_scatter"]),
        ({0: {"param_state_sharding_type": "dp_reshardable"}}, ["layout dp_reshardable"]),
        ({"optimizer": {"param_groups": [{"lr": 1}]}}, ["does not say how many updates"]),
    ],
)
def test_what_cannot_be_imported(model, tmp_path, entry, words):
    write(tmp_path, model, "plain", optimizer=entry)
    assert read_state(tmp_path).iteration == 3  # goes on without the optimizer's state
    with pytest.raises(CheckpointError) as error:
        _resume(0, model, tmp_path, torch.float32)
    assert all(word in error.value.block() for word in words), error.value.block()


def test_state_that_is_not_whole(model, tmp_path):
    """common.pt speaks of an optimizer whose tensors are not there."""
    cfg = read_config(model)
    write_torch_dist(tmp_path, Foreign(cfg, random_weights(tensor_specs(cfg))))
    write_common(tmp_path, optimizer=optimizer_entry("plain", False))
    with pytest.raises(CheckpointError, match="holds no optimizer state, not of adam"):
        _resume(0, model, tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        ({"optimizer": {"param_groups": [{"step": torch.tensor(7.0)}]}}, 7),
        ({"optimizer": {"state": {"common_step": torch.tensor(8)}, "param_groups": [{"lr": 1.0}]}}, 8),
    ],
)
def test_where_steps_are_noted(tmp_path, optimizer, step):
    write_common(tmp_path, optimizer=optimizer)
    assert megatron_state(tmp_path) == MegatronState(3, 24, step, None)


def test_no_optimizer_no_state(tmp_path):
    assert megatron_state(tmp_path) is None
    write_common(tmp_path)
    assert megatron_state(tmp_path) is None
    with pytest.raises(CheckpointError, match="weights only"):
        read_state(tmp_path)


def test_a_common_file_of_something_else(tmp_path):
    torch.save([1], tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"is no common\.pt"):
        megatron_state(tmp_path)
