"""Compiled layers give the same numbers as written-out ones, with one graph for each part of a layer whatever the lengths.

Every graph is traced and differentiated anew by each rank, which takes seconds: most layouts are in `make test-slow`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_parallel import LR, by_hand, compare, samples_of_steps
from test_layouts import SP, VIRTUAL, ZERO3, full, on_layout, parts
from test_moe_layouts import AUX, MODEL, by_hand_sparse, routed
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.parallel.compiled import Compile
from megatron_swift.parallel.dropout import Dropout
from megatron_swift.parallel.mesh import Sizes, start
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.utils.compilers import why_no_compiler
from megatron_swift.utils.errors import UsageError
from shapes import SHAPES, random_engine
from tiny_models import SMALL, as_batch, make_engine, random_samples

# Traces and differentiates as the real backend does, but needs no compiler: seconds instead of a minute.
TRACED = Compile("true", "aot_eager")
# Rows of 2 tokens up, also as wide as the model (32) and as long as another row; one of a single token, one of single ones.
RAGGED = [[3, 5, 9], [17], [2], [1], [30, 4, 1], [32], [8], [64], [1, 1], [50, 50], [17], [2, 30]]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """torch gives up on a function after eight graphs, of whatever test."""
    torch._dynamo.reset()


def run_ragged(engine, rows=RAGGED) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Every row evaluated and trained on, the losses of both; the gradients of all."""
    multiple = engine.row_multiple
    rng, losses = np.random.default_rng(3), []
    for lengths in rows:
        batch = as_batch(random_samples(rng, lengths, trained=0.7, vocab_size=200), pad_to_multiple=multiple)
        losses.append(engine.evaluate([batch])[0])
        losses.append(engine.forward_backward([batch], num_tokens=10))
    return losses, {shard.name: shard.master.grad.clone() for shard in engine.shards}


def assert_same(found, expected, tolerance: float) -> None:
    assert np.allclose(found[0], expected[0], rtol=tolerance, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Per kind of model the parts: heads, the rest of a dense layer, the middle of a sparse one; a graph each.
KINDS = [
    ("qwen2_moe", {"mlp_only_layers": [1]}, torch.float64, 3),
    slow("qwen3", {}, torch.float64, 2),
    slow("qwen3_moe", {}, torch.float32, 2),
    slow("llama", {}, torch.float32, 2),
]


@pytest.mark.parametrize(("family", "config", "dtype", "num_parts"), KINDS)
def test_ragged_rows_make_one_graph_for_each_part(tmp_path, family, config, dtype, num_parts):
    folder = make_tiny_model(tmp_path, family=family, layers=4, **{**SMALL, **config})
    counter = CompileCounterWithBackend("aot_eager")
    found = run_ragged(make_engine(folder, dtype, compile=Compile("true", counter)))
    assert counter.frame_count == num_parts
    expected = run_ragged(make_engine(folder, dtype, compile=Compile("false")))
    assert_same(found, expected, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("shape", "num_parts"), [("gpt2", 2), slow("neox", 2), slow("experts", 3)])
def test_other_shapes(shape, num_parts):
    rows = [lengths for lengths in RAGGED if max(lengths) <= 30]
    counter = CompileCounterWithBackend("aot_eager")
    found = run_ragged(random_engine(SHAPES[shape], compile=Compile("true", counter)), rows)
    assert counter.frame_count == num_parts
    assert_same(found, run_ragged(random_engine(SHAPES[shape]), rows), 1e-10)


@pytest.mark.parametrize("family", ["llama", slow("qwen3")])
def test_kernels_one_by_one_make_a_graph_each(tmp_path, family):
    """The norms of Qwen3's heads are in the graph of the rotation."""
    folder = make_tiny_model(tmp_path, family=family, layers=3, **SMALL)
    counter = CompileCounterWithBackend("aot_eager")
    options = {"dropout": Dropout(hidden=0.1, seed=3)}  # other zeros in each step, so no part of a graph
    engine = make_engine(folder, torch.float64, compile=Compile("true", counter), **options)
    assert "dropout between them" in engine.kernels["compile"]
    found = run_ragged(engine, RAGGED[:6])
    assert counter.frame_count == len(("norm", "norm of a sum", "rotation", "SwiGLU"))
    assert_same(found, run_ragged(make_engine(folder, torch.float64, **options), RAGGED[:6]), 1e-10)


SAMPLES = samples_of_steps(num_micro=4)
WHOLE, SINGLE = "each layer, in two parts", "each by itself"
LAYOUTS = [
    (2, Sizes(), full("uniform", 2) | ZERO3, WHOLE),
    (2, Sizes(tp=2), SP, SINGLE),
    slow(2, Sizes(), {}, WHOLE),
    slow(2, Sizes(tp=2), parts("layernorm", "mlp"), SINGLE),
    slow(2, Sizes(pp=2), {}, WHOLE),
    slow(2, Sizes(cp=2), {}, WHOLE),
    slow(4, Sizes(tp=2, pp=2), SP | VIRTUAL | full("uniform", 1), SINGLE),
    slow(1, Sizes(), full("block", 1), WHOLE),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=False, layers=4, **SMALL)


def saying(words, engine):
    assert words in engine.kernels["compile"]


@pytest.mark.parametrize(("ranks", "sizes", "options", "words"), LAYOUTS, ids=str)
def test_layouts(folder, ranks, sizes, options, words):
    options, said = options | {"compile": TRACED}, functools.partial(saying, words)
    expected = by_hand(folder, torch.float64, SAMPLES)
    for result in run_ranks(on_layout, ranks, folder, torch.float64, SAMPLES, sizes, options, LR, said):
        compare(result, expected, 1e-10)


def graphs_on_layout(rank, folder, sizes, options) -> int:
    mesh, counter = start(backend="gloo", timeout_minutes=2, sizes=sizes), CompileCounterWithBackend("aot_eager")
    run_ragged(make_engine(folder, torch.float64, mesh, compile=Compile("true", counter), **options))
    return counter.frame_count


COUNTED = [
    (1, Sizes(), full("block", 2), 2),
    (2, Sizes(), ZERO3, 2),
    (2, Sizes(tp=2), SP, 3),
    (2, Sizes(pp=2), VIRTUAL | full("uniform", 1), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sizes", "options", "graphs"), COUNTED, ids=str)
def test_no_layout_makes_more_graphs(folder, ranks, sizes, options, graphs):
    assert run_ranks(graphs_on_layout, ranks, folder, sizes, options) == [graphs] * ranks


SPARSE = [
    routed(2, AUX, ep=2),
    routed(2, AUX | SP, tp=2),
    routed(2, AUX | parts("layernorm", "moe_act") | ZERO3),
    routed(1, AUX | full("uniform", 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sizes", "options"), SPARSE, ids=str)
def test_sparse_layouts(tmp_path, ranks, sizes, options):
    folder = make_tiny_model(tmp_path, family="qwen2_moe", tied=False, **MODEL | {"mlp_only_layers": [1]})
    expected = by_hand_sparse(folder, torch.float64, SAMPLES, AUX["router"])
    for result in run_ranks(
        on_layout, ranks, folder, torch.float64, SAMPLES, sizes, options | {"compile": TRACED}, timeout=240.0
    ):
        compare(result, expected, 1e-10)


def test_the_banner_says_what_is_compiled(folder):
    assert "auto: on a CPU" in make_engine(folder, torch.float32).kernels["compile"]
    assert "compile" not in make_engine(folder, torch.float32, compile=Compile("false")).kernels
    lines = make_engine(folder, torch.float32, compile=TRACED).kernels
    assert lines["compile"].startswith("aot_eager: each layer") and lines["layers"].endswith("are not compiled")


def test_true_without_a_compiler_is_an_error(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--torch_compile true cannot be used here") as caught:
        make_engine(folder, torch.float32, compile=Compile("true"))
    assert "no-such-compiler" in caught.value.why


def test_true_with_nothing_to_compile_is_an_error():
    with pytest.raises(UsageError) as caught:
        random_engine(SHAPES["gpt2"], compile=TRACED, dropout=Dropout(hidden=0.1))
    assert "dropout stands between" in caught.value.why


def test_products_in_8_bits_are_not_compiled(folder):
    fp8 = {"fp8": Fp8Options(format="hybrid")}
    with pytest.raises(UsageError, match="--torch_compile true") as caught:
        make_engine(folder, torch.bfloat16, compile=TRACED, **fp8)
    assert "8 bits" in caught.value.why
    assert "8 bits" in make_engine(folder, torch.bfloat16, **fp8).kernels["compile"]


# What the real compiler gives, and that a second process finds what the first has left: prints whether the numbers are the plain ones, and
# how many graphs were found and made.
REAL = """
import torch
from shapes import SHAPES, random_engine
from test_compiled import assert_same, run_ragged
from megatron_swift.parallel.compiled import Compile
rows = [[3, 5, 9], [17], [2], [1], [30, 4, 1]]
found = run_ragged(random_engine(SHAPES["gpt2"], compile=Compile("true")), rows)
assert_same(found, run_ragged(random_engine(SHAPES["gpt2"]), rows), 1e-10)
counts = torch._dynamo.utils.counters["aot_autograd"]
print("cache", counts["autograd_cache_hit"], counts["autograd_cache_miss"])
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_compiler(gpu=False)), reason=why_no_compiler(gpu=False))
def test_inductor_gives_the_same_numbers_and_keeps_its_work(tmp_path):
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    env = os.environ | {"PYTHONPATH": places, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for expected in ("cache 0 3", "cache 3 0"):  # x + 1, and two parts
        done = subprocess.run([sys.executable, "-c", REAL], env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
