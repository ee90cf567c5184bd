"""A router's choice and sums against loops, and the fused form against the plain one. The fused form needs a GPU or Triton's interpreter
(`TRITON_INTERPRET=1` in an environment with Triton)."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

from megatron_swift.kernels import router as kernels
from megatron_swift.kernels.router import choose_gate, plain_gate, route, sums_of
from megatron_swift.models.config import MoEConfig
from megatron_swift.models.moe import Router
from megatron_swift.models.routing import BALANCING, RouterOptions, Routing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
T, E = 23, 5
NAN, INF = float("nan"), float("inf")


def logits_of(seed: int = 0, tokens: int = T, experts: int = E, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * values).to(dtype)


# The plain form


@pytest.mark.parametrize("topk", [1, 2, E])
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_route_token_by_token(topk, pre_softmax):
    logits = logits_of()
    probs, experts = route(logits, topk=topk, pre_softmax=pre_softmax)
    for token, values in enumerate(logits.tolist()):
        best = sorted(range(E), key=lambda e: -values[e])[:topk]
        over = range(E) if pre_softmax else best
        whole = sum(math.exp(values[e]) for e in over)
        assert experts[token].tolist() == best
        assert probs[token].tolist() == pytest.approx([math.exp(values[e]) / whole for e in best], rel=1e-12)


@pytest.mark.parametrize("pre_softmax", [True, False])
def test_of_equal_logits_the_lowest_experts(pre_softmax):
    logits = torch.zeros(3, 60)
    logits[1, 40:] = 1.0
    logits[2, 7] = -0.0
    _, experts = route(logits, topk=4, pre_softmax=pre_softmax)
    assert experts.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43], [0, 1, 2, 3]]


def test_sums_token_by_token():
    logits = logits_of(7)
    sums = sums_of(logits, route(logits, topk=2, pre_softmax=False)[1])
    rows = [[math.exp(v) for v in values] for values in logits.tolist()]
    shares = [[v / sum(values) for v in values] for values in rows]
    best = [sorted(range(E), key=lambda e: -values[e])[:2] for values in rows]
    assert sums.load.tolist() == [sum(e in chosen for chosen in best) for e in range(E)]
    assert sums.scores.tolist() == pytest.approx([sum(p[e] for p in shares) for e in range(E)], rel=1e-12)
    assert float(sums.squares) == pytest.approx(sum(math.log(sum(values)) ** 2 for values in rows), rel=1e-12)
    assert float(sums.entropy) == pytest.approx(-sum(p * math.log(p) for values in shares for p in values), rel=1e-12)


def test_sums_of_no_token_and_of_large_logits():
    assert all(not s.any() for s in sums_of(logits_of(tokens=0), torch.zeros(0, 2, dtype=torch.int64)))
    big = torch.full((3, E), 500.0)  # exp would overflow
    squares = sums_of(big, torch.zeros(3, 1, dtype=torch.int64)).squares
    assert float(squares) == pytest.approx(3 * (500 + math.log(E)) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("router_dtype", "compute_dtype", "experts", "why"),
    [
        (torch.float32, torch.float64, 8, "not written for torch.float64"),
        (torch.float64, torch.bfloat16, 8, "not written for torch.float64"),
        (None, torch.bfloat16, 513, "up to 512 experts"),
    ],
)
def test_what_stays_torchs_own(monkeypatch, router_dtype, compute_dtype, experts, why):
    dtypes = router_dtype, compute_dtype
    gate, said = choose_gate(torch.device("cpu"), dtypes, num_experts=experts)
    assert gate is plain_gate and "need a GPU" in said
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: "")
    gate, said = choose_gate(torch.device("cuda"), dtypes, num_experts=experts)
    assert gate is plain_gate and why in said


# The fused form


def outputs(gate, logits, topk, pre_softmax, with_sums=True):
    """What a gate gives, and the gradient of the logits for random gradients of what has one."""
    leaf = logits.clone().requires_grad_()
    probs, experts, sums = gate(leaf, topk, pre_softmax, with_sums)
    carry = [probs, *((sums.scores, sums.squares) if with_sums else ())]
    grads = [torch.cos(3 * i + torch.arange(x.numel(), device=x.device)).view(x.shape) for i, x in enumerate(carry)]
    (grad,) = torch.autograd.grad(carry, [leaf], [g.to(x.dtype) for g, x in zip(grads, carry, strict=True)])
    return experts, [probs, *(sums or ()), grad]


def compare(logits, topk, pre_softmax, with_sums=True):
    from megatron_swift.kernels.fused.router import fused_gate

    mine, values = outputs(fused_gate, logits, topk, pre_softmax, with_sums)
    right, expected = outputs(plain_gate, logits.double(), topk, pre_softmax, with_sums)
    assert torch.equal(mine, right)
    for value, exact in zip(values, expected, strict=True):
        assert value.shape == exact.shape and value.dtype == torch.float32
        assert (value.double() - exact).norm() <= 1e-6 * max(exact.norm(), 1e-3)


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "experts", "topk"),
    [(0, 60, 4), (1, 5, 1), (37, 60, 4), (70, 128, 8), (9, 300, 3), (3, 4, 4), (50, 8, 2)],
)
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_fused_equals_plain(tokens, experts, topk, pre_softmax):
    compare(logits_of(1, tokens, experts, torch.float32).to(DEVICE), topk, pre_softmax)


@needs_triton
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_fused_without_sums_and_with_large_logits(pre_softmax):
    logits = logits_of(2, 19, 60, torch.float32).to(DEVICE)
    compare(logits, 4, pre_softmax, with_sums=False)
    compare(40 * logits, 4, pre_softmax)


@needs_triton
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_fused_chooses_the_lowest_of_equal_logits(pre_softmax):
    """Rounded to bfloat16, as with moe_router_dtype none; all alike; zeros of both signs."""
    logits = logits_of(3, 64, 128, torch.bfloat16).float()
    assert any(len(set(row.tolist())) < 128 for row in logits)
    logits[5], logits[6] = 0.0, torch.tensor([-0.0, 0.0]).repeat(64)
    logits[7, 100:] = 9.0
    compare(logits.to(DEVICE), 8, pre_softmax)


@needs_triton
def test_fused_stays_within_the_experts_where_logits_are_no_numbers():
    """A diverged model must be told by its loss, not by a read beyond the experts."""
    from megatron_swift.kernels.fused.router import fused_gate

    logits = torch.tensor([[NAN] * 5, [1.0, NAN, 2.0, NAN, 0.0], [-INF, -INF, 1.0, -INF, -INF]], device=DEVICE)
    logits[1, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # one with the sign bit set
    probs, experts, _ = fused_gate(logits, 3, False, True)
    assert (
        experts.tolist()
        == route(logits.cpu(), topk=3, pre_softmax=False)[1].tolist()
        == [[0, 1, 2], [1, 3, 2], [2, 0, 1]]
    )
    assert probs[:2].isnan().all() and probs[2].tolist() == [1, 0, 0]


@needs_triton
@pytest.mark.parametrize("balancing", BALANCING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_with_either(balancing, dtype):
    """Choice, records and gradients of a whole router in training, with tokens dropped; in bfloat16 logits are computed in that."""
    from megatron_swift.kernels.fused.router import fused_gate

    cfg = MoEConfig(num_experts=8, topk=2, ffn_hidden_size=4, shared_size=0, pre_softmax=True, sparse_layers=(True,))
    found = []
    for gate in (plain_gate, fused_gate):
        made = Router(cfg, 6, 0).to(DEVICE, dtype)
        made.weight.data.copy_(logits_of(4, 8, 6))
        made.options = RouterOptions(balancing=balancing, aux_coeff=0.1, z_coeff=0.01, capacity_factor=1.0, dtype=None)
        made.gate = gate
        routing = Routing(
            index=None,
            place=torch.arange(40, device=DEVICE),
            sequence=torch.arange(40, device=DEVICE) // 25,
            lengths=torch.tensor([25, 15], device=DEVICE),
            count=40,
            scale=torch.tensor(0.5, device=DEVICE),
        )
        x = logits_of(5, 40, 6, dtype).to(DEVICE).requires_grad_()
        choice = made.requires_grad_()(x, routing)
        choice.probs.square().sum().backward()
        found.append((choice, routing.records[0], made.weight.grad, x.grad))
    (one, plain, *grads), (other, fused, *others) = found
    assert torch.equal(one.experts, other.experts) and torch.equal(one.kept, other.kept)
    assert torch.equal(plain.load, fused.load) and torch.equal(plain.dropped, fused.dropped)
    for name in ("balance", "z", "entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=2e-6, atol=0)
        assert not getattr(fused, name).requires_grad
    for mine, right in zip([other.probs, *others], [one.probs, *grads], strict=True):
        rough = mine.dtype == torch.bfloat16  # the same float32 gradient up to rounding, before it is cut
        torch.testing.assert_close(mine, right, rtol=2e-2 if rough else 2e-5, atol=1e-3 if rough else 2e-6)
