"""Data parallelism: the same losses, gradient norms and parameters for any number of ranks, as one process computes by hand.

Each run is three optimizer steps over 12 micro-batches of ragged, packed rows whose numbers of trained tokens differ wildly, from none up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_swift.data.types import IGNORE, Batch, Sample
from megatron_swift.kernels.attention import Segments
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.data import wrapped
from megatron_swift.parallel.engine import Engine
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step
from tiny_models import SMALL, as_batch, load, make_engine, random_samples, read_config, under_hugging_face_names

LR, CLIP = 1e-3, 1.0
OPTIMIZER = OptimizerOptions(kind="adam", weight_decay=0.1)
# Of each micro-batch of a step: with 4 ranks (numbers modulo 4), rank 0 trains nothing and rank 3 nearly everything.
TRAINED = (0.0, 0.5, 0.02, 1.0, 0.0, 0.1, 0.0, 0.9, 0.0, 1.0, 0.3, 1.0)


@dataclass
class Result:
    """Per step the loss and the gradient norm; (loss sum, tokens) of each evaluation; the parameters at the end."""

    losses: list[float]
    norms: list[float]
    evaluations: list[tuple[float, int]]
    params: dict[str, np.ndarray]


def compare(found: Result, expected: Result, tolerance: float) -> None:
    """Losses and norms relatively, parameters by their largest difference. Raises AssertionError naming what differs."""
    for what in ("losses", "norms", "evaluations"):
        a, b = (np.array(getattr(r, what)) for r in (found, expected))
        assert np.allclose(a, b, rtol=tolerance, atol=0), f"{what} differ: {a} {b}"
    assert found.params.keys() == expected.params.keys()
    distances = {name: np.abs(found.params[name] - value).max() for name, value in expected.params.items()}
    wrong = {name: float(d) for name, d in distances.items() if not d < tolerance}
    assert not wrong, f"parameters differ: {wrong}"


def samples_of_steps(num_micro: int = 12) -> list[list[list[Sample]]]:
    """[step][micro-batch][sample]; segments of 2 to 30 tokens."""
    rng = np.random.default_rng(11)
    trained = [TRAINED[i % len(TRAINED)] for i in range(num_micro)]
    return [
        [random_samples(rng, rng.integers(2, 30, rng.integers(1, 4)), trained=t) for t in trained] for _ in range(3)
    ]


def by_hand(folder: Path, dtype: torch.dtype, steps: Sequence[Sequence[Sequence[Sample]]], lr: float = LR) -> Result:
    """One process, sequence by sequence, whole logits, torch's own clip and AdamW: nothing of the engine or the optimizer."""
    model = load(folder, dtype)
    named = dict(model.named_parameters())
    groups = [[p for p in named.values() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )

    def loss_sum(sample: Sample) -> torch.Tensor:
        ids, labels = (torch.from_numpy(x.astype(np.int64)) for x in sample[:2])
        hidden = model.hidden_states(ids, torch.arange(len(ids)), Segments.of([len(ids)], ids.device))
        losses = F.cross_entropy(model.logits(hidden[:-1]), labels[1:], ignore_index=IGNORE, reduction="none")
        return (losses if sample.weights is None else losses * torch.from_numpy(sample.weights[1:])).sum()

    def evaluate() -> tuple[float, int]:
        with torch.no_grad():
            first = [sample for micro in steps[0] for sample in micro]
            return sum(float(loss_sum(s)) for s in first), sum(int((s.labels[1:] != IGNORE).sum()) for s in first)

    result = Result([], [], [evaluate()], {})
    for micros in steps:
        samples = [sample for micro in micros for sample in micro]
        tokens = sum(int((s.labels[1:] != IGNORE).sum()) for s in samples)
        total = 0.0
        for sample in samples:
            loss = loss_sum(sample)
            (loss / tokens).backward()
            total += float(loss.detach())
        result.losses.append(total / tokens)
        result.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    result.evaluations.append(evaluate())
    result.params = {name: p.detach().double().numpy() for name, p in named.items()}
    return result


def by_engine(
    rank: int,
    folder: Path,
    dtype: torch.dtype,
    steps: Sequence[Sequence[Batch]],
    evaluate: bool = True,
    clip: float = CLIP,
    tamper: Callable[[Engine], None] = lambda engine: None,
    **options,
) -> Result:
    """What a run does, on a rank; the result is the same on each."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = make_engine(folder, dtype, mesh, **options)
    tamper(engine)
    optimizer = Optimizer(engine.shards, OPTIMIZER)
    mine = [step[mesh.dp_rank :: mesh.dp_size] for step in steps]
    result = Result([], [], [engine.evaluate(mine[0])] if evaluate else [], {})
    for batches in mine:
        report = train_step(
            engine, optimizer, batches, lr=LR, clip_grad=clip, loss_scale=LossScale.for_dtype("bfloat16")
        )
        result.losses.append(report.loss)
        result.norms.append(report.grad_norm)
        if evaluate:
            engine.evaluate(mine[0])  # in between, it must change nothing
    if evaluate:
        result.evaluations.append(engine.evaluate(mine[0]))
    result.params = {name: values.double().numpy() for name, values in engine.shards.full().items()}
    mesh_module.stop()
    return result


def on_ranks(num_ranks: int, *args, **options) -> Result:
    """The result of rank 0, after a check that every rank has the same."""
    results = run_ranks(lambda rank: by_engine(rank, *args, **options), num_ranks)
    for other in results[1:]:
        compare(other, results[0], 1e-15)
    return results[0]


MODELS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
SAMPLES = samples_of_steps()
BATCHES = [[as_batch(micro) for micro in step] for step in SAMPLES]


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{'tied' if m[1] else 'untied'}")
def folder(request, tmp_path_factory):
    family, tied = request.param
    return make_tiny_model(tmp_path_factory.mktemp("model"), family=family, tied=tied, **SMALL)


@pytest.fixture(scope="module")
def expected(folder):
    return by_hand(folder, torch.float64, SAMPLES)


def test_the_comparison_has_something_to_compare(folder, expected):
    """Every tensor moves by far more than the tolerances, and the clip is at work."""
    cfg = read_config(folder)
    before = {name: p.detach().double().numpy() for name, p in load(folder).named_parameters()}
    assert min(np.abs(value - before[name]).max() for name, value in expected.params.items()) > 1e-3
    assert min(expected.norms) > CLIP and cfg.vocab_size % 2 == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_float64_exactly(folder, expected, num_ranks):
    compare(on_ranks(num_ranks, folder, torch.float64, BATCHES), expected, 1e-10)


def test_float32(folder):
    compare(on_ranks(3, folder, torch.float32, BATCHES), by_hand(folder, torch.float32, SAMPLES), 1e-5)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, **SMALL)


@pytest.fixture(scope="module")
def one_expected(one_folder):
    return by_hand(one_folder, torch.float64, SAMPLES)


def test_evaluation_leaves_no_trace(one_folder):
    with_it, without = (on_ranks(2, one_folder, torch.float32, BATCHES, evaluate=e) for e in (True, False))
    without.evaluations = with_it.evaluations
    compare(with_it, without, 1e-15)


class Exchanges(TorchDispatchMode):
    """Counts the reductions and the gatherings between ranks."""

    def __enter__(self):
        self.counts = {"reduce_scatter": 0, "allgather": 0}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in self.counts:
            self.counts[name] += str(func).startswith("c10d") and name in str(func)
        return func(*args, **(kwargs or {}))


def _talk(rank, folder):
    """Collectives of a step of 6 micro-batches, of an evaluation of as many; and evaluations around a change of the weights."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    engine, mine = make_engine(folder, torch.float64, mesh), BATCHES[0][mesh.dp_rank :: mesh.dp_size]
    with Exchanges() as training:
        engine.forward_backward(mine, num_tokens=1)
    engine.shards.drop_grads()
    with Exchanges() as evaluation:
        before = engine.evaluate(mine)
    sharded = all(isinstance(parameter, DTensor) for parameter in engine.chunks[0].parameters())
    with torch.no_grad():
        for shard in engine.shards:
            shard.master.mul_(0.5)
    after = engine.evaluate(mine)
    mesh_module.stop()
    counts = [tuple(mode.counts.values()) for mode in (training, evaluation)]
    return counts, sharded, before, after


def test_one_exchange_a_step_and_no_stale_weights(one_folder):
    """ZeRO-1: each of the 2 layers and the rest is gathered and reduced once, however many micro-batches there are."""
    alone = make_engine(one_folder, torch.float64)
    values = [alone.evaluate(BATCHES[0])]
    with torch.no_grad():
        for shard in alone.shards:
            shard.master.mul_(0.5)
    values.append(alone.evaluate(BATCHES[0]))
    assert values[0][0] != pytest.approx(values[1][0], rel=0.01)
    for counts, sharded, before, after in run_ranks(_talk, 2, one_folder):
        assert counts == [(3, 3), (0, 3)] and sharded
        assert [before, after] == [pytest.approx(v, rel=1e-12) for v in values]


@pytest.mark.parametrize("options", [{"chunked_cross_entropy": True}, {"attention_backend": "unfused"}], ids=str)
def test_kernels_under_data_parallelism(one_folder, one_expected, options):
    compare(on_ranks(2, one_folder, torch.float64, BATCHES, **options), one_expected, 1e-10)


def averaged(engine: Engine) -> None:
    for module in wrapped(engine.chunks[0]):
        module.set_gradient_divide_factor(float(engine.mesh.dp_size))


def one_layer_averaged(engine: Engine) -> None:
    next(iter(engine.chunks[0].decoder.layers.values())).set_gradient_divide_factor(float(engine.mesh.dp_size))


def divided_by_local_tokens(engine: Engine) -> None:
    right = engine.forward_backward

    def wrong(batches, *, num_tokens, **options):
        return right(batches, num_tokens=max(sum(b.num_trained for b in batches), 1), **options)

    engine.forward_backward = wrong


def last_micro_batch_only(engine: Engine) -> None:
    """As if accumulation lost all but the last micro-batch's gradients."""
    right = engine.forward_backward

    def wrong(batches, **options):
        right(batches, **options)
        engine.shards.drop_grads()
        return right(batches[-1:], **options)

    engine.forward_backward = wrong


@pytest.mark.parametrize("fault", [averaged, one_layer_averaged, divided_by_local_tokens, last_micro_batch_only])
def test_a_planted_fault_is_found(one_folder, one_expected, fault):
    found, _ = run_ranks(lambda rank: by_engine(rank, one_folder, torch.float64, BATCHES, tamper=fault), 2)
    with pytest.raises(AssertionError, match=r"^(losses|norms) differ"):
        compare(found, one_expected, 1e-4)


@pytest.mark.parametrize("shift", [-1, 1])
def test_wrongly_shifted_labels_are_found(one_folder, one_expected, shift):
    shifted = [[batch._replace(labels=np.roll(batch.labels, shift)) for batch in step] for step in BATCHES]
    found = by_engine(0, one_folder, torch.float64, shifted)
    with pytest.raises(AssertionError, match="losses differ"):
        compare(found, one_expected, 1e-4)


def test_against_transformers_and_torch(folder):
    """An independent implementation, three steps in float32, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    found = on_ranks(2, folder, torch.float32, BATCHES, evaluate=False)
    for step, micros in enumerate(SAMPLES):
        losses = []
        for ids, labels in (tuple(torch.from_numpy(x.astype(np.int64)) for x in s[:2]) for m in micros for s in m):
            losses.append(F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="none"))
        losses = torch.cat(losses)
        loss = losses.sum() / (losses != 0).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert found.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert found.norms[step] == pytest.approx(float(norm), rel=1e-5)
    cfg = read_config(folder)
    mine = under_hugging_face_names({name: torch.from_numpy(value) for name, value in found.params.items()}, cfg)
    assert mine.keys() == named.keys()
    for name, parameter in named.items():
        assert (mine[name] - parameter.detach()).abs().max() < 1e-5, name


def test_bfloat16_is_bit_exact_without_the_clip(one_folder):
    """With one micro-batch on each of two ranks, both ways add the same two bfloat16 gradients in float32."""
    batches = [[as_batch(micro) for micro in step] for step in samples_of_steps(2)]
    found, expected = (on_ranks(n, one_folder, torch.bfloat16, batches, clip=0.0) for n in (2, 1))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    compare(found, expected, 1e-6)
    for name, value in expected.params.items():
        assert np.array_equal(found.params[name], value), name


def test_bfloat16_with_accumulation_and_clip(one_folder):
    """Sums in another order, and a clip coefficient of another last bit: the first step tightly, later ones loosely."""
    found, expected = (on_ranks(n, one_folder, torch.bfloat16, BATCHES, evaluate=False) for n in (3, 1))
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=1e-5)
    compare(found, expected, 0.01)
