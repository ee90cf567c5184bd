"""Weights' gradients formed on a second stream of a GPU: bit for bit those of one stream. `CUDA_VISIBLE_DEVICES=0`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.kernels.later import AT_ONCE, SecondStream
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step
from shapes import VOCAB, random_engine, shape
from tiny_models import as_batch, random_samples

MODEL = shape(
    hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, kv_channels=64, qkv_bias=True, tied_embeddings=True
)
# Written out, attention adds up in the same order each time.
OPTIONS = dict(attention_backend="unfused", dtype=torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_one_stream_on_a_cpu():
    engine = random_engine(shape(), dtype=torch.bfloat16)
    assert engine.shards.later is AT_ONCE and "second stream" not in str(engine.kernels)


def trained(micro_batches: int, **options) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The masters after four steps, and the gradient norms."""
    rng = np.random.default_rng(0)
    engine = random_engine(MODEL, **OPTIONS, **options)
    assert ("second stream" in engine.kernels["layers"]) == options.get("second_stream", True)
    optimizer, norms = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1)), []
    scale = LossScale.for_dtype("bfloat16")
    for _ in range(4):
        lengths = rng.integers(20, 400, (micro_batches, 5))
        batches = [as_batch(random_samples(rng, row, trained=0.7, vocab_size=VOCAB)) for row in lengths]
        report = train_step(engine, optimizer, batches, lr=1e-3, clip_grad=1.0, loss_scale=scale)
        norms.append(report.grad_norm)
    return {s.name: s.master.detach().cpu() for s in engine.shards}, norms


@pytest.fixture
def late(monkeypatch) -> None:
    """All work on the second stream begins a millisecond late: what does not wait for it is found out."""
    follow = SecondStream.follow

    def later(self, work, *reads):
        def slowly():
            torch.cuda._sleep(1_500_000)
            return work()

        return follow(self, slowly, *reads)

    monkeypatch.setattr(SecondStream, "follow", later)


@pytest.mark.usefixtures("late")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need CUDA")
@pytest.mark.parametrize("recompute", [Recompute(), Recompute("full", "uniform", 1)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("fp8", [None, Fp8Options(format="hybrid", recipe="rowwise")], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_same_values_on_two_streams(micro_batches, fp8, recompute):
    options = dict(recompute=recompute, fp8=fp8)
    one, two = (trained(micro_batches, **options, second_stream=on) for on in (False, True))
    assert one[1] == two[1]
    for name, values in one[0].items():
        assert torch.equal(two[0][name], values), name
