from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_swift.kernels.again import through
from megatron_swift.kernels.layers import rms_norm, swiglu


class Made:
    """A norm that remembers how often it was called, and whether what it gave the first time is still held."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x, self.weight, 1e-6)
        if not self.calls:
            self.first = weakref.ref(y)
        self.calls += 1
        return y


def leaf(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


USES = {
    "one product": lambda y, w: F.linear(y, w),
    "two products": lambda y, w: F.linear(y, w).sin() + F.linear(y.flip(1), w) + F.linear(y, w.cos()),
    "views": lambda y, w: F.linear(y[2:6].view(2, 2, -1), w).flatten(0, 1) + (y.t()[:, 1:5] * 2).t()[:4, :3],
    "itself": lambda y, w: y * y.exp() @ w.t(),
}


@pytest.mark.parametrize("use", USES)
def test_the_same_values_and_gradients(use):
    outcomes = []
    for again in (False, True):
        x, norm, w = leaf(8, 5, seed=0), leaf(5, seed=1), leaf(3, 5, seed=2)
        make = Made(norm)
        y = through(make, lambda h, w=w: USES[use](h, w), x, again=again)
        y.square().sum().backward()
        outcomes.append((y.detach(), x.grad, norm.grad, w.grad))
        assert make.calls == 1 + again
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_what_is_forgotten_is_not_held(again):
    x, make, w = leaf(8, 5, seed=0), Made(leaf(5, seed=1)), leaf(3, 5, seed=2)
    y = through(make, lambda h: F.linear(h, w), x, again=again)
    assert (make.first() is None) == again
    assert make.calls == 1
    y.sum().backward()
    assert make.calls == 1 + again


def test_what_was_copied_to_another_precision_is_kept():
    x, make, w = leaf(8, 5, seed=0), Made(leaf(5, seed=1)), leaf(3, 5, seed=2).detach().float().requires_grad_()
    through(make, lambda h: F.linear(h.float(), w), x).sum().backward()
    assert make.calls == 1
    assert x.grad is not None and w.grad is not None


def test_one_in_another():
    """As in a layer of experts: a norm around everything, an activation inside."""

    def layer(x, norm, first, second, again):
        def experts(h):
            inner = through(swiglu, lambda a: F.linear(a, second), F.linear(h, first), again=again)
            return inner + h * 0.5

        return through(lambda x: rms_norm(x, norm, 1e-6), experts, x, again=again)

    outcomes = []
    for again in (False, True):
        tensors = [leaf(7, 6, seed=0), leaf(6, seed=1), leaf(8, 6, seed=2), leaf(6, 4, seed=3)]
        layer(*tensors, again).square().sum().backward()
        outcomes.append([one.grad for one in tensors])
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_without_gradients_nothing_is_repeated():
    make, w = Made(leaf(5, seed=1)), leaf(3, 5, seed=2)
    with torch.no_grad():
        through(make, lambda h: F.linear(h, w), leaf(8, 5, seed=0))
    assert make.calls == 1


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_many_views_are_one_repetition(pieces):
    x, make, w = leaf(8, 5, seed=0), Made(leaf(5, seed=1)), leaf(3, 5, seed=2)
    y = through(make, lambda h: torch.cat([F.linear(part, w) for part in h.chunk(pieces)]), x)
    for times in (1, 2):
        y.sum().backward(retain_graph=True)
        assert make.calls == 1 + times


def test_twice_backward_through_one_graph():
    x, make, w = leaf(8, 5, seed=0), Made(leaf(5, seed=1)), leaf(3, 5, seed=2)
    y = through(make, lambda h: F.linear(h, w), x).sum()
    y.backward(retain_graph=True)
    once = w.grad.clone()
    y.backward()
    assert torch.equal(w.grad, 2 * once)
