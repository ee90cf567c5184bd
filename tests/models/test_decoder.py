"""The decoder's loss, its chunks for pipeline stages, and rows in which nothing is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_swift.data.types import IGNORE
from megatron_swift.kernels.cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy
from megatron_swift.kernels.fp8 import Fp8Linears, Fp8Options
from megatron_swift.models.decoder import build_decoder
from megatron_swift.testing import make_tiny_model
from shapes import shape
from tiny_models import CPU, as_batch, as_row, load, random_samples


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), family="qwen3", tied=request.param, layers=3)


@pytest.mark.parametrize("loss_function", [linear_cross_entropy, chunked_linear_cross_entropy])
def test_forward_is_the_scaled_sum_of_token_losses(folder, loss_function):
    model = load(folder, torch.float64)
    model.loss_function = loss_function
    batch = as_batch(random_samples(np.random.default_rng(0), (9, 1, 30), trained=0.4, vocab_size=451))
    row = as_row(batch)
    loss = model(row, torch.tensor(0.25, dtype=torch.float64))
    logits = model.logits(model.hidden_states(row.tokens, row.positions, row.segments))
    every = F.cross_entropy(logits, torch.from_numpy(batch.labels), reduction="none", ignore_index=IGNORE)
    assert 0 < len(row.index) < 20
    torch.testing.assert_close(loss, every.sum() / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss_function", [linear_cross_entropy, chunked_linear_cross_entropy])
def test_a_row_without_trained_tokens_gives_zeros(folder, loss_function, dtype):
    """An exact zero and a zero gradient of every parameter, even where the sum of the row overflows fp16."""
    model = load(folder, dtype)
    model.loss_function = loss_function
    with torch.no_grad():
        model.decoder.final_layernorm.weight.fill_(60.0)
        model.decoder.layers["2"].mlp.linear_fc2.weight.fill_(1.0)
    row = as_row(as_batch(random_samples(np.random.default_rng(0), (400,), trained=0.0, vocab_size=451)))
    loss = model(row, torch.tensor(2.0**32, dtype=torch.promote_types(dtype, torch.float32)))
    loss.backward()
    assert float(loss.detach()) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_chunks_in_turn_are_the_whole(folder):
    whole = load(folder)
    positions = torch.arange(7)
    row = as_row(
        as_batch(random_samples(np.random.default_rng(0), (7,), trained=1.0, vocab_size=451), pad_to_multiple=1)
    )
    x, names = row.tokens, set()
    for layers, first, last in ((range(0, 1), True, False), (range(1, 3), False, True)):
        part = build_decoder(whole.cfg, dtype=torch.float32, device=CPU, layers=layers, first=first, last=last)
        part.load_state_dict(whole.state_dict(), strict=False)
        names |= {name for name, _ in part.named_parameters()}
        x = part.hidden_states(x, positions, row.segments)
    assert names == {name for name, _ in whole.named_parameters()}
    assert torch.equal(x, whole.hidden_states(row.tokens, positions, row.segments))
    assert torch.equal(part.logits(x), whole.logits(x))


def test_build_leaves_the_default_dtype_alone(folder):
    model = build_decoder(load(folder).cfg, dtype=torch.bfloat16, device=torch.device("meta"))
    assert torch.get_default_dtype() == torch.float32
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    assert model.rotary.inverse.dtype == torch.float32 and model.rotary.inverse.device == CPU


def test_which_linears_are_in_8_bits(tmp_path):
    """Attention, dense MLP and shared expert; the rest of a mixture of experts and the output layer are not, nor do they lose their kernels."""
    sizes = {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}
    model = load(make_tiny_model(tmp_path / "m", family="qwen2_moe", tied=False, **sizes), torch.bfloat16)
    linears = Fp8Linears(Fp8Options(format="hybrid"))
    model.change_linears(linears.kernels)
    changed = {
        name
        for name, module in model.named_modules()
        if hasattr(module, "kernels") and module.kernels.linear == linears.linear
    }
    attention = {f"decoder.layers.{i}.self_attention.linear_{part}" for i in (0, 1) for part in ("qkv", "proj")}
    dense = {f"decoder.layers.0.mlp.linear_{part}" for part in ("fc1", "fc2")}
    shared = {f"decoder.layers.1.mlp.shared_experts.linear_{part}" for part in ("fc1", "fc2")}
    assert changed == attention | dense | shared
    batch = as_batch(random_samples(np.random.default_rng(0), (9, 30), trained=1.0, vocab_size=451))
    model(as_row(batch), torch.tensor(0.25)).backward()
    cast = {id(held.weight) for held in linears._weights.values()}
    assert cast == {id(model.get_submodule(name).weight) for name in changed}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"norm", "rope", "swiglu"}),
        ({"qk_layernorm": True}, {"norm", "rope", "swiglu"}),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, {"swiglu"}),
        ({"normalization": "LayerNorm"}, {"rope", "swiglu"}),
        ({"qk_layernorm": True, "rotary_percent": 0.5}, {"norm", "swiglu"}),
        ({"swiglu": False}, {"norm", "rope"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)),  # sets have no order
)
def test_what_there_are_kernels_for(changes, expected):
    assert build_decoder(shape(**changes), dtype=torch.float32, device=torch.device("meta")).fusible == expected
