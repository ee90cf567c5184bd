"""Models described by flags, and dropout, under every layout: the losses, norms and parameters of one process."""

from __future__ import annotations

import pytest
import torch
from test_data_parallel import CLIP, LR, OPTIMIZER, Result, compare, samples_of_steps

from megatron_swift.data.loader import collate
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.dropout import Dropout
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.testing import run_ranks
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step
from shapes import SHAPES, random_engine, shape

SAMPLES = samples_of_steps(num_micro=4)
SP, RING = {"sequence_parallel": True}, {"context_kind": "p2p"}
FULL = {"recompute": Recompute("full", "uniform", 1)}
SELECTIVE = {"recompute": Recompute("selective")}
LAYOUTS = {
    "tp2": (2, Sizes(tp=2), {}),
    "tp4-sp": (4, Sizes(tp=4), SP),
    "pp2": (2, Sizes(pp=2), {}),
    "cp2": (2, Sizes(cp=2), {}),
    "dp2": (2, Sizes(), {}),
    "tp2-pp2-sp": (4, Sizes(tp=2, pp=2), SP),
    "tp2-cp2-sp-full": (4, Sizes(tp=2, cp=2), SP | FULL),
    "tp2-pp2-cp2": (8, Sizes(tp=2, pp=2, cp=2), SP | {"chunks_per_rank": 1}),
}
SPARSE_LAYOUTS = {
    "ep2": (2, Sizes(ep=2), {}),
    "tp2-etp2-sp": (2, Sizes(tp=2, ep=1, etp=2), SP),
    "ep2-etp2-sp": (4, Sizes(tp=2, ep=2, etp=2), SP),
    "pp2-ep2": (4, Sizes(pp=2, ep=2, etp=1), {}),
    "cp2-ep2": (2, Sizes(cp=2, ep=2, etp=1), {}),
}
ROUTER = {"router": RouterOptions(balancing="aux_loss", aux_coeff=0.01)}


def run_steps(rank: int, cfg: ModelConfig, sizes: Sizes, options: dict) -> Result:
    """Three steps, with an evaluation before and after."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    engine = random_engine(cfg, mesh, **options)
    optimizer = Optimizer(engine.shards, OPTIMIZER)

    def batches(step):
        multiples = {"pad_to_multiple": engine.row_multiple, "segment_multiple": engine.segment_multiple}
        return [collate(m, pad_id=0, rows=(), **multiples) for m in step[mesh.dp_rank :: mesh.dp_size]]

    result = Result([], [], [engine.evaluate(batches(SAMPLES[0]))], {})
    for iteration, step in enumerate(SAMPLES):
        scale = LossScale.for_dtype("float32")
        report = train_step(
            engine, optimizer, batches(step), lr=LR, clip_grad=CLIP, loss_scale=scale, iteration=iteration
        )
        result.losses.append(report.loss)
        result.norms.append(report.grad_norm)
    result.evaluations.append(engine.evaluate(batches(SAMPLES[0])))
    result.params = {n: values.double().numpy() for n, values in engine.shards.full().items()}
    mesh_module.stop()
    return result


@pytest.fixture(scope="module")
def one_process():
    """What one process computes, once for each model."""
    known: dict = {}

    def find(cfg: ModelConfig, **options) -> Result:
        key = repr((cfg, options))
        if key not in known:
            known[key] = run_steps(0, cfg, Sizes(ep=1 if cfg.moe else None), options)
        return known[key]

    return find


DENSE = [name for name in SHAPES if SHAPES[name].moe is None]
# All layouts for two shapes that have everything between them, the layouts that cut deepest for the others; `make test-slow` runs them all.
CUT = ("tp4-sp", "tp2-pp2-cp2")
PAIRS = [
    pytest.param(n, y, marks=[] if n == "gpt2" or y in CUT else [pytest.mark.slow])
    for n in DENSE
    for y in LAYOUTS
    if n in ("gpt2", "neox") or y in CUT
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_shapes(one_process, name, layout):
    ranks, sizes, options = LAYOUTS[layout]
    expected = one_process(SHAPES[name])
    for result in run_ranks(run_steps, ranks, SHAPES[name], sizes, options):
        compare(result, expected, 1e-10)


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_experts_of_any_shape(one_process, layout):
    ranks, sizes, options = SPARSE_LAYOUTS[layout]
    expected = one_process(SHAPES["experts"], **ROUTER)
    for result in run_ranks(run_steps, ranks, SHAPES["experts"], sizes, options | ROUTER):
        compare(result, expected, 1e-10)


BOTH = {"dropout": Dropout(0.2, 0.1, seed=7)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(one_process, layout):
    """The same values are dropped wherever a token, a head and a layer lie, and again where layers are computed again."""
    ranks, sizes, options = LAYOUTS[layout]
    expected = one_process(shape(), **BOTH)
    for result in run_ranks(run_steps, ranks, shape(), sizes, options | BOTH):
        compare(result, expected, 1e-10)


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE, {"recompute": Recompute("full", "block", 1)}])
def test_dropout_is_repeated_by_recomputation(one_process, recompute):
    compare(run_steps(0, shape(), Sizes(), recompute | BOTH), one_process(shape(), **BOTH), 1e-12)


def test_dropout_differs_by_seed_step_and_micro_batch(one_process):
    """Evaluation drops nothing; another seed, and no dropout, train otherwise."""
    plain, first = one_process(shape()), one_process(shape(), **BOTH)
    other = one_process(shape(), dropout=Dropout(0.2, 0.1, seed=8))
    assert first.evaluations[0] == plain.evaluations[0]
    assert len({plain.losses[0], first.losses[0], other.losses[0]}) == 3


def test_a_rank_of_experts_drops_alike(one_process):
    drop = BOTH | ROUTER
    expected = one_process(SHAPES["experts"], **drop)
    for result in run_ranks(run_steps, 4, SHAPES["experts"], Sizes(tp=2, ep=2, etp=2), drop | SP):
        compare(result, expected, 1e-10)


def test_float32_is_near(one_process):
    """The fallback forms in the usual precision: only rounding lies between."""
    cfg = SHAPES["gpt2"]
    engine = random_engine(cfg, dtype=torch.float32)
    expected = one_process(cfg)
    multiples = {"pad_to_multiple": engine.row_multiple, "segment_multiple": engine.segment_multiple}
    loss, tokens = engine.evaluate([collate(m, pad_id=0, rows=(), **multiples) for m in SAMPLES[0]])
    assert tokens == expected.evaluations[0][1] and loss == pytest.approx(expected.evaluations[0][0], rel=1e-5)


def test_selective_recomputation_reaches_the_written_out_attention():
    """What keeps the attention weights is what selective recomputation is for; the numbers stay."""
    plain = random_engine(shape(), attention_backend="unfused")
    again = random_engine(shape(), attention_backend="unfused", **SELECTIVE)
    assert "again" in again.kernels["attention"] and "again" not in plain.kernels["attention"]
    batch = [collate(SAMPLES[0][1], pad_to_multiple=8, pad_id=0, rows=())]
    losses = [engine.forward_backward(batch, num_tokens=1) for engine in (plain, again)]
    assert losses[0] == losses[1] and plain.shards.grad_norm() == again.shards.grad_norm()
