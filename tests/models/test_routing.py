"""Routing and its losses against what loops say; the formulas are those of the papers and of Megatron-Core's router."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_swift.kernels.router import route
from megatron_swift.models import routing as rules
from megatron_swift.models.config import MoEConfig
from megatron_swift.models.moe import Router
from megatron_swift.models.routing import AttachLoss, RouterOptions, Routing, Sharers

T, E = 23, 5


def logits_of(seed: int = 0, tokens: int = T, experts: int = E) -> torch.Tensor:
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(lengths: list[int], scale: float | None = 1.0, **changes) -> Routing:
    """A row without padding, all of it on this rank."""
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    wanted = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    values = {"index": None, "place": torch.arange(len(number)), "sequence": number, "lengths": torch.tensor(lengths)}
    return Routing(**values | {"count": len(number), "scale": wanted} | changes)


def sinkhorn_by_loops(cost: np.ndarray, tolerance: float) -> np.ndarray:
    """Sinkhorn-Knopp entry by entry."""
    tokens, experts = cost.shape
    columns = [1.0] * experts
    while True:
        rows = [1 / (tokens * (sum(columns[e] * cost[t, e] for e in range(experts)) + 1e-8)) for t in range(tokens)]
        new = [1 / (experts * (sum(rows[t] * cost[t, e] for t in range(tokens)) + 1e-8)) for e in range(experts)]
        change = sum(abs(a - b) for a, b in zip(new, columns, strict=True)) / experts
        columns = new
        if change <= tolerance:
            return np.array([[columns[e] * cost[t, e] * rows[t] for e in range(experts)] for t in range(tokens)])


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_sinkhorn(tolerance):
    cost = logits_of(1).exp()
    found = rules.sinkhorn(cost, T, tolerance=tolerance)
    np.testing.assert_allclose(found.numpy(), sinkhorn_by_loops(cost.numpy(), tolerance), rtol=1e-12)
    np.testing.assert_allclose(found.sum(0).numpy(), 1 / E, rtol=1e-5)
    np.testing.assert_allclose(found.sum(1).numpy(), 1 / T, rtol=30 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("below", [6.0, 10.0, 16.0])
def test_sinkhorn_ends_where_an_expert_is_far_below_the_others(dtype, below):
    """Megatron's loop has no other end than the tolerance, and does not reach it here."""
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[:, 3] -= below
    found = rules.sinkhorn(logits.exp(), 64)
    assert found.isfinite().all()
    np.testing.assert_allclose(found.sum(1).numpy(), 1 / 64, rtol=0.05)


def test_sinkhorn_of_no_token_ends():
    assert rules.sinkhorn(torch.zeros(0, E), 0).shape == (0, E)


@pytest.mark.parametrize("topk", [1, 2])
def test_sinkhorn_route_chooses_on_balanced_logits_and_weighs_by_plain_ones(topk):
    logits = logits_of(2).requires_grad_()
    probs, experts = rules.sinkhorn_route(logits, topk=topk, routing=row([T]), sharers=Sharers())
    scores = logits.sigmoid() if topk == 1 else logits.softmax(-1)
    balanced = sinkhorn_by_loops(logits.detach().exp().numpy(), 1e-4)
    for token in range(T):
        assert experts[token].tolist() == np.argsort(-balanced[token])[:topk].tolist()
    assert torch.equal(probs, scores.gather(-1, experts))
    assert probs.requires_grad
    plain = scores.topk(topk, dim=-1).indices
    assert not torch.equal(plain, experts)  # the test data are uneven
    for routing in (None, row([T], scale=None)):  # evaluation
        assert torch.equal(rules.sinkhorn_route(logits, topk=topk, routing=routing, sharers=Sharers())[1], plain)


# Capacity


@pytest.mark.parametrize(
    ("count", "topk", "experts", "factor", "expected"),
    [(8, 2, 4, 1.0, 4), (8, 2, 4, 1.1, 5), (9, 2, 4, 1.0, 5), (1, 1, 8, 0.5, 1), (0, 2, 4, 1.0, 1), (10, 2, 4, 0.3, 2)],
)
def test_capacity(count, topk, experts, factor, expected):
    assert rules.capacity(count, topk=topk, experts=experts, factor=factor) == expected


def kept_by_loops(probs, experts, *, limit: int, policy: str) -> list[list[bool]]:
    """Expert by expert: the choices that stay."""
    kept = [[False] * probs.shape[1] for _ in probs]
    for expert in range(E):
        wants = [(t, k) for t in range(len(probs)) for k in range(probs.shape[1]) if experts[t, k] == expert]
        if policy == "probs":
            wants.sort(key=lambda place: -float(probs[place]))
        for t, k in wants[:limit]:
            kept[t][k] = True
    return kept


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("limit", [1, 3, 7, T - 1, T, 100])
def test_both_drop_policies(policy, limit):
    probs, experts = route(logits_of(3), topk=2, pre_softmax=True)
    options = {"num_experts": E, "limit": limit, "policy": policy, "routing": row([T]), "sharers": Sharers()}
    found = rules.kept_within_capacity(probs, experts, **options)
    assert found.tolist() == kept_by_loops(probs, experts, limit=limit, policy=policy)
    assert bool(found.all()) == (limit >= int(experts.flatten().bincount().max()))


def test_policies_differ():
    probs, experts = route(logits_of(3), topk=2, pre_softmax=True)
    options = {"num_experts": E, "limit": 4, "routing": row([T]), "sharers": Sharers()}
    found = [rules.kept_within_capacity(probs, experts, policy=p, **options) for p in ("probs", "position")]
    assert not torch.equal(*found) and int(found[0].sum()) == int(found[1].sum())


# Losses


def balance_by_loops(logits, topk: int) -> float:
    """E x sum over experts of (share of the choices) x (mean probability): Fedus et al. eq. 4 without its weight."""
    probs = [[math.exp(v) / sum(map(math.exp, values)) for v in values] for values in logits.tolist()]
    chosen = [sorted(range(logits.shape[1]), key=lambda e: -values[e])[:topk] for values in logits.tolist()]
    total = 0.0
    for expert in range(logits.shape[1]):
        share = sum(expert in c for c in chosen) / (len(chosen) * topk)
        total += logits.shape[1] * share * sum(p[expert] for p in probs) / len(probs)
    return total


def chosen_of(logits, topk: int) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(1, logits.topk(topk, dim=-1).indices, 1.0)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_balancing_loss(topk):
    logits = logits_of(4)
    load = chosen_of(logits, topk).sum(0)
    found = rules.balancing_loss(logits.softmax(-1).sum(0), load, count=T, tokens=T, topk=topk)
    assert float(found) == pytest.approx(balance_by_loops(logits, topk), rel=1e-12)


def test_balancing_loss_of_an_even_load_is_one_and_shares_add_up():
    even = torch.zeros(2 * E, E, dtype=torch.float64)
    load = torch.full((E,), 4.0, dtype=torch.float64)
    assert float(
        rules.balancing_loss(even.softmax(-1).sum(0), load, count=2 * E, tokens=2 * E, topk=2)
    ) == pytest.approx(1)
    logits = logits_of(5)
    load = chosen_of(logits, 2).sum(0)
    parts = [
        rules.balancing_loss(part.softmax(-1).sum(0), load, count=T, tokens=T, topk=2)
        for part in logits.split([9, 0, T - 9])
    ]
    assert float(sum(parts)) == pytest.approx(balance_by_loops(logits, 2), rel=1e-12) and float(parts[1]) == 0


def test_balancing_loss_of_no_token_is_zero():
    found = rules.balancing_loss(torch.zeros(E), torch.zeros(E), count=1, tokens=0, topk=2)
    assert float(found) == 0


@pytest.mark.parametrize("lengths", [[T], [1, 9, 13], [2] * 11 + [1]])
def test_sequence_balancing_loss_is_the_mean_over_segments(lengths):
    logits, topk = logits_of(6), 2
    found = rules.sequence_balancing_loss(
        logits.softmax(-1), chosen_of(logits, topk), row(lengths), Sharers(), topk=topk
    )
    parts = [balance_by_loops(part, topk) for part in logits.split(lengths)]
    assert float(found) == pytest.approx(sum(parts) / len(parts), rel=1e-12)


@pytest.mark.parametrize("share", [(0, 11), (11, T), (5, 5)])
def test_sequence_balancing_loss_of_a_share(share):
    """Ranks hold parts of segments: each multiplies its own probabilities with everyone's load."""
    logits, lengths, whole = logits_of(6), [4, 10, 9], row([4, 10, 9])
    everyone = torch.zeros(3, E, dtype=torch.float64).index_add(0, whole.sequence, chosen_of(logits, 2))
    part = slice(*share)
    mine = row(lengths, place=whole.place[part], sequence=whole.sequence[part])
    found = rules.sequence_balancing_loss(
        logits[part].softmax(-1), chosen_of(logits, 2)[part], mine, Sharers(total=lambda _: everyone), topk=2
    )
    expected = 0.0
    for token in range(*share):
        segment = int(whole.sequence[token])
        probs = logits[token].softmax(-1)
        expected += float((probs * everyone[segment]).sum()) * E / (2 * lengths[segment] ** 2) / 3
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_attach_loss_is_adding_it_to_the_models(dtype, scale):
    """x keeps dtype and values; the loss gets the gradient `scale` in its own dtype; x's gradient is untouched."""
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    w = torch.tensor([3.0, -1.0], dtype=torch.float32, requires_grad=True)
    y = AttachLoss.apply(x, w.square().sum(), torch.tensor(scale, dtype=torch.float64))
    assert y.dtype == dtype and torch.equal(y, x)
    (y * torch.tensor([5.0, 7.0], dtype=dtype)).sum().backward()
    assert w.grad.dtype == torch.float32 and w.grad.tolist() == [6 * scale, -2 * scale]
    assert x.grad.dtype == dtype and x.grad.tolist() == [5.0, 7.0]


def test_attach_loss_adds_nothing_to_a_loss_that_ignores_x():
    """Where no token of a row reaches the loss, the gradient of x is zero and the router is trained by its own loss all the same."""
    x, w = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    (AttachLoss.apply(x, (3 * w).sum(), torch.tensor(0.5)) * 0).sum().backward()
    assert x.grad.tolist() == [0, 0] and w.grad.tolist() == [1.5]


# The router as a whole


def router(topk: int = 2, **options) -> Router:
    cfg = MoEConfig(
        num_experts=E, topk=topk, ffn_hidden_size=4, shared_size=0, pre_softmax=False, sparse_layers=(True,)
    )
    made = Router(cfg, 6, 0).double()
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    made.options = RouterOptions(**options)
    return made.requires_grad_()


X = torch.randn(T, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_router_gradient_is_that_of_the_weighted_losses():
    made, routing = router(balancing="aux_loss", aux_coeff=0.1, z_coeff=0.01), row([T], scale=0.5)
    choice = made(X, routing)
    (choice.probs * 0).sum().backward()
    weight = made.weight.detach().requires_grad_()
    logits = X @ weight.T
    load = chosen_of(logits.detach(), 2).sum(0)
    balance = E * sum(load[e] / (2 * T) * logits.softmax(-1)[:, e].mean() for e in range(E))
    (0.5 * (0.1 * balance + 0.01 * logits.logsumexp(-1).square().mean())).backward()
    torch.testing.assert_close(made.weight.grad, weight.grad, rtol=1e-12, atol=0)


def test_router_records_what_it_did_and_no_gradient():
    made, routing = router(balancing="seq_aux_loss", capacity_factor=0.5), row([10, 13])
    choice = made(X, routing)
    record, logits = routing.records[0], X @ made.weight.T.detach()
    assert torch.equal(record.load, chosen_of(logits, 2).sum(0))
    assert int(record.dropped) == int((~choice.kept).sum()) > 0
    probs = logits.softmax(-1)
    assert float(record.entropy) == pytest.approx(float(-(probs * probs.log()).sum()), rel=1e-12)
    assert not any(v.requires_grad for v in (record.load, record.dropped, record.entropy, record.balance, record.z))
    made(X, routing)  # recomputed: the record is the same, not twice as much
    assert torch.equal(routing.records[0].load, record.load)


def test_evaluation_records_nothing():
    made, routing = router(balancing="aux_loss", aux_coeff=0.1), row([T], scale=None)
    made(X, routing)
    assert routing.records == {}


def test_global_aux_loss_counts_the_rows_before():
    made = router(balancing="global_aux_loss", aux_coeff=0.1)
    first = row([T])
    made(X, first)
    second = row([T], earlier=(first,))
    made(X.flip(-1), second)
    loads = [chosen_of((x @ made.weight.T).detach(), 2).sum(0) for x in (X, X.flip(-1))]
    scores = (X.flip(-1) @ made.weight.T).detach().softmax(-1)
    both = loads[0] + loads[1]
    expected = sum(E * both[e] / (2 * 2 * T) * scores[:, e].mean() for e in range(E))
    assert float(second.records[0].balance) == pytest.approx(float(expected), rel=1e-12)
    alone = row([T])
    made(X.flip(-1), alone)
    assert abs(float(alone.records[0].balance) - float(expected)) > 1e-3


@pytest.mark.parametrize(
    ("options", "x", "wanted"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (None, torch.bfloat16, torch.float32),  # the product in bfloat16, the softmax never below float32
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_router(options, x, wanted):
    made = router(dtype=options).to(x)
    probs = made(X.to(x), None).probs
    assert probs.dtype == wanted
    exact = wanted if options is not None else x
    logits = torch.nn.functional.linear(X.to(x).to(exact), made.weight.to(exact)).to(wanted)
    assert torch.equal(probs, route(logits, topk=2, pre_softmax=False)[0])
