"""AdamW and SGD against their formulas, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.parallel.shards import Shards
from megatron_swift.testing import make_tiny_model
from megatron_swift.train.optim import Optimizer, OptimizerOptions, is_decayed
from tiny_models import SMALL, make_engine

RATES = (0.0, 1e-2, 3e-3, 1e-3)
DECAY = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=False, layers=1, **SMALL)


def gradients(shards: Shards, step: int) -> dict[str, torch.Tensor]:
    """Of sizes from 1e-10 to 1, so that eps matters; some exactly 0."""
    generator = torch.Generator().manual_seed(step)
    made = {}
    for shard in shards:
        size = 10 ** -torch.randint(0, 11, shard.shape, generator=generator).double()
        made[shard.name] = torch.randn(shard.shape, dtype=torch.float64, generator=generator) * size
        made[shard.name].view(-1)[::5] = 0
    return made


def run(folder, dtype, options):
    engine = make_engine(folder, dtype)
    optimizer = Optimizer(engine.shards, options)
    start = {s.name: s.master.detach().double().clone() for s in engine.shards}
    for step, lr in enumerate(RATES):
        for shard in engine.shards:
            shard.master.grad = gradients(engine.shards, step)[shard.name].to(shard.master.dtype)
        optimizer.step(lr)
    return engine.shards, optimizer, start


def decay_of(name: str) -> float:
    return 0.0 if "norm" in name or name.endswith(".bias") else DECAY


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_adamw(folder, dtype, tolerance):
    """Decoupled decay, bias correction, eps added outside the root; 16-bit models step a float32 master."""
    beta1, beta2, eps = 0.8, 0.95, 1e-5
    options = OptimizerOptions(kind="adam", weight_decay=DECAY, beta1=beta1, beta2=beta2, eps=eps)
    shards, optimizer, start = run(folder, dtype, options)
    for shard in shards:
        x, m, v = start[shard.name], 0.0, 0.0
        for step, lr in enumerate(RATES, 1):
            grad = gradients(shards, step - 1)[shard.name].to(shard.master.dtype).double()
            m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad.square()
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
            x = x - lr * (update + decay_of(shard.name) * x)
        torch.testing.assert_close(shard.master.detach().double(), x, rtol=tolerance, atol=tolerance)
        for name, right in (("exp_avg", m), ("exp_avg_sq", v)):
            torch.testing.assert_close(optimizer.state(shard, name).double(), right, rtol=1e-4, atol=1e-9)
    assert optimizer.num_steps == len(RATES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_sgd(folder, dtype, tolerance):
    """Momentum without dampening; the decay is part of the gradient, as in Megatron."""
    shards, optimizer, start = run(folder, dtype, OptimizerOptions(kind="sgd", weight_decay=DECAY, momentum=0.7))
    for shard in shards:
        x, buffer = start[shard.name], 0.0
        for step, lr in enumerate(RATES):
            buffer = 0.7 * buffer + gradients(shards, step)[shard.name].to(dtype).double() + decay_of(shard.name) * x
            x = x - lr * buffer
        torch.testing.assert_close(shard.master.detach().double(), x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(optimizer.state(shard, "momentum_buffer").double(), buffer, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_decays(tmp_path, family):
    shards = make_engine(make_tiny_model(tmp_path, family=family, tied=False, layers=1, **SMALL), torch.float32).shards
    decayed = {s.name.removeprefix("decoder.layers.0.") for s in shards if is_decayed(s)}
    assert decayed == {
        "embedding.word_embeddings.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "output_layer.weight",
    }


def test_the_number_of_steps_sets_the_bias_correction(folder):
    shards, optimizer, _ = run(folder, torch.float64, OptimizerOptions(kind="adam", weight_decay=0.0))
    optimizer.set_num_steps(10**9)  # no correction left
    shard = next(iter(shards))
    before, m, v = shard.master.detach().clone(), *(optimizer.state(shard, n).clone() for n in optimizer.names)
    for each in shards:
        each.master.grad = torch.zeros_like(each.master)
    optimizer.step(1e-2)
    expected = before - 1e-2 * (0.9 * m) / ((0.95 * v).sqrt() + 1e-8)
    torch.testing.assert_close(shard.master.detach(), expected, rtol=1e-6, atol=0)
