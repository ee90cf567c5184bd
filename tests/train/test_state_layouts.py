"""Training state moves between any two layouts bit for bit: weights, float32 masters, moments, position, loss scale, random numbers.

Every layout writes a checkpoint of the same made-up state. Every layout then reads each of them, and what a rank holds is compared
with the made-up whole by `==`: so all pairs of layouts are tried, through the boxes that each wrote and each asks for.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.checkpoint.publish import publish
from megatron_swift.checkpoint.ranks import all_ranks
from megatron_swift.parallel import mesh as meshes
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import (
    TrainState,
    load_optimizer,
    load_rng,
    load_training_weights,
    read_state,
    take_snapshot,
)
from tiny_models import SMALL, make_engine, read_config

ADAM = OptimizerOptions(kind="adam", weight_decay=0.1)
SP, VIRTUAL = {"sequence_parallel": True}, {"chunks_per_rank": 2}
ZERO0, ZERO2, ZERO3 = ({"sharding": s} for s in (Sharding.NO_SHARD, Sharding.OPTIM_GRADS, Sharding.OPTIM_GRADS_PARAMS))

# name -> (ranks, sizes, options). What is left of the ranks is data parallel, whose optimizer's state is shared (ZeRO-1) unless said.
DENSE = {
    "one": (1, Sizes(), {}),
    "tp2": (2, Sizes(tp=2), SP),
    "tp4": (4, Sizes(tp=4), SP),  # two query groups on four ranks: keys and values are replicated
    "pp2": (2, Sizes(pp=2), {}),
    "pp2v": (2, Sizes(pp=2), VIRTUAL),
    "tp2pp2": (4, Sizes(tp=2, pp=2), SP),
    "cp2": (2, Sizes(cp=2), {}),
    "dp2z0": (2, Sizes(), ZERO0),
    "dp2z1": (2, Sizes(), {}),
    "dp2z2": (2, Sizes(), ZERO2),
    "dp3z3": (3, Sizes(), ZERO3),
    "tp2dp2z3": (4, Sizes(tp=2), SP | ZERO3),
}
SPARSE = {
    "one": (1, Sizes(ep=1), {}),
    "ep2": (2, Sizes(ep=2), {}),
    "ep4": (4, Sizes(ep=4), {}),
    "tp2": (2, Sizes(tp=2, ep=1), SP),  # an expert's tensors over both ranks
    "tp2ep2": (4, Sizes(tp=2, ep=2), SP),
    "tp2ep2etp1": (2, Sizes(tp=2, ep=2, etp=1), SP),
    "pp2ep2": (4, Sizes(pp=2, ep=2), {}),
    "cp2ep2": (2, Sizes(cp=2, ep=2), {}),
    "dp2z1": (2, Sizes(ep=1), {}),
    "ep2dp2z2": (4, Sizes(ep=2), ZERO2),
    "ep2dp2z3": (4, Sizes(ep=2), ZERO3),
}
MODELS = {
    "dense": (DENSE, {"family": "qwen3", "tied": True}),
    "untied": (DENSE, {"family": "qwen2", "tied": False}),
    "sparse": (SPARSE, {"family": "qwen3_moe", "tied": False}),
    "mixed": (SPARSE, {"family": "qwen2_moe", "tied": True, "mlp_only_layers": [1]}),  # a dense layer among sparse ones
}
STATE = TrainState(
    iteration=7,
    consumed_samples=56,
    skipped=2,
    optimizer_steps=5,
    loss_scale=LossScale(True, 4096.0, 17, 1).as_json(),
    data="fingerprint",
    settings={"lr": 1e-3},
)


@cache
def made_up(name, kind, shape):
    """Values that no other tensor holds, and that bfloat16 cannot."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {kind}".encode()))
    return torch.randn(shape, generator=generator)


def _wanted(shard, box, kind):
    rows = made_up(shard.name, kind, shard.shape)[box.start : box.start + box.rows]
    return rows if box.columns is None else rows[:, slice(*box.columns)]


def _tensors(shard, optimizer):
    """What is kept of a parameter, by kind."""
    return {"master": shard.master.detach()} | {name: optimizer.state(shard, name) for name in optimizer.names}


def _draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _seed(rank):
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)


def _write(rank, model, layout, dtype, folder):
    """The made-up state on this layout, published. A rank's random numbers are those of its number."""
    _, sizes, options = layout
    mesh = meshes.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    engine = make_engine(model, dtype, mesh, **options)
    optimizer, cfg = Optimizer(engine.shards, ADAM), read_config(model)
    for shard in engine.shards:
        for kind, tensor in _tensors(shard, optimizer).items():
            for box in shard.boxes:
                tensor[box.local : box.local + box.rows] = _wanted(shard, box, kind)
    engine.shards.push()
    _seed(rank)
    snapshot = take_snapshot(
        mesh=mesh,
        shards=engine.shards,
        specs=tensor_specs(cfg),
        cfg=cfg,
        dtype=dtype,
        state=STATE,
        optimizer=optimizer,
        save_rng=True,
    )
    group = all_ranks()
    publish(folder, STATE.iteration, lambda staging: snapshot.write(staging, group), group=group)
    meshes.stop()


def _read(rank, model, layout, dtype, sources):
    """What differs on this rank after loading each of the checkpoints, {source: (ranks, folder)}."""
    _, sizes, options = layout
    mesh = meshes.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    engine = make_engine(model, dtype, mesh, **options)
    cfg = read_config(model)
    specs, wrong = tensor_specs(cfg), []
    for source, (ranks, folder) in sources.items():
        optimizer = Optimizer(engine.shards, ADAM)
        for shard in engine.shards:  # or what the one before has left would be found again
            shard.master.detach().fill_(torch.nan)
        weights, state = MegatronWeights(folder, specs, num_layers=cfg.num_layers), read_state(folder)
        load_training_weights(engine.shards, specs, weights)
        load_optimizer(optimizer, specs, weights, state)
        load_rng(folder, mesh)
        wrong += [f"{source}: {what}" for what in _differing(engine.shards, optimizer)]
        drawn = _draw()
        _seed(rank % ranks)
        if drawn != _draw():
            wrong.append(f"{source}: random numbers")
        if optimizer.num_steps != STATE.optimizer_steps or state != replace(STATE, settings=state.settings):
            wrong.append(f"{source}: {state}")
    meshes.stop()
    return wrong


def _differing(shards, optimizer):
    wrong = []
    for shard in shards:
        for kind, tensor in _tensors(shard, optimizer).items():
            for box in shard.boxes:
                here = slice(box.local, box.local + box.rows)
                if not torch.equal(tensor[here], _wanted(shard, box, kind)):
                    wrong.append(f"{shard.name} {kind}")
                if kind == "master" and shard.copied and not torch.equal(shard.param[here], tensor[here].bfloat16()):
                    wrong.append(f"{shard.name} copy")
    return wrong


def every_pair(tmp_path, name, dtype, names=None):
    layouts, config = MODELS[name]
    layouts = {key: layouts[key] for key in names or layouts}
    model = make_tiny_model(tmp_path / "model", layers=4, **SMALL, **config)
    sources = {}
    for key, layout in layouts.items():
        (run := tmp_path / key).mkdir()
        run_ranks(_write, layout[0], model, layout, dtype, run, timeout=150)
        sources[key] = layout[0], run / "iter_0000007"
    found = {
        key: [
            line for lines in run_ranks(_read, layout[0], model, layout, dtype, sources, timeout=150) for line in lines
        ]
        for key, layout in layouts.items()
    }
    assert not {key: lines[:5] for key, lines in found.items() if lines}


# All the ways in which a tensor is cut; the others are in `make test-slow`.
FEW = {"dense": ("one", "tp2pp2", "dp2z1", "dp3z3"), "mixed": ("one", "tp2ep2", "pp2ep2", "ep2dp2z3")}


@pytest.mark.parametrize("name", FEW)
def test_with_masters(tmp_path, name):
    every_pair(tmp_path, name, torch.bfloat16, FEW[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dense", torch.bfloat16),
        ("dense", torch.float32),
        ("untied", torch.bfloat16),
        ("sparse", torch.bfloat16),
        ("sparse", torch.float32),
        ("mixed", torch.bfloat16),
        ("mixed", torch.float32),
    ],
)
def test_every_model(tmp_path, name, dtype):
    every_pair(tmp_path, name, dtype)
