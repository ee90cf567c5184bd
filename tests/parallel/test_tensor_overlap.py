"""Overlapped tensor parallelism: the fused layers against the plain ones in float64, and torch's own operations against their twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_parallel import by_hand, compare, samples_of_steps
from test_layouts import SP, ZERO0, ZERO3, full, on_layout

from megatron_swift.models.layers import Linear, NormLinear
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel import tensor as tensor_parallel
from megatron_swift.parallel.collectives import Gather, Scatter
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.tensor_overlap import (
    OverlappedLinear,
    OverlappedNormLinear,
    require_symmetric_memory,
    symmetric_memory,
    written_out,
)
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.utils.errors import UsageError
from tiny_models import SMALL

TOKENS, HIDDEN, INNER = 6, 8, 10  # of one rank: its tokens, the whole hidden size, its features


def give_torch_a_cpu_form() -> torch.library.Library:
    """torch's own definition of its two operations, under their names for CPU tensors; in effect while the result lives."""
    from torch.distributed import _symmetric_memory as memory

    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        library.impl(name, getattr(memory, f"_{name}_fallback"), "CPU")
    return library


def run_layers(column, row, x) -> list[torch.Tensor]:
    """Output and all gradients of row(gelu(column(x))), for a cotangent that differs from token to token."""
    x = x.clone().requires_grad_()
    out = row(torch.nn.functional.gelu(column(x)))
    cotangent = torch.cos(torch.arange(out.numel())).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, [x, *column.parameters(), *row.parameters()], cotangent)]


def fused_and_plain(rank, ranks, kind, bias, layer_norm):
    group = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=Sizes(tp=ranks)).tp.group
    library = give_torch_a_cpu_form()
    torch.manual_seed(rank)
    column = NormLinear(HIDDEN, INNER, 1e-6, bias=bias, layer_norm=layer_norm).double()
    row = Linear(INNER, HIDDEN, bias=layer_norm).double()
    for parameter in [*column.parameters(), *row.parameters()]:
        torch.nn.init.normal_(parameter)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    products = symmetric_memory(group) if kind == "torch" else written_out(group)
    fused = run_layers(OverlappedNormLinear(column, products), OverlappedLinear(row, products), x)
    column.enter, row.leave = (lambda x: Gather.apply(x, group)), (lambda x: Scatter.apply(x, group))
    plain = run_layers(column, row, x)
    del library
    mesh_module.stop()
    return [[value.numpy() for value in values] for values in (fused, plain)]


KINDS = {"no-bias": (False, False), "bias": (True, False), "layer-norm": (True, True)}


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("kind", ["torch", "written-out"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_layers_fused_and_plain(ranks, kind, layer):
    """layer-norm: with its bias, and one on what is summed over the ranks."""
    for fused, plain in run_ranks(fused_and_plain, ranks, ranks, kind, *KINDS[layer]):
        assert len(fused) == len(plain) == {"no-bias": 5, "bias": 6, "layer-norm": 8}[layer]
        for mine, expected in zip(fused, plain, strict=True):
            assert abs(expected).max() > 0.01
            np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-12)


SAMPLES = samples_of_steps(num_micro=4)
LAYOUTS = [
    (2, Sizes(tp=2), SP),
    (4, Sizes(tp=4), SP | ZERO0),  # keys and values are replicated
    (4, Sizes(tp=2), SP | ZERO3 | full("uniform", 1)),
    (4, Sizes(tp=2, pp=2), SP),
    (4, Sizes(tp=2, cp=2), SP),
]


def layers_overlap(engine) -> None:
    for chunk in engine.chunks:
        for layer in chunk.layers:
            linears = (layer.self_attention.linear_qkv, layer.mlp.linear_fc1, layer.self_attention.linear_proj)
            assert [type(x) for x in linears] == [OverlappedNormLinear, OverlappedNormLinear, OverlappedLinear]


def overlapped_layout(rank, *args):
    """A run of test_layouts whose linears overlap, through the written-out products: the ranks are forks and keep it to themselves."""
    plain_install = tensor_parallel.install

    def install(model, cfg, tp, **options):
        plain_install(model, cfg, tp, **(options | {"products": written_out(tp.group)}))

    tensor_parallel.install = install
    return on_layout(rank, *args, tamper=layers_overlap)


@pytest.mark.parametrize(
    ("family", "tied", "layouts"), [("qwen3", True, LAYOUTS), ("qwen2", False, LAYOUTS[:1])], ids=["qwen3", "qwen2"]
)
def test_layouts(family, tied, layouts, tmp_path):
    """Three optimizer steps: losses, norms, evaluations and every parameter, as one process computes by hand."""
    folder = make_tiny_model(tmp_path, family=family, tied=tied, layers=3, **SMALL)
    expected = by_hand(folder, torch.float64, SAMPLES)
    for ranks, sizes, options in layouts:
        for result in run_ranks(overlapped_layout, ranks, folder, torch.float64, SAMPLES, sizes, options):
            compare(result, expected, 1e-10)


def refusal(rank):
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=Sizes(tp=2))
    try:
        require_symmetric_memory(mesh.tp, mesh.device)
    except UsageError as error:
        return error.what, error.why, error.do
    finally:
        mesh_module.stop()
    return None


def test_refused_on_the_cpu():
    for what, why, do in run_ranks(refusal, 2):
        assert "--tp_comm_overlap" in what and "on the cpu" in why and "leave --tp_comm_overlap out" in do
