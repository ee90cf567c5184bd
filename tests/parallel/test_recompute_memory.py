"""What a forward pass leaves in memory for the backward pass, as the kernel counts it."""

from __future__ import annotations

import ctypes
import functools
import gc

import pytest
import torch

from megatron_swift.kernels.attention import Segments
from megatron_swift.kernels.layers import choose_layer_kernels
from megatron_swift.parallel import build
from megatron_swift.parallel import mesh as meshes
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.testing import make_tiny_model, run_ranks
from tiny_models import make_engine

T, H, F, LAYERS = 2048, 256, 512, 4
MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # malloc.h


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    sizes = {"layers": LAYERS, "hidden_size": H, "tied": False, "intermediate_size": F, "head_dim": 64}
    make_tiny_model(place / "qwen3", family="qwen3", **sizes)
    make_tiny_model(place / "qwen3_moe", family="qwen3_moe", moe_intermediate_size=F, **sizes)
    return place


def resident() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def kept(rank, folder, ranks, modules) -> float:
    """Bytes that one rank's layers keep of a row of T tokens."""
    ctypes.CDLL("libc.so.6").mallopt(
        M_MMAP_THRESHOLD, 1 << 16
    )  # a tensor is given back when it goes, whatever lies around it
    mesh = meshes.start(backend="gloo", timeout_minutes=1, sizes=Sizes(tp=ranks, ep=1, etp=1))
    options = {"recompute": Recompute("selective", modules=modules), "sequence_parallel": ranks > 1}
    options["grouped_experts"] = False  # in grouped products on one rank activations are never kept
    engine = make_engine(folder, torch.float32, mesh, **options)
    assert ("recompute" in engine.kernels) == bool(modules)
    model, positions = engine.chunks[0], torch.arange(T)
    tokens = torch.arange(T) % 263
    run = functools.partial(model.hidden_states, tokens, positions, Segments.of([T], torch.device("cpu")))
    run().sum().backward()  # the allocator has seen it all
    before = resident()
    out = run()
    held = resident() - before
    out.sum().backward()
    return held


@pytest.mark.parametrize(
    ("family", "ranks", "modules", "less"),
    [
        # the input of two products a layer
        ("qwen3", 1, ("layernorm",), 2 * H),
        ("qwen3", 2, ("layernorm",), 2 * H),  # gathered over the ranks, of which each has half the tokens
        # at the least: gate and up, the gate's silu, their product
        ("qwen3", 1, ("mlp",), 4 * F),
        ("qwen3_moe", 1, ("moe_act",), 2 * F),  # two experts a token
    ],
)
def test_less_is_kept(models, family, ranks, modules, less):
    def most(modules):
        return max(run_ranks(kept, ranks, models / family, ranks, modules))

    saved, expected = most(()) - most(modules), less * T * LAYERS * 4
    print(f"{saved / MIB:.1f} MiB less, {expected / MIB:.1f} expected")
    assert saved > 0.85 * expected


@pytest.mark.parametrize(
    ("options", "dense", "sparse"),
    [
        (Recompute(), False, False),
        (Recompute("full", "block", 1), True, True),
        (Recompute("selective", modules=("layernorm",)), False, False),
        (Recompute("selective", modules=("mlp", "layernorm")), True, False),  # shared experts are not repeated
    ],
)
def test_engines_choose_the_mlps_form(models, monkeypatch, options, dense, sparse):
    """What is computed again as a whole keeps the input of its last product, on a GPU: that product is left out then."""
    asked = []

    def chosen(*args, recomputed, **others):
        asked.append(recomputed)
        return choose_layer_kernels(*args, recomputed=recomputed, **others)

    monkeypatch.setattr(build, "choose_layer_kernels", chosen)
    for family in ("qwen3", "qwen3_moe"):
        make_engine(models / family, torch.float32, recompute=options)
    assert asked == [dense, sparse]
