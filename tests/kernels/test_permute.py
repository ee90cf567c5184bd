"""Sorting by expert and adding up again, against loops: values, gradients, dropped choices, padding, nothing at all."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.kernels.permute import permute

E, H = 5, 3


def draw(tokens: int, topk: int, *, drop: float = 0.0, experts: int = E, seed: int = 0):
    """(x, experts, probs, kept or None): a token's choices differ."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=rng, dtype=torch.float64, requires_grad=True)
    order = torch.rand(tokens, experts, generator=rng).argsort(-1)[:, :topk]
    probs = torch.rand(tokens, topk, generator=rng, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(tokens, topk, generator=rng) >= drop if drop else None
    return x, order, probs, kept


def places(experts, kept) -> list[tuple[int, int]]:
    """(token, choice) in order of expert; tokens of one expert keep their order."""
    found = []
    for expert in range(E):
        for token in range(len(experts)):
            for choice in range(experts.shape[1]):
                if experts[token, choice] == expert and (kept is None or kept[token, choice]):
                    found.append((token, choice))
    return found


CASES = [(11, 2, 0.0), (11, 1, 0.0), (11, E, 0.0), (11, 2, 0.4), (11, 3, 1.0), (1, 2, 0.0), (0, 2, 0.0), (0, 2, 0.5)]


@pytest.mark.parametrize(("tokens", "topk", "drop"), CASES)
def test_permute_and_combine(tokens, topk, drop):
    """sum over kept choices of p x f_e(x), with another f for each expert."""
    x, experts, probs, kept = draw(tokens, topk, drop=drop)
    sent, order = permute(x, experts, num_experts=E, kept=kept), places(experts, kept)
    assert sent.counts.dtype == torch.int64
    assert sent.counts.tolist() == [sum(int(experts[p]) == e for p in order) for e in range(E)]
    assert torch.equal(sent.x, x[[t for t, _ in order]])

    factors = torch.arange(1.0, E + 1, dtype=torch.float64).repeat_interleave(sent.counts)
    out = sent.combine(sent.x.sin() * factors[:, None], probs)
    again, weights = (value.detach().requires_grad_() for value in (x, probs))
    expected = torch.zeros(tokens, H, dtype=torch.float64)
    for token, choice in order:
        part = weights[token, choice] * again[token].sin() * (int(experts[token, choice]) + 1)
        expected = expected + torch.zeros_like(expected).index_put((torch.tensor([token]),), part[None])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)

    upstream = torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * upstream).sum(), (x, probs))
    # Where nothing is kept, the loop reaches no token: its gradient is zero, ours has to be that too.
    wanted = torch.autograd.grad(
        (expected * upstream).sum() + 0 * (again.sum() + weights.sum()), (again, weights), allow_unused=True
    )
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


def test_experts_without_a_token():
    x, _, probs, _ = draw(4, 2)
    experts = torch.tensor([[3, 1], [1, 3], [3, 1], [1, 3]])
    sent = permute(x, experts, num_experts=E)
    assert sent.counts.tolist() == [0, 4, 0, 4, 0]
    assert torch.equal(sent.x, torch.cat([x, x]))
    torch.testing.assert_close(sent.combine(sent.x, probs), x * probs.sum(1, keepdim=True))


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_to_capacity(drop, extra):
    """Each expert's rows first, zeros up to the limit; the sum and its gradients do not notice."""
    x, experts, probs, kept = draw(9, 2, drop=drop)
    plain = permute(x, experts, num_experts=E, kept=kept)
    limit = int(plain.counts.max()) + extra
    sent = permute(x, experts, num_experts=E, kept=kept, limit=limit)
    assert sent.x.shape == (E * limit, H) and sent.counts.tolist() == [limit] * E
    for part, rows in zip(sent.x.split(limit), plain.x.split(plain.counts.tolist()), strict=True):
        assert torch.equal(part[: len(rows)], rows) and not part[len(rows) :].any()
    # An expert that answers zeros with something: nothing of it may come back.
    out, expected = (s.combine((s.x + 1).square(), probs) for s in (sent, plain))
    assert torch.equal(out, expected)
    upstream = torch.arange(9.0 * H, dtype=torch.float64).view(9, H)
    mine, right = (torch.autograd.grad((o * upstream).sum(), (x, probs), retain_graph=True) for o in (out, expected))
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_padding_of_no_token():
    x, experts, probs, kept = draw(0, 2, drop=0.5)
    sent = permute(x, experts, num_experts=E, kept=kept, limit=2)
    assert sent.x.shape == (2 * E, H) and not sent.x.any()
    assert sent.combine(sent.x, probs).shape == (0, H)


def test_weights_in_a_wider_type():
    """bfloat16 answers, float32 weights: products and sum in float32, rounded once."""
    rng = torch.Generator().manual_seed(3)
    x, probs = torch.randn(6, H, generator=rng).bfloat16(), torch.rand(6, 2, generator=rng)
    experts = torch.rand(6, E, generator=rng).argsort(-1)[:, :2]
    sent = permute(x, experts, num_experts=E)
    out = sent.combine(sent.x, probs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (x.float() * probs[:, :1] + x.float() * probs[:, 1:]).bfloat16())


def test_the_gradient_is_the_same_on_every_run():
    """Sums of many choices of one token in float32 in a fixed order."""
    x, experts, _, _ = draw(64, 4)
    x = x.detach().float().requires_grad_()
    sent = permute(x, experts, num_experts=E)
    upstream = torch.randn(sent.x.shape, generator=torch.Generator().manual_seed(4))
    first, second = (torch.autograd.grad(sent.x, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
