"""The local shards: masters of 16-bit models, the gradient's norm, the loss scale, and where each rank's rows lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from tiny_models import SMALL, as_batch, as_row, load, make_engine, random_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A q/k norm of 6 values: over 4 ranks the last one has none of them."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), family="qwen3", **SMALL)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(5)
    return [as_batch(random_samples(rng, (20, 9), trained=t)) for t in (0.9, 0.1, 0.0, 1.0, 0.5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_added_in_float32(folder, batches, dtype):
    """Bit for bit what a loop over the micro-batches gives that adds each one's 16-bit gradient to a float32 sum."""
    engine, model = make_engine(folder, dtype), load(folder, dtype)
    total = sum(b.num_trained for b in batches)
    engine.forward_backward(batches, num_tokens=total)
    exact = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    coarse = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model(as_row(batch), torch.tensor(1.0 / total)).backward()
        for name, parameter in model.named_parameters():
            exact[name] += parameter.grad
            coarse[name] += parameter.grad
            parameter.grad = None
    for shard in engine.shards:
        assert shard.master.grad.dtype == torch.float32 and shard.param.grad is None
        assert torch.equal(shard.master.grad, exact[shard.name]), shard.name
    name = "embedding.word_embeddings.weight"
    assert not torch.equal(exact[name], coarse[name].float())  # adding in 16 bits would have shown


def test_a_single_micro_batch_is_not_widened(folder, batches):
    """The bfloat16 gradient itself is what the norm and the optimizer read; after a second one its float32 sum."""
    engine, model, total = make_engine(folder, torch.bfloat16), load(folder, torch.bfloat16), batches[0].num_trained
    engine.forward_backward(batches[:1], num_tokens=total)
    model(as_row(batches[0]), torch.tensor(1.0 / total)).backward()
    parameters = dict(model.named_parameters())
    for shard in engine.shards:
        assert shard.master.grad is None and shard.grad is shard.narrow
        assert torch.equal(shard.grad, parameters[shard.name].grad), shard.name
    squares = sum(float(p.grad.double().square().sum()) for p in parameters.values())
    assert float(engine.shards.grad_norm()) == pytest.approx(squares**0.5, rel=1e-6)
    engine.shards.drop_grads()
    assert all(shard.grad is None for shard in engine.shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_scale_is_divided_out(folder, batches, dtype):
    engine, total = make_engine(folder, dtype), sum(b.num_trained for b in batches)
    results = []
    for scale in (1.0, 2.0**10):
        loss = engine.forward_backward(batches, num_tokens=total, loss_scale=scale)
        results.append([loss.to(dtype), *(s.master.grad.clone() for s in engine.shards)])
        engine.shards.drop_grads()
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_updates_add_up_in_the_master(folder, batches, dtype):
    """Steps far below a bfloat16 unit move the weights all the same, and the module sees what the master holds."""
    engine = make_engine(folder, dtype)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.0))
    before = {s.name: s.master.detach().clone() for s in engine.shards}
    for _ in range(100):
        engine.forward_backward(batches[:1], num_tokens=batches[0].num_trained)
        optimizer.step(1e-5)
    for shard in engine.shards:
        assert shard.master.dtype == torch.float32 and shard.param.dtype == dtype
        assert (shard.master - before[shard.name]).abs().max() > 5e-4
        assert torch.equal(shard.param, shard.master.to(dtype)) and shard.master.grad is None


def _spread(rank, folder, batches):
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = make_engine(folder, torch.float64, mesh)
    counts = engine.count(batches[mesh.dp_rank :: mesh.dp_size])
    engine.forward_backward(batches[:1], num_tokens=1)
    found = (float(engine.shards.grad_norm()), engine.shards.params_norm())
    for shard in engine.shards:
        if shard.master.grad is not None:
            shard.master.grad *= 0.5
    halved = float(engine.shards.grad_norm())
    rows = {s.name: (0, 0, s.shape) for s in engine.shards}
    rows |= {s.name: (b.start, b.start + b.rows, s.shape) for s in engine.shards for b in s.boxes if b.owned}
    full = {name: values.numpy() for name, values in engine.shards.full().items()}
    mesh_module.stop()
    return found, halved, tuple(counts), rows, full, engine.kernels["data parallel"]


def test_shards_cover_every_row_once_and_norms_count_each_value_once(folder, batches):
    results = run_ranks(_spread, 4, folder, batches)
    model = load(folder, torch.float64)
    model(as_row(batches[0]), torch.tensor(4.0, dtype=torch.float64)).backward()  # 4 ranks, each with this batch
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = (float(grads.norm()), float(values.norm()))
    sizes = [len(b.tokens) - b.padding for b in batches], [n * n for b in batches for n in b.lengths]
    for found, halved, counts, rows, full, text in results:
        assert found == pytest.approx(expected, rel=1e-12) and halved == pytest.approx(expected[0] / 2, rel=1e-12)
        assert counts == (sum(b.num_trained for b in batches), sum(sizes[0]), sum(sizes[1]), len(batches))
        assert "4 ranks" in text and rows.keys() == full.keys()
        for name, parameter in model.named_parameters():
            assert np.array_equal(full[name], parameter.detach().numpy()), name
    for name, (*_, shape) in results[0][3].items():
        spans = sorted((rows[name][0], rows[name][1]) for _, _, _, rows, *_ in results if rows[name][0] < rows[name][1])
        ends = [0, *(stop for _, stop in spans)]
        assert [start for start, _ in spans] == ends[:-1] and ends[-1] == shape[0], name
    empty = [rows["decoder.layers.0.self_attention.q_layernorm.weight"] for _, _, _, rows, *_ in results][-1]
    assert empty[0] == empty[1]  # the case of a rank without a row was there


def test_the_norm_of_a_large_parameter_is_exact(tmp_path):
    """float32 added up over twelve million values in one go would be off by half a thousandth."""
    sizes = {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 32}
    engine = make_engine(make_tiny_model(tmp_path, family="llama", layers=1, **sizes), torch.float32)
    generator, squares = torch.Generator().manual_seed(0), 0.0
    for shard in engine.shards:
        shard.master.grad = torch.randn(shard.master.shape, generator=generator)
        squares += float(shard.master.grad.double().square().sum())
    assert float(engine.shards.grad_norm()) == pytest.approx(np.sqrt(squares), rel=1e-6)


def _talk(rank):
    mesh = mesh_module.start(backend="nccl", timeout_minutes=1)  # without a GPU: gloo
    total, objects = mesh.sum([rank, 0.5, 2**40 + rank]), mesh.gather_objects({"rank": rank})
    place = (mesh.rank, mesh.world_size, mesh.dp_rank, mesh.dp_size, mesh.backend)
    mesh_module.stop()
    return total, objects, place


def test_mesh():
    for rank, (total, objects, place) in enumerate(run_ranks(_talk, 3)):
        assert total == [3, 1.5, 3 * 2**40 + 3]
        assert objects == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert place == (rank, 3, rank, 3, "gloo")


def test_mesh_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    assert (mesh.world_size, mesh.rank, mesh.dp_size, mesh.dp_rank) == (1, 0, 1, 0)
    assert not torch.distributed.is_initialized()
    assert mesh.sum([1, 2.5]) == [1, 2.5] and mesh.gather_objects("x") == ["x"]
