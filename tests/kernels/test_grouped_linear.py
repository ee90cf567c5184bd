"""The grouped matrix product beside its plain twin, and when which of them is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_swift.kernels.grouped_linear import choose_grouped, grouped_linear, looped_linear

CPU = torch.device("cpu")
COUNTS = [[5, 0, 3, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


def inputs(counts, dtype, width=16, out=24):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), width, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out, width, generator=rng).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


def by_rows(x, weight, counts):
    """One product per row, in float64."""
    group = [g for g, n in enumerate(counts.tolist()) for _ in range(n)]
    rows = [weight[g].double() @ row.double() for g, row in zip(group, x, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("product", [grouped_linear, looped_linear])
def test_forward_and_backward(product, dtype, tolerance, counts):
    """Values and both gradients within rounding of the largest; groups without rows get zeros, not nothing."""
    x, weight, sizes = inputs(counts, dtype)
    out = product(x, weight, sizes)
    expected = by_rows(x, weight, sizes)
    assert out.dtype == dtype and out.shape == (sum(counts), 24)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * 20)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dx, dw = torch.autograd.grad(out, (x, weight), upstream)
    assert dx.dtype == dw.dtype == dtype
    wanted = torch.autograd.grad((expected * upstream).sum() + 0 * (x.sum() + weight.sum()), (x, weight))
    for mine, right in zip((dx, dw), wanted, strict=True):
        torch.testing.assert_close(mine.float(), right.float(), rtol=0, atol=tolerance * 40)
    for group, count in enumerate(counts):
        assert bool(dw[group].any()) == (count > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_where_it_can(dtype):
    product, reason = choose_grouped(True, dtype=dtype, device=CPU, sizes=(16, 24))
    assert product is grouped_linear and reason == "all experts in one grouped matrix product"
    x, weight, counts = inputs([2, 0, 3], dtype)
    assert product(x, weight, counts).shape == (5, 24)


@pytest.mark.parametrize(
    ("wanted", "dtype", "sizes", "words"),
    [
        (False, torch.float32, (16, 24), "--moe_grouped_gemm true"),
        (True, torch.float64, (16, 24), "torch has no grouped one in torch.float64"),
        (True, torch.float32, (16, 18), "whole 16 bytes, not 18 torch.float32"),
        (True, torch.bfloat16, (20, 24), "whole 16 bytes, not 20 torch.bfloat16"),
    ],
)
def test_the_loop_where_it_cannot(wanted, dtype, sizes, words):
    product, reason = choose_grouped(wanted, dtype=dtype, device=CPU, sizes=sizes)
    assert product is looped_linear
    assert reason.startswith("one matrix product per expert") and words in reason


@pytest.mark.parametrize(("dtype", "width", "out"), [(torch.float32, 16, 18), (torch.bfloat16, 20, 24)])
def test_the_refused_sizes_do_fail_in_torch(dtype, width, out):
    """Else the loop would be taken for nothing."""
    x, weight, counts = inputs([2, 3], dtype, width, out)
    with pytest.raises(RuntimeError, match="16 bytes"):
        grouped_linear(x, weight, counts).square().sum().backward()
    looped = looped_linear(x, weight, counts)
    torch.testing.assert_close(looped[:2], F.linear(x[:2], weight[0]))


def test_float64_does_fail_in_torch():
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)float"):
        grouped_linear(*inputs([2, 3], torch.float64))
