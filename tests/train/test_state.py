"""Training state written by some ranks and read by others, and what is said of state that is missing or damaged."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from megatron_swift.checkpoint.dcp import DcpFolder
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.checkpoint.ranks import all_ranks
from megatron_swift.parallel import mesh as meshes
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.state import (
    TrainState,
    load_optimizer,
    load_rng,
    load_training_weights,
    read_state,
    take_snapshot,
)
from megatron_swift.utils.errors import CheckpointError
from tiny_models import SMALL, make_engine, read_config

ADAM = OptimizerOptions(kind="adam", weight_decay=0.1)
SGD = OptimizerOptions(kind="sgd", weight_decay=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Over 4 ranks the last one holds no row of a q/k norm."""
    return make_tiny_model(tmp_path_factory.mktemp("m"), family="qwen3", **SMALL)


def _draw(*, cuda=False):
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _write(rank, model, folder, dtype, options, seed):
    """An engine after some steps with made-up gradients, written. Returns the next random numbers."""
    mesh = meshes.start(backend="gloo", timeout_minutes=1)
    engine = make_engine(model, dtype, mesh)
    optimizer = Optimizer(engine.shards, options)
    for step in range(3):
        for shard in engine.shards:
            # The same gradient for a row, whoever holds it.
            whole = torch.randn(shard.shape, generator=torch.Generator().manual_seed(hash((shard.name, step)) % 2**31))
            shard.master.grad = torch.zeros_like(shard.master)
            for box in shard.boxes:
                shard.master.grad[box.local : box.local + box.rows] = whole[box.start : box.start + box.rows]
        optimizer.step(1e-3)
    random.seed(seed + rank), np.random.seed(seed + rank), torch.manual_seed(seed + rank)
    _draw()
    _save(mesh, engine, optimizer, model, folder, dtype, TrainState(iteration=3, optimizer_steps=optimizer.num_steps))
    return _draw()


def _save(mesh, engine, optimizer, model, folder, dtype, state):
    cfg = read_config(model)
    snapshot = take_snapshot(
        mesh=mesh,
        shards=engine.shards,
        specs=tensor_specs(cfg),
        cfg=cfg,
        dtype=dtype,
        state=state,
        optimizer=optimizer,
        save_rng=True,
    )
    snapshot.write(folder, all_ranks())
    meshes.stop()


def _copy(rank, model, source, target, dtype, options):
    """Load and write again at once."""
    mesh = meshes.start(backend="gloo", timeout_minutes=1)
    cfg = read_config(model)
    specs = tensor_specs(cfg)
    engine, weights = make_engine(model, dtype, mesh), MegatronWeights(source, specs, num_layers=cfg.num_layers)
    state = read_state(source)
    load_training_weights(engine.shards, specs, weights)
    optimizer = Optimizer(engine.shards, options)
    load_optimizer(optimizer, specs, weights, state)
    copied = [
        shard.name for shard in engine.shards if shard.copied and not torch.equal(shard.master.bfloat16(), shard.param)
    ]
    del state.settings["optimizer"]
    _save(
        mesh, engine, optimizer, model, target, dtype, dataclasses.replace(state, optimizer_steps=optimizer.num_steps)
    )
    return copied


def _tensors(folder):
    files = DcpFolder(folder)
    return {key: files.read(key, (0,) * len(value.shape), value.shape) for key, value in files.tensors.items()}


@pytest.mark.parametrize(
    ("ranks", "others", "dtype", "options"),
    [
        (1, 2, torch.bfloat16, ADAM),
        (2, 1, torch.bfloat16, ADAM),
        (4, 2, torch.float32, ADAM),
        (1, 4, torch.float32, SGD),
    ],
)
def test_any_ranks_read_what_any_ranks_wrote(model, tmp_path, ranks, others, dtype, options):
    """Weights, masters and moments are bitwise the same after loading on another number of ranks."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    run_ranks(_write, ranks, model, first, dtype, options, 1, timeout=60)
    assert not any(run_ranks(_copy, others, model, first, second, dtype, options, timeout=60))
    before, after = _tensors(first), _tensors(second)
    assert before.keys() == after.keys()
    assert not [
        key for key in before if before[key].dtype != after[key].dtype or not torch.equal(before[key], after[key])
    ]
    moments = 2 if options is ADAM else 1
    masters = dtype != torch.float32
    assert len(before) == len({spec.megatron_key for spec in tensor_specs(read_config(model)).values()}) * (
        1 + moments + masters
    )
    assert all(value.any() for value in before.values())
    one, other = (json.loads((folder / "state.json").read_text()) for folder in (first, second))
    assert one == other and one["optimizer"] == options.kind
    assert one["optimizer_steps"] == (3 if options is ADAM else 0)


def _restore(rank, folder):
    load_rng(folder, meshes.start(backend="gloo", timeout_minutes=1))
    return _draw()


def test_random_numbers_go_on(model, tmp_path):
    drawn = run_ranks(_write, 2, model, tmp_path, torch.float32, ADAM, 5, timeout=60)
    assert drawn[0] != drawn[1]
    assert run_ranks(_restore, 2, tmp_path) == drawn
    assert run_ranks(_restore, 1, tmp_path) == drawn[:1]
    assert run_ranks(_restore, 3, tmp_path) == [*drawn, drawn[0]]


def _try_rng(rank, folder):
    mesh = meshes.start(backend="gloo", timeout_minutes=1)
    try:
        load_rng(folder, mesh)
    except CheckpointError as error:
        return error.what
    return ""


RNG = "rng_00000.json"


@pytest.fixture
def folder(model, tmp_path):
    run_ranks(_write, 1, model, tmp_path, torch.float32, ADAM, 5)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.pop("torch"), "cannot be read"),
        (lambda value: value.update(torch="!"), "cannot be read"),
        (lambda value: value.update(torch="AAAA"), "cannot be read"),
        (lambda value: value.update(python=[3, [1], None]), "cannot be read"),
        (lambda value: value.update(numpy=["MT19937", [1], 0, 0, 0.0]), "cannot be read"),
    ],
)
def test_damaged_random_state(folder, change, words):
    value = json.loads((folder / RNG).read_text())
    change(value)
    (folder / RNG).write_text(json.dumps(value))
    assert words in run_ranks(_try_rng, 1, folder)[0]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"optimizer": null, "odd": 1}', b"\xff", b"null"])
def test_damaged_state(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(tmp_path)


def test_no_state(tmp_path):
    with pytest.raises(CheckpointError, match="weights only, no training state") as error:
        read_state(tmp_path)
    assert error.value.do == "give --finetune true to start a new training from its weights"


def test_state_goes_round(model, folder):
    state = read_state(folder)
    assert state == TrainState(iteration=3, optimizer_steps=3, settings={"optimizer": "adam"})
