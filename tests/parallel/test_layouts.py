"""Every layout gives the numbers of one process: loss, gradient norm, evaluation and each parameter after three optimizer steps.

The reference computes by hand, sequence by sequence, and uses nothing of the engine
(test_data_parallel.by_hand). Rows are packed and ragged, micro-batches
hold from none to all of their tokens trained, the vocabulary is prime, the layers are five.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_parallel import CLIP, LR, OPTIMIZER, Result, by_hand, compare, samples_of_steps

from megatron_swift.data.loader import collate
from megatron_swift.data.types import IGNORE
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step
from tiny_models import SMALL, make_engine

SAMPLES = samples_of_steps(num_micro=4)
LR32 = 3e-4  # Adam turns a rounding difference of a gradient near zero into up to its share of lr
SP = {"sequence_parallel": True}
ZERO0, ZERO2, ZERO3 = ({"sharding": s} for s in (Sharding.NO_SHARD, Sharding.OPTIM_GRADS, Sharding.OPTIM_GRADS_PARAMS))
RING, HEADS, VIRTUAL = {"context_kind": "p2p"}, {"context_kind": "a2a"}, {"chunks_per_rank": 2}
CHUNKED, UNFUSED = {"chunked_cross_entropy": True}, {"attention_backend": "unfused"}


def full(method: str, num_layers: int) -> dict:
    return {"recompute": Recompute("full", method, num_layers)}


def parts(*modules: str) -> dict:
    return {"recompute": Recompute("selective", modules=modules)}


# (ranks, sizes, options). What is left of the ranks is data parallel.
LAYOUTS = [
    (2, Sizes(tp=2), {}),
    (2, Sizes(tp=2), SP),
    (2, Sizes(tp=2), CHUNKED),
    (4, Sizes(tp=4), SP),  # two query groups on four ranks: keys and values are replicated
    (4, Sizes(tp=4), CHUNKED),
    (4, Sizes(tp=2), SP | parts("core_attn", "layernorm")),
    (2, Sizes(pp=2), parts("mlp")),
    (3, Sizes(pp=3), {}),
    (4, Sizes(pp=4), {}),
    (2, Sizes(pp=2), VIRTUAL),
    (2, Sizes(pp=2), {"first_layers": 1}),
    (4, Sizes(pp=2), VIRTUAL | ZERO2),
    (2, Sizes(cp=2), {}),
    (2, Sizes(cp=2), RING),
    (2, Sizes(cp=2), HEADS),
    (4, Sizes(cp=4), {}),
    (4, Sizes(cp=4), RING),
    (4, Sizes(cp=4), HEADS),  # fewer query groups than ranks
    (3, Sizes(cp=3), RING),
    (4, Sizes(cp=2), ZERO0),
    (2, Sizes(), ZERO0),
    (2, Sizes(), ZERO2),
    (4, Sizes(), ZERO3 | parts("layernorm", "mlp")),
    (1, Sizes(), full("uniform", 2)),
    (2, Sizes(), full("block", 2) | ZERO3),
    (2, Sizes(), UNFUSED | parts("core_attn", "layernorm")),
    (4, Sizes(tp=2, pp=2), SP),
    (4, Sizes(tp=2, pp=2), VIRTUAL | full("uniform", 1)),
    (4, Sizes(tp=2, cp=2), SP | parts("layernorm", "mlp")),
    (4, Sizes(tp=2, cp=2), RING),
    (4, Sizes(pp=2, cp=2), HEADS),
    (8, Sizes(tp=2, pp=2, cp=2), SP),
    (8, Sizes(tp=2, pp=2), SP | VIRTUAL | full("block", 1)),
    (8, Sizes(tp=4, pp=2), SP | CHUNKED),
    (8, Sizes(pp=2, cp=2), ZERO3 | RING),
    (8, Sizes(tp=2, cp=2), SP | ZERO0 | HEADS),
]
# All layouts run on a tied model, every other one on an untied one; those that differ in their arithmetic in float32, too, on either model in
# turn. What is left out here is marked slow.
MODELS = [("qwen3", True), ("qwen2", False)]
IN_FLOAT32 = [x for x in LAYOUTS if x[0] <= 2 or x[0] == 8]


def name(layout) -> str:
    ranks, sizes, options = layout
    axes = "".join(f"{axis}{n}" for axis, n in vars(sizes).items() if n is not None and n != 1)
    rest = "-".join(str(getattr(v, "value", v)) for v in options.values())
    return f"{ranks}-{axes or 'dp'}-{rest}"


def on_layout(rank, folder, dtype, samples, sizes, options, lr=LR, tamper=lambda engine: None) -> Result:
    """Three steps of a run, with an evaluation before, between and after."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    engine = make_engine(folder, dtype, mesh, **options)
    tamper(engine)
    optimizer = Optimizer(engine.shards, OPTIMIZER)

    def batches(step):
        multiples = {"pad_to_multiple": engine.row_multiple, "segment_multiple": engine.segment_multiple}
        return [collate(m, pad_id=0, rows=(), **multiples) for m in step[mesh.dp_rank :: mesh.dp_size]]

    result = Result([], [], [engine.evaluate(batches(samples[0]))], {})
    for step in samples:
        scale = LossScale.for_dtype("float32")
        report = train_step(engine, optimizer, batches(step), lr=lr, clip_grad=CLIP, loss_scale=scale)
        result.losses.append(report.loss)
        result.norms.append(report.grad_norm)
        if len(result.losses) == 1:
            engine.evaluate(batches(step))
    result.evaluations.append(engine.evaluate(batches(samples[0])))
    result.params = {n: values.double().numpy() for n, values in engine.shards.full().items()}
    mesh_module.stop()
    return result


def model_name(model) -> str:
    return f"{model[0]}-{'tied' if model[1] else 'untied'}"


def on_models(layouts, is_slow):
    """Parameters `folder` and `layout`: each layout on either model. is_slow: of the numbers of the model and the layout."""
    pairs = [(i, m, j, x) for i, m in enumerate(MODELS) for j, x in enumerate(layouts)]
    params = [
        pytest.param(m, x, id=f"{model_name(m)}-{name(x)}", marks=[pytest.mark.slow] if is_slow(i, j) else [])
        for i, m, j, x in pairs
    ]
    return pytest.mark.parametrize(("folder", "layout"), params, indirect=["folder"])


@pytest.fixture(scope="module", params=MODELS, ids=model_name)
def folder(request, tmp_path_factory):
    family, tied = request.param
    return make_tiny_model(tmp_path_factory.mktemp("model"), family=family, tied=tied, layers=5, **SMALL)


@pytest.fixture(scope="module")
def expected(folder):
    return by_hand(folder, torch.float64, SAMPLES)


@on_models(LAYOUTS, lambda model, layout: model == 1 and layout % 2 == 1)
def test_float64(folder, expected, layout):
    ranks, sizes, options = layout
    for result in run_ranks(on_layout, ranks, folder, torch.float64, SAMPLES, sizes, options):
        compare(result, expected, 1e-10)


@pytest.fixture(scope="module")
def expected32(folder):
    return by_hand(folder, torch.float32, SAMPLES, lr=LR32)


@on_models(IN_FLOAT32, lambda model, layout: (model + layout) % 2 == 1)
def test_float32(folder, expected32, layout):
    ranks, sizes, options = layout
    result = run_ranks(on_layout, ranks, folder, torch.float32, SAMPLES, sizes, options, LR32)[0]
    compare(result, expected32, 1e-5)
    assert all(np.isfinite(value).all() for value in result.params.values())


def weighted(samples):
    """Every other sample with a weight of 0.5 to 2 for each trained token."""
    rng = np.random.default_rng(5)

    def weigh(sample, number):
        weights = rng.uniform(0.5, 2.0, len(sample.ids)).astype(np.float32)
        return (
            sample._replace(weights=np.where(sample.labels == IGNORE, 0, weights).astype(np.float32))
            if number % 2
            else sample
        )

    return [[[weigh(s, i) for i, s in enumerate(micro)] for micro in step] for step in samples]


WEIGHTED = [
    (1, Sizes(), CHUNKED),
    (2, Sizes(), {}),
    (2, Sizes(tp=2), SP | CHUNKED),
    (2, Sizes(tp=2), {}),
    (2, Sizes(pp=2), {}),
    (2, Sizes(cp=2), {}),
]


@pytest.mark.parametrize("layout", WEIGHTED, ids=name)
def test_weights_of_the_loss(folder, layout):
    ranks, sizes, options = layout
    samples = weighted(SAMPLES)
    for result in run_ranks(on_layout, ranks, folder, torch.float64, samples, sizes, options):
        compare(result, by_hand(folder, torch.float64, samples), 1e-10)
