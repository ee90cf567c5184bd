"""Dispatch where ranks differ: some hold padding, which is not routed, and some do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_parallel import compare
from test_layouts import full, on_layout
from test_moe_layouts import by_hand_sparse

from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
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
