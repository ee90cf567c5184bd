"""Megatron's `torch` files of tensor-parallel ranks, of models of every shape, put together to the last bit."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.parallel.mesh import Axis
from megatron_swift.parallel.tensor import placement
from shapes import SHAPES, RandomWeights

DENSE = [name for name in SHAPES if SHAPES[name].moe is None]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_ranks_files_are_joined(name, ranks, tmp_path):
    cfg = SHAPES[name].replace(vocab_size=264)
    specs = tensor_specs(cfg)
    for rank in range(ranks):
        axis, model = Axis(rank, tuple(range(ranks))), {}
        for key, spec in specs.items():
            where = placement(key, spec.shape, cfg, axis, sequence_parallel=False)
            whole = RandomWeights().read(spec).float()
            rows = torch.cat([whole[span.start : span.start + span.rows] for span in where.spans])
            model[key] = rows if where.columns is None else rows[:, slice(*where.columns)].clone()
        folder = tmp_path / f"mp_rank_{rank:02d}"
        folder.mkdir()
        torch.save({"model": model, "iteration": 1, "checkpoint_version": 3.0}, folder / "model_optim_rng.pt")
    found = MegatronWeights(tmp_path, specs, num_layers=cfg.num_layers)
    wrong = [
        key for key, spec in specs.items() if not torch.equal(found.read(spec), RandomWeights().read(spec).float())
    ]
    assert not wrong
