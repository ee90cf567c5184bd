"""Dispatch where ranks differ: some hold padding, which is not routed, and some do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_parallel import compare
from test_layouts import full, on_layout
from test_moe_layouts import by_hand_sparse

from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel import build
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from shapes import SHAPES, random_engine
from tiny_models import SMALL, random_samples

ROUTER = RouterOptions(balancing="aux_loss", aux_coeff=0.1)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("recompute", [full("block", 1), full("uniform", 2)], ids=["block", "uniform"])
@pytest.mark.parametrize("sizes", [Sizes(tp=2, ep=1), Sizes(tp=2, ep=2, etp=1)], ids=["etp2", "ep2"])
def test_layers_are_computed_again_on_all_ranks_alike(tmp_path, dispatcher, recompute, sizes):
    """Seven tokens on two ranks: one of them holds a padding token, whose graph has an operation more.

    Once the rank without padding waited in the collective of the backward pass and the other in one of the recomputation.
    """
    folder = make_tiny_model(tmp_path, family="mixtral", tied=False, **SMALL)
    rng = np.random.default_rng(3)
    samples = [[random_samples(rng, [7], trained=1.0)] for _ in range(2)]
    expected = by_hand_sparse(folder, torch.float64, samples, ROUTER)
    options = {"sequence_parallel": True, "dispatcher": dispatcher, "router": ROUTER} | recompute
    for found in run_ranks(on_layout, 2, folder, torch.float64, samples, sizes, options, timeout=40):
        compare(found, expected, 1e-10)


def test_which_kernel_the_routers_get(monkeypatch):
    """It is chosen by the dtypes of router and model, put into every router and named in the banner."""
    cfg, router = SHAPES["experts"], RouterOptions(dtype=torch.float64)
    assert "; router in torch's own operators (Triton kernels need a GPU" in random_engine(cfg).kernels["experts"]
    asked, gate = [], lambda *_: None
    monkeypatch.setattr(build, "choose_gate", lambda *a, num_experts: asked.append((*a, num_experts)) or (gate, "so"))
    engine = random_engine(cfg, dtype=torch.float32, router=router)
    assert asked == [(torch.device("cpu"), (torch.float64, torch.float32), cfg.moe.num_experts)]
    assert engine.kernels["experts"].endswith("; so")
    assert len(engine.chunks[0].sparse) == 3 and all(layer.router.gate is gate for layer in engine.chunks[0].sparse)
