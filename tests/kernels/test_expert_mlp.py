"""Experts as one function against the same written as separate ones, and against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.kernels import expert_mlp as module
from megatron_swift.kernels.grouped_linear import grouped_linear, looped_linear
from megatron_swift.kernels.layers import swiglu
from megatron_swift.kernels.permute import permute, sort_choices

E, H, INNER = 5, 16, 24


def draw(tokens: int, topk: int, *, drop: float, dtype: torch.dtype):
    """(x, first, second, probs) and (experts, kept or None)."""
    rng = torch.Generator().manual_seed(tokens + topk)
    shapes = (tokens, H), (E, 2 * INNER, H), (E, H, INNER)
    tensors = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    probs = torch.rand(tokens, topk, generator=rng)
    experts = torch.rand(tokens, E, generator=rng).argsort(-1)[:, :topk]
    kept = torch.rand(tokens, topk, generator=rng) >= drop if drop else None
    return [*tensors, probs], (experts, kept)


def separate(x, first, second, probs, choice, product):
    sent = permute(x, choice[0], num_experts=E, kept=choice[1])
    return sent.combine(product(swiglu(product(sent.x, first, sent.counts)), second, sent.counts), probs)


def together(x, first, second, probs, choice):
    order = sort_choices(choice[0], num_experts=E, kept=choice[1])
    return module.expert_mlp(x, first, second, probs, order)


def results(function, tensors, *more):
    """The output and the gradients of all tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, *more)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "topk", "drop"), [(13, 2, 0.0), (13, E, 0.0), (13, 3, 0.4), (13, 1, 1.0), (0, 2, 0)]
)
def test_as_the_separate_functions(tokens, topk, drop, dtype, tolerance):
    """The very output of grouped products; gradients as near to float64 as theirs."""
    tensors, choice = draw(tokens, topk, drop=drop, dtype=dtype)
    mine = results(together, tensors, choice)
    assert torch.equal(mine[0], results(separate, tensors, choice, grouped_linear)[0])
    exact = results(separate, [t.double() for t in tensors], choice, looped_linear)
    for found, wanted, like in zip(mine, exact, [tensors[0], *tensors], strict=True):
        assert found.dtype == like.dtype and found.shape == like.shape
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_the_weighted_product_backwards():
    """The formulas in float64, against autograd."""
    rng = torch.Generator().manual_seed(0)
    gate_up, weight = (torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in ((7, 10), (7,)))
    grad = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    expected = swiglu(gate_up) * weight[:, None]
    wanted = torch.autograd.grad(expected, (gate_up, weight), grad)
    d_gate_up, product, d_weight = module.plain_weighted_swiglu_backward(gate_up.detach(), grad, weight.detach())
    for found, right in ((d_gate_up, wanted[0]), (product, expected.detach()), (d_weight, wanted[1])):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_what_is_kept():
    """Of everything that is k times the tokens only the pair gate and up outlives the forward pass."""
    tensors, choice = draw(13, 4, drop=0.0, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        together(*(t.requires_grad_() for t in tensors), choice)
    assert [tuple(t.shape) for t in kept if t.is_floating_point() and len(t) == 4 * 13] == [(4 * 13, 2 * INNER)]
