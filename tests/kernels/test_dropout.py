"""Dropout as a pure function: shares, independence of neighbours, and no dependence on what else is in the row."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.kernels.attention import Segments, unfused_attention
from megatron_swift.kernels.dropout import Noise, column_bits, dropout, kept, mix, row_bits
from megatron_swift.kernels.dropout_attention import AttentionDropout, attend, with_dropout

CPU = torch.device("cpu")


def noise(lengths, seed=5) -> Noise:
    tokens = torch.cat([(number << 32) + torch.arange(length) for number, length in enumerate(lengths)])
    return Noise(seed, tokens, tokens)


def mask(p: float, *, seed=5, stream=0, rows=1000, columns=999) -> torch.Tensor:
    return kept(row_bits(torch.arange(rows), seed, stream)[:, None], column_bits(columns, CPU), p)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_of_zeros(p):
    """Over a million draws and, where many are dropped, over each row and column; five standard deviations."""
    found = (~mask(p)).double()
    lines = ((found.mean(0), 1000), (found.mean(1), 999)) if p >= 0.1 else ()
    for part, draws in ((found.mean(), 999_000), *lines):
        assert (part - p).abs().max() < 5 * (p * (1 - p) / draws) ** 0.5


def test_neighbours_are_independent():
    """Neither rows, columns, seeds nor streams resemble each other: the correlation of masks is that of chance."""
    first = mask(0.5).double() - 0.5
    others = {
        "row": first.roll(1, 0),
        "column": first.roll(1, 1),
        "diagonal": first.roll((1, 1), (0, 1)),
        "seed": mask(0.5, seed=6).double() - 0.5,
        "stream": mask(0.5, stream=1).double() - 0.5,
    }
    for name, other in others.items():
        assert abs(float((first * other).mean()) / 0.25) < 0.005, name


def test_mix_depends_on_order_and_every_number():
    values = [mix(*numbers) for numbers in ((1, 2, 3), (1, 3, 2), (1, 2, 4), (1, 2), (0,), (0, 0), (-1, 5))]
    assert len(set(values)) == len(values) and all(-(2**63) <= v < 2**63 for v in values)


def test_what_is_kept_is_scaled_and_passes_its_gradient():
    x = torch.randn(7, 40, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25, noise([3, 4]), 2)
    gone = y == 0
    assert 0 < int(gone.sum()) < 280 / 2
    torch.testing.assert_close(y[~gone], x[~gone] / 0.75, rtol=1e-15, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (~gone).double() / 0.75, rtol=1e-15, atol=0)


def test_a_token_loses_the_same_alone_and_in_a_row():
    x = torch.randn(9, 16)
    whole = dropout(x, 0.5, noise([4, 5]), 0)
    some = noise([4, 5]).tokens[torch.tensor([7, 2])]
    assert torch.equal(dropout(x[[7, 2]], 0.5, Noise(5, some, some), 0), whole[[7, 2]])


def test_attention_without_dropout_is_the_plain_one():
    q, k, v = (torch.randn(9, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    options = AttentionDropout(0.0, 0)
    found = attend(q, k, v, options, noise([4, 5]), [(4, 4), (5, 5)])
    torch.testing.assert_close(found, unfused_attention(q, k, v, Segments.of([4, 5], CPU)), rtol=1e-12, atol=1e-14)


def test_attention_heads_of_a_rank_drop_what_the_whole_model_drops():
    q, k, v = (torch.randn(9, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    lengths = [(4, 4), (5, 5)]
    whole = attend(q, k, v, AttentionDropout(0.4, 3), noise([4, 5]), lengths)
    mine = attend(q[:, 2:], k[:, 1:], v[:, 1:], AttentionDropout(0.4, 3, first_head=2), noise([4, 5]), lengths)
    assert torch.equal(whole[:, 2:], mine)
    assert not torch.equal(whole, attend(q, k, v, AttentionDropout(0.4, 4), noise([4, 5]), lengths))


def test_mean_over_seeds_is_attention_without_dropout():
    q, k, v = (torch.randn(6, 2, 4, dtype=torch.float64) for _ in range(3))
    core = with_dropout(unfused_attention, AttentionDropout(0.3, 0))
    plain = Segments.of([6], CPU)
    seeds = [core(q, k, v, Segments([6], plain.cumulative, 6, noise=noise([6], seed))) for seed in range(4000)]
    assert torch.equal(core(q, k, v, plain), unfused_attention(q, k, v, plain))
    torch.testing.assert_close(torch.stack(seeds).mean(0), unfused_attention(q, k, v, plain), rtol=0, atol=0.06)
