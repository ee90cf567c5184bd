"""8-bit values and their products: errors as the formats promise, zeros, NaN, ragged sizes; the Triton kernels against the plain form."""

from __future__ import annotations

import importlib.util
import itertools
import os

import pytest
import torch

from megatron_swift.kernels import fp8_values
from megatron_swift.kernels.fp8_values import LARGEST, plain_quantise, product, scaled_product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ("tensorwise", "rowwise", "blockwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over many orders of magnitude, some rows larger than others, one of zeros."""
    a, b, c = (random(*s, seed=seed + i).float() for i, s in enumerate((shape, shape, (shape[0], 1))))
    x = a * (3 * b).exp() * (3 * c).exp()
    x[3] = 0
    return x.bfloat16()


def parts(x, dtype, recipe, **options):
    made = plain_quantise(x, dtype, recipe, **options)
    return made.rows, made.columns


@recipes
@pytest.mark.parametrize(("dtype", "mantissa"), [(E4M3, 3), (E5M2, 2)])
def test_the_error_of_a_product_is_that_of_the_format(recipe, dtype, mantissa):
    """Rounding to m bits is off by at most half of 2^-m, and by 0.38 to 0.45 of that on average (an even error over a step is 0.58 of half of
    it, values lie between 1 and 2 steps' units). Errors of many terms are independent, so those of both operands add up in squares."""
    x, w = random(200, 384), random(256, 384, seed=1)

    def error(side, exact):
        return float((side - exact).norm() / exact.norm())

    (rows, columns), (weight, turned) = parts(x, dtype, recipe), parts(w, E4M3, recipe, weight=True)
    of_x, of_w = error(rows.whole()[:200], x.double()), error(weight.whole(), w.double())
    assert 0.38 < of_x / 2.0 ** -(mantissa + 1) < 0.45 and 0.38 < of_w / 2.0**-4 < 0.45
    y = product(rows, weight, fast=True, dtype=torch.float32)[:200]
    assert error(y, x.double() @ w.double().t()) == pytest.approx((of_x**2 + of_w**2) ** 0.5, rel=0.04)
    other = random(200, 256, seed=2)
    d = product(columns, parts(other, E4M3, recipe)[1], fast=False, dtype=torch.float32)
    assert error(d, x.double().t() @ other.double()) == pytest.approx((of_x**2 + of_w**2) ** 0.5, rel=0.04)
    assert error(turned.whole().t(), w.double()) == pytest.approx(of_w, rel=0.04)


@recipes
def test_copies_are_one_matrix(recipe):
    """Both copies stand for the same values. Where the scales differ, all but those that underflow in one of them."""
    x = spread(256, 384)
    rows, columns = (side.whole() for side in parts(x, E4M3, recipe))
    if recipe == "tensorwise":
        assert torch.equal(rows, columns.t())
    kept = (rows.abs() > x.float().abs().amax(1, keepdim=True) * 2**-12) & (
        columns.t().abs() > x.float().abs().amax(0) * 2**-12
    )
    assert kept.float().mean() > 0.1
    torch.testing.assert_close(rows[kept], columns.t()[kept], rtol=0, atol=0)
    square, turned = (side.whole() for side in parts(x, E4M3, recipe, weight=True))
    if recipe != "rowwise":
        assert torch.equal(square, turned.t())


@recipes
def test_the_largest_value_is_kept(recipe):
    """It comes out with the error of one rounding and is not cut off."""
    x = spread(128, 256)
    for dtype, whole in itertools.product((E4M3, E5M2), (0, 1)):
        got = parts(x, dtype, recipe)[whole].whole()
        got = got.t() if whole else got
        at = int(x.float().abs().argmax())
        assert abs(got.reshape(-1)[at] / x.float().reshape(-1)[at] - 1) <= (2**-4 if dtype is E4M3 else 2**-3)


@recipes
def test_zeros_and_the_smallest_numbers(recipe):
    nothing = torch.zeros(32, 128).bfloat16()
    for side in parts(nothing, E5M2, recipe):
        assert not side.whole().any() and side.scale.isfinite().all() and (side.scale > 0).all()
    tiny = torch.full((128, 128), 1e-38).bfloat16()
    for side in parts(tiny, E4M3, recipe):
        assert side.whole().isfinite().all()
    small = random(128, 128) * 2.0**-90
    for side in parts(small, E4M3, recipe):
        got = side.whole()[:128]
        assert (got - small.float()).norm() < 0.05 * small.float().norm() or got.allclose(small.float().t(), rtol=0.1)


@recipes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(recipe, value):
    """One bad gradient makes every product that it is in bad, so that the norm sees it; the rest of a row's or block's recipe stays whole."""
    x, w = random(256, 256), random(128, 256, seed=1)
    x[5, 7] = value
    rows, columns = parts(x, E5M2, recipe)
    y = product(rows, parts(w, E4M3, recipe, weight=True)[0], fast=True)
    assert not y[5].isfinite().any()
    d = product(columns, parts(random(256, 128, seed=2), E4M3, recipe)[1], fast=True)
    assert not d[7].isfinite().any()
    if recipe != "tensorwise":
        assert y[:5].isfinite().all() and y[6:].isfinite().all() and d[:7].isfinite().all()
    w[3, 200] = value
    y = product(parts(random(32, 256), E4M3, recipe)[0], parts(w, E4M3, recipe, weight=True)[0], fast=True)
    assert not y[:, 3].isfinite().any()


@recipes
@pytest.mark.parametrize("number", [0, 1, 37, 130])
def test_any_number_of_tokens(recipe, number):
    """Rows of zeros fill up what the products need; they change no result."""
    x, g = random(number, 128), random(number, 256, seed=1)
    rows, columns = parts(x, E4M3, recipe)
    full = -(-number // (128 if recipe == "blockwise" else 16)) * (128 if recipe == "blockwise" else 16)
    assert rows.values.shape == (full, 128) and columns.values.shape == (128, full)
    assert not rows.whole()[number:].any() and not columns.whole()[:, number:].any()
    d = product(parts(g, E5M2, recipe)[1], columns, fast=False, dtype=torch.float32)
    exact = g.double().t() @ x.double()
    assert (d - exact).norm() <= 0.08 * exact.norm()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torchs_scaled_product_is_the_product(recipe):
    """torch has it on the CPU, too: the very call that a GPU gets."""
    for grad in (E4M3, E5M2):
        a, b = parts(spread(48, 128), grad, recipe)[0], parts(random(64, 128), E4M3, recipe, weight=True)[0]
        mine = product(a, b, fast=False, dtype=torch.float32)
        try:
            theirs = scaled_product(a, b, fast=False, dtype=torch.bfloat16).float()
        except RuntimeError as error:
            if "only supports per-tensor" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__} has the product of rows on GPUs only")
        assert ((mine - theirs).abs() <= 2**-7 * mine.abs() + 1e-6 * mine.abs().amax()).all()


def test_scales_lie_as_torch_wants_them():
    """ATen/native/cuda/ScaledBlas.cpp: vectors [R, C / 128] with strides (1, R); blocks [R / 128, C / 128 rounded up to 4]."""
    vector = parts(random(300, 640), E4M3, "blockwise")
    assert [(s.scale.shape, s.scale.stride()) for s in vector] == [((384, 5), (1, 384)), ((640, 3), (1, 640))]
    square = parts(random(384, 640), E4M3, "blockwise", weight=True)
    assert [(s.scale.t().shape, s.scale.t().stride()) for s in square] == [((8, 3), (1, 8)), ((4, 5), (1, 4))]
    rows = parts(random(30, 640), E4M3, "rowwise")
    assert [s.scale.shape for s in rows] == [(32, 1), (640, 1)] and all(s.scale.is_contiguous() for s in rows)


@needs_triton
@recipes
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(197, 256), (256, 384), (0, 128)], ids=str)
@pytest.mark.parametrize("weight", [False, True])
def test_the_kernels_make_the_values_of_the_plain_form(recipe, dtype, shape, weight):
    from megatron_swift.kernels.fused import fp8

    if weight and shape[0] % 128:
        pytest.skip("weights have whole sizes")
    x = spread(shape[0] + 4, shape[1])[: shape[0]].contiguous()
    # On the CPU: torch divides by a number on a GPU by multiplying with its inverse, which may be off by a bit.
    expected, x = plain_quantise(x, dtype, recipe, weight=weight), x.to(DEVICE)
    for wanted in ({}, {"rows": False}, {"columns": False}):
        made = fp8.quantise(x, dtype, recipe, weight=weight, **wanted)
        for name in ("rows", "columns"):
            mine, right = getattr(made, name), getattr(expected, name)
            if not wanted.get(name, True):
                assert mine is None
                continue
            assert mine.kind == right.kind and torch.equal(mine.scale.cpu(), right.scale)
            assert mine.scale.shape == right.scale.shape
            assert mine.scale.stride() == right.scale.stride() or not shape[0]
            # As numbers: the interpreter gives zeros no sign.
            assert torch.equal(mine.values.float().cpu(), right.values.float())


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_kernels_do_not_hide_what_is_not_finite(value):
    from megatron_swift.kernels.fused import fp8

    x = random(128, 128)
    x[5, 7] = value
    for recipe in RECIPES:
        made = fp8.quantise(x.to(DEVICE), E4M3, recipe)
        assert not made.rows.whole()[5, 7].isfinite() and not made.columns.whole()[7, 5].isfinite()
        assert not made.rows.scale.isfinite().all()


@needs_triton
def test_kernels_leave_the_largest_value_of_what_they_write():
    from megatron_swift.kernels.fused import fp8, norm, swiglu

    def bits(x):
        return fp8.amax_of(x.contiguous()).max()

    x, weight, grad = spread(70, 96).to(DEVICE), random(96, seed=4).to(DEVICE), spread(70, 48, seed=5).to(DEVICE)
    assert bits(x).view(torch.float32) == x.float().abs().max()
    slots = [fp8.amax_slots(x.device) for _ in range(5)]
    _, y, rstd = norm.norm_forward(x, weight, 1e-6, amax=slots[0])
    product = swiglu.swiglu_forward(x, amax=slots[1])
    d, _ = swiglu.swiglu_backward(x, grad, again=False, amax=slots[2])
    total, summed, rstd = norm.norm_forward(x, weight, 1e-6, y, amax=slots[3])
    dx, _, _ = norm.norm_backward(total, weight, rstd, y, again=False, beside=10 * y, amax=slots[4])
    assert [int(s.max()) for s in slots] == [int(bits(v)) for v in (y, product, d, summed, dx)]
    given = fp8.quantise(y, E4M3, "tensorwise", amax=slots[0])
    assert torch.equal(given.rows.values.float(), fp8.quantise(y, E4M3, "tensorwise").rows.values.float())


def test_padding_and_reach():
    assert [fp8_values.padded(17, recipe) for recipe in RECIPES] == [32, 32, 128]
    assert {dtype: torch.finfo(dtype).max for dtype in LARGEST} == LARGEST


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with 8-bit products",
)
@recipes
@pytest.mark.parametrize("grad", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("sizes", [(0, 384, 640), (256, 512, 1024), (333, 384, 640), (333, 512, 1024)], ids=str)
def test_products_on_a_gpu(recipe, grad, sizes):
    """All three of a layer, exact sums and fast ones, against the numbers that the operands stand for."""
    if recipe == "blockwise" and (grad is E5M2 or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("torch has no such product")
    number, k, m = sizes  # blocks in rows of 3 and 5 have padded scales
    x, w, g = (t.cuda() for t in (random(number, k), random(m, k, seed=1), random(number, m, seed=2)))
    qx, qg = (fp8_values.quantise(v, kind, recipe) for v, kind in ((x, E4M3), (g, grad)))
    qw = fp8_values.quantise(w, E4M3, recipe, weight=True)
    for a, b in ((qx.rows, qw.rows), (qg.rows, qw.columns), (qg.columns, qx.columns)):
        exact = a.whole().double() @ b.whole().double().t()
        for fast, tolerance in ((False, 4e-3), (True, 2e-2)):
            mine = product(a, b, fast=fast).double()
            assert mine.shape == exact.shape and (mine - exact).norm() <= tolerance * exact.norm()
