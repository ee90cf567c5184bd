"""One training step: the clip, the report, steps that are left out on every rank alike, and fp16."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_swift.data.types import IGNORE
from megatron_swift.kernels.adamw import plain_adamw
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import clip_on_device, train_step
from tiny_models import SMALL, as_batch, as_row, load, make_engine, random_samples

SGD = OptimizerOptions(kind="sgd", weight_decay=0.0, momentum=0.0)
ADAM = OptimizerOptions(kind="adam", weight_decay=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), **SMALL)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(2)
    return [as_batch(random_samples(rng, (11, 20), trained=t)) for t in (0.2, 0.0, 1.0, 0.6)]


def masters(engine) -> dict[str, torch.Tensor]:
    return {shard.name: shard.master.detach().clone() for shard in engine.shards}


def unscaled() -> LossScale:
    return LossScale.for_dtype("bfloat16")


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0, -1.0])
def test_report_and_clip(folder, batches, clip):
    """Plain SGD at rate 1 shows the gradient that was applied: clipped only where the coefficient is below 1."""
    engine = make_engine(folder, torch.float64)
    before = masters(engine)
    report = train_step(engine, Optimizer(engine.shards, SGD), batches, lr=1.0, clip_grad=clip, loss_scale=unscaled())
    model, losses = load(folder, torch.float64), []
    for batch in batches:
        row = as_row(batch)
        logits = model.logits(model.hidden_states(row.tokens, row.positions, row.segments))
        labels = torch.from_numpy(batch.labels)
        losses.append(F.cross_entropy(logits, labels, reduction="none")[labels != IGNORE])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert report.grad_norm == pytest.approx(norm, rel=1e-12) and norm > 0.6  # before clipping
    assert (report.loss_scale, report.skipped) == (1.0, False)
    assert report.counts.trained == len(torch.cat(losses)) and report.counts.tokens == sum(
        len(b.tokens) - b.padding for b in batches
    )
    coefficient = 0.5 / (norm + 1e-6) if clip == 0.5 else 1.0
    for name, parameter in model.named_parameters():
        applied = before[name] - engine.shards.by_name[name].master.detach()
        torch.testing.assert_close(applied, parameter.grad * coefficient, rtol=1e-9, atol=1e-14)
        assert engine.shards.by_name[name].master.grad is None


def test_a_global_batch_without_trained_tokens(folder, batches):
    """Nothing is divided by zero: the loss is 0, and only the decay moves the weights."""
    engine = make_engine(folder, torch.float64)
    optimizer, before = Optimizer(engine.shards, ADAM), masters(engine)
    report = train_step(engine, optimizer, batches[1:2], lr=0.5, clip_grad=1.0, loss_scale=unscaled())
    assert (report.loss, report.grad_norm, report.counts.trained, report.skipped) == (0, 0, 0, False)
    for name, value in masters(engine).items():
        decay = 0.05 if before[name].ndim > 1 else 0.0
        torch.testing.assert_close(value, before[name] * (1 - decay), rtol=1e-12, atol=0)


def takes_a_tensor(tensors, scalars) -> None:
    """What the fused AdamW does with a scale that is still on the device, by the plain one."""
    assert isinstance(scalars.scale, torch.Tensor) and scalars.scale.dtype is torch.float32
    if not scalars.scale.isnan():
        plain_adamw(tensors, dataclasses.replace(scalars, scale=float(scalars.scale)))


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0])
def test_a_clip_that_the_host_does_not_see(folder, batches, clip):
    """The update comes before anything is read, with the same numbers."""
    found = []
    for update in (plain_adamw, takes_a_tensor):
        engine = make_engine(folder, torch.float32)
        optimizer = Optimizer(engine.shards, ADAM)
        optimizer.adamw = update
        steps = [
            train_step(engine, optimizer, batches, lr=1e-3, clip_grad=clip, loss_scale=unscaled()) for _ in range(3)
        ]
        found.append(([(r.loss, r.grad_norm) for r in steps], masters(engine), optimizer.num_steps))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2] == 3
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, math.nan), (math.inf, 1.0), (math.nan, 0.5), (2.0, math.inf)])
def test_a_step_to_leave_out_has_no_clip(loss, norm):
    assert clip_on_device(torch.tensor([loss, norm], dtype=torch.float64), 1.0).isnan()


def _one_bad_rank(rank, folder, batches, bad_value, dtype, precision, on_device):
    """Two clean steps, one whose gradient is spoilt on rank 1 only, one more clean step."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = make_engine(folder, dtype, mesh)
    optimizer, scale = Optimizer(engine.shards, ADAM), LossScale.for_dtype(precision)
    if on_device:
        optimizer.adamw = takes_a_tensor
    scale.scale = min(scale.scale, 1024.0)
    mine, found = batches[mesh.dp_rank :: mesh.dp_size], []
    right = engine.shards.pull

    def spoilt(factor):
        right(factor)
        if rank == 1:
            next(iter(engine.shards)).master.grad.view(-1)[3] = bad_value

    for step in range(4):
        engine.shards.pull = spoilt if step == 2 else right
        before = masters(engine)
        moments = [optimizer.state(s, "exp_avg").clone() for s in engine.shards]
        report = train_step(engine, optimizer, mine, lr=1e-3, clip_grad=1.0, loss_scale=scale)
        same = all(torch.equal(value, before[name]) for name, value in masters(engine).items())
        same &= all(torch.equal(optimizer.state(s, "exp_avg"), m) for s, m in zip(engine.shards, moments, strict=True))
        freed = all(shard.master.grad is None for shard in engine.shards)
        found.append((report.skipped, same, freed, optimizer.num_steps, math.isfinite(report.grad_norm)))
    mesh_module.stop()
    return found, scale.overflows_left


@pytest.mark.parametrize("on_device", [False, True], ids=["read", "on-device"])
@pytest.mark.parametrize("bad_value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")]
)
def test_a_non_finite_gradient_on_one_rank_is_left_out_on_all(folder, batches, bad_value, dtype, precision, on_device):
    good, bad = (False, False, True), (True, True, True)
    expected = [(*good, 1, True), (*good, 2, True), (*bad, 2, False), (*good, 3, True)]
    for found, overflows_left in run_ranks(_one_bad_rank, 2, folder, batches, bad_value, dtype, precision, on_device):
        assert found == expected
        assert overflows_left == (1 if precision == "float16" else 2)


def test_a_bad_step_of_one_process_leaves_the_16_bit_weights_too(folder, batches):
    engine = make_engine(folder, torch.bfloat16)
    optimizer, before = Optimizer(engine.shards, ADAM), [s.param.detach().clone() for s in engine.shards]
    right = engine.forward_backward
    engine.forward_backward = lambda *args, **options: right(*args, **options) * math.nan  # the loss alone
    report = train_step(engine, optimizer, batches, lr=1e-3, clip_grad=1.0, loss_scale=unscaled())
    assert report.skipped and math.isfinite(report.grad_norm) and optimizer.num_steps == 0
    assert all(torch.equal(s.param, b) for s, b in zip(engine.shards, before, strict=True))


@pytest.mark.parametrize("chunked", [False, True])
def test_fp16_finds_its_scale_and_learns(folder, batches, chunked):
    """From 2^32 the scale halves with every overflow but the first; afterwards training goes as in float32."""
    losses = {}
    for dtype, precision in ((torch.float16, "float16"), (torch.float32, "float32")):
        engine = make_engine(folder, dtype, chunked_cross_entropy=chunked)
        optimizer, scale = Optimizer(engine.shards, ADAM), LossScale.for_dtype(precision)
        reports = []
        while optimizer.num_steps < 25:
            reports.append(train_step(engine, optimizer, batches, lr=3e-3, clip_grad=1.0, loss_scale=scale))
            assert len(reports) < 60, "the scale does not settle"
        losses[precision] = [r.loss for r in reports if not r.skipped]
        if precision == "float16":
            skipped = [r.skipped for r in reports]
            count = skipped.index(False)
            assert count > 5 and not any(skipped[count:]) and all(math.isfinite(r.loss) for r in reports)
            assert [r.loss_scale for r in reports[:count]] == [2.0**32, *(2.0 ** (32 - i) for i in range(count - 1))]
            assert scale.scale == 2.0 ** (33 - count) == reports[-1].loss_scale
    assert losses["float16"][-1] < losses["float16"][0] / 2
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.01)
