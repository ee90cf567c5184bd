"""The Triton kernels against their plain twins in float64: float32 and bfloat16, forward and backward. They need a GPU, or Triton's
interpreter (`TRITON_INTERPRET=1` in an environment with Triton), which shares every line with them but the compiler."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from megatron_swift.kernels import layers
from megatron_swift.kernels.adamw import AdamScalars, Updated, plain_adamw
from megatron_swift.kernels.attention import Segments, plain_attention
from megatron_swift.kernels.cross_entropy import VocabularyShard, chunked_linear_cross_entropy, linear_cross_entropy
from megatron_swift.kernels.dense_attention import dense_attention, is_even
from megatron_swift.kernels.later import Later

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
# The interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2 if INTERPRETED else 6e-3}
both_types = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(function, tensors):
    """Outputs, then gradients of all tensors for random gradients of the outputs."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [values(*out.shape, seed=99 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, tensors, grads)]


def check(plain, fused, tensors, dtype, tolerance=None):
    """The fused form in `dtype` against the plain one in float64 on the same (rounded) values."""
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    rounded = [t.to(dtype) for t in tensors]
    for mine, exact in zip(run(fused, rounded), run(plain, [t.double() for t in rounded]), strict=True):
        assert mine.shape == exact.shape and mine.dtype in (dtype, torch.float32)
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()


@needs_triton
@both_types
@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 128), (0, 24), (3, 1536)])
def test_norm(dtype, shape):
    from megatron_swift.kernels.fused.norm import fused_norm

    tensors = [values(*shape), values(shape[-1], seed=1)]
    check(lambda x, w: layers.rms_norm(x, w, 1e-6), lambda x, w: fused_norm(x, w, 1e-6), tensors, dtype)


@needs_triton
@both_types
@pytest.mark.parametrize("bias", [True, False])
def test_norm_linear(dtype, bias):
    from megatron_swift.kernels.fused.norm import fused_norm_linear

    tensors = [values(9, 24), values(24, seed=1), values(16, 24, seed=2), *([values(16, seed=3)] if bias else [])]

    def with_bias(function):
        return lambda x, n, w, b=None: function(x, n, w, b, 1e-6)

    check(with_bias(layers.norm_linear), with_bias(fused_norm_linear), tensors, dtype)


@needs_triton
@both_types
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    from megatron_swift.kernels.fused.linear import fused_linear

    tensors = [values(9, 24), values(16, 24, seed=2), *([values(16, seed=3)] if bias else [])]
    check(torch.nn.functional.linear, fused_linear, tensors, dtype)


@needs_triton
@pytest.mark.parametrize("recomputed", [False, True])
def test_where_weights_gradients_are_formed(recomputed):
    """All linear layers hand them on, but those whose input recomputation must find kept."""
    asked = []

    class Noted(Later):
        def run(self, work, *reads):
            asked.append(len(reads))
            return work()

    kernels = layers._triton_kernels((), recomputed=recomputed, later=Noted())
    x, norm, weight = (values(*shape).float().requires_grad_() for shape in ((6, 8), (8,), (16, 8)))
    total, y = kernels.add_norm_linear(x, x, norm, weight, None, 1e-6)
    z = kernels.norm_linear(total, norm, weight, None, 1e-6) + y
    out = kernels.swiglu_linear(z, weight[:8]) + kernels.linear(x, weight[8:])
    out.sum().backward()
    assert len(asked) == (2 if recomputed else 4)


@needs_triton
def test_a_repeated_mlp_leaves_its_last_product_out():
    """Recomputation stops at the input of linear_fc2; without that form the product of linear_fc2 would be computed once more."""
    x, norm, first, second = (values(*shape).float().requires_grad_() for shape in ((6, 8), (8,), (16, 8), (8, 8)))

    def flops(*, recomputed, repeat):
        kernels = layers._triton_kernels((), recomputed=recomputed)

        def mlp(x):
            return kernels.swiglu_linear(kernels.norm_linear(x, norm, first, None, 1e-6), second)

        with FlopCounterMode(display=False) as counter:
            (checkpoint(mlp, x, use_reentrant=False) if repeat else mlp(x)).sum().backward()
        return counter.get_total_flops()

    once, fc1, fc2 = flops(recomputed=True, repeat=False), 2 * 6 * 8 * 16, 2 * 6 * 8 * 8
    assert once == flops(recomputed=False, repeat=False) == 3 * (fc1 + fc2)
    assert flops(recomputed=True, repeat=True) == once + fc1
    assert flops(recomputed=False, repeat=True) == once + fc1 + fc2


@needs_triton
@both_types
@pytest.mark.parametrize("shape", [(7, 24), (0, 24), (3, 1536)])
def test_add_norm(dtype, shape):
    """The sum is an output as well: what reaches it past the norm is a part of both gradients."""
    from megatron_swift.kernels.fused.norm import fused_add_norm, fused_add_norm_linear

    tensors = [values(*shape), values(*shape, seed=4), values(shape[-1], seed=1)]
    check(lambda x, y, w: layers.add_norm(x, y, w, 1e-6), lambda x, y, w: fused_add_norm(x, y, w, 1e-6), tensors, dtype)
    tensors += [values(16, shape[-1], seed=2), values(16, seed=3)]
    check(
        lambda x, y, n, w, b: layers.add_norm_linear(x, y, n, w, b, 1e-6),
        lambda x, y, n, w, b: fused_add_norm_linear(x, y, n, w, b, 1e-6),
        tensors,
        dtype,
    )


@needs_triton
@both_types
def test_swiglu(dtype):
    from megatron_swift.kernels.fused.swiglu import fused_swiglu, fused_swiglu_linear

    check(layers.swiglu, fused_swiglu, [values(5, 2 * 1100)], dtype)
    check(layers.swiglu_linear, fused_swiglu_linear, [values(5, 2 * 40), values(16, 40, seed=1)], dtype)


@needs_triton
@both_types
@pytest.mark.parametrize("shape", [(5, 2100), (3, 40), (0, 8)])
def test_weighted_swiglu_backward(dtype, shape):
    from megatron_swift.kernels.expert_mlp import plain_weighted_swiglu_backward
    from megatron_swift.kernels.fused.swiglu import weighted_swiglu_backward

    rounded = [
        values(shape[0], 2 * shape[1]).to(dtype),
        values(*shape, seed=1).to(dtype),
        values(shape[0], seed=2).float(),
    ]
    exact = plain_weighted_swiglu_backward(*(t.double() for t in rounded))
    for mine, right in zip(weighted_swiglu_backward(*rounded), exact, strict=True):
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= TOLERANCE[dtype] * right.norm()


@needs_triton
@both_types
@pytest.mark.parametrize(("groups", "heads", "dim"), [(2, 3, 12), (3, 1, 8), (1, 4, 128)])
def test_split_rotate(dtype, groups, heads, dim):
    from megatron_swift.kernels.fused.rope import fused_split_rotate

    angles = values(6, 1, dim // 2, seed=5).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    check(
        lambda x: layers.split_rotate(x, cos.to(x.dtype), sin.to(x.dtype)),
        lambda x: fused_split_rotate(x, cos, sin),
        [values(6, groups, heads + 2, dim)],
        dtype,
    )


@needs_triton
@both_types
@pytest.mark.parametrize("chunk", [100, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy(dtype, chunk, weighted):
    """A rank's rows end before the matrix does in the second half; the loss is of the one rank there is."""
    from megatron_swift.kernels.fused.cross_entropy import fused_softmax

    targets = torch.arange(7, device=DEVICE) * 3 % 33
    scale = values(7, seed=7).abs().float() if weighted else torch.tensor(0.3, device=DEVICE)
    tensors = [values(7, 24) / 4, values(37, 24, seed=1)]

    def fused(shard):
        return lambda h, w: chunked_linear_cross_entropy(
            h, w, targets, scale, chunk_tokens=chunk, shard=shard, softmax=fused_softmax
        )

    # bfloat16 logits have errors of 2^-9 of their own size, and the loss depends on them exponentially.
    check(lambda h, w: linear_cross_entropy(h, w, targets, scale.double()), fused(None), tensors, dtype)
    shard = VocabularyShard(0, 33, lambda x: x, lambda x: x)
    check(
        lambda h, w: chunked_linear_cross_entropy(h, w, targets, scale.double(), shard=shard),
        fused(shard),
        tensors,
        dtype,
    )


@needs_triton
@both_types
def test_combine(dtype):
    """Two of the twelve choices are dropped: their index is the number of rows."""
    from megatron_swift.kernels.fused.combine import fused_combine, gather_sum

    back = torch.tensor([3, 0, 10, 5, 1, 8, 2, 9, 4, 10, 6, 7], device=DEVICE)
    probs = values(4, 3, seed=1).abs()

    def plain(y, p):
        rows = torch.cat([y, y.new_zeros(1, y.shape[1])])[back].view(4, 3, -1)
        return (rows * p[..., None]).sum(1)

    check(plain, lambda y, p: fused_combine(y, back, p), [values(10, 20), probs], dtype)
    y = values(10, 20).to(dtype)
    torch.testing.assert_close(
        gather_sum(y, back, None, k=3).double(), plain(y.double(), torch.ones_like(probs)), rtol=0.02, atol=0.02
    )


@needs_triton
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copied", [True, False])
def test_adamw(grad_dtype, copied):
    from megatron_swift.kernels.fused.adamw import fused_adamw

    def tensors():
        copy = torch.empty(50, 77, dtype=torch.bfloat16, device=DEVICE) if copied else None
        master, grad, first, second = (values(50, 77, seed=i).float() for i in range(4))
        return Updated(master, grad.to(grad_dtype), first, second.abs(), copy, 0.1)

    one, other = tensors(), tensors()
    scalars = AdamScalars(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, step=3, scale=0.25)
    plain_adamw([one], scalars)
    fused_adamw([other], scalars)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=2e-6, atol=1e-7)
    if copied:
        torch.testing.assert_close(other.copy, one.copy, rtol=2**-7, atol=0)


@needs_triton
@pytest.mark.parametrize("scale", [0.25, float("nan")])
def test_adamw_scaled_on_the_device(scale):
    """As by the number; NaN leaves weights, moments and copy as they were."""
    from megatron_swift.kernels.fused.adamw import fused_adamw

    def one() -> Updated:
        tensors = [values(3000, seed=i).float() for i in range(3)]
        return Updated(
            tensors[0], values(3000, seed=5).bfloat16(), tensors[1], tensors[2].abs(), tensors[0].bfloat16(), 0.1
        )

    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step": 3}
    by_number, by_tensor = one(), one()
    if scale == scale:
        fused_adamw([by_number], AdamScalars(**rates, scale=scale))
    fused_adamw([by_tensor], AdamScalars(**rates, scale=torch.tensor(scale, device=DEVICE)))
    for name in ("master", "exp_avg", "exp_avg_sq", "copy"):
        assert torch.equal(getattr(by_tensor, name), getattr(by_number, name)), name


def test_plain_adamw_takes_16_bit_gradients():
    """As if they had been widened before, and the copy is the new master rounded."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        master, grad, first = (torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
        one = Updated(master, grad.bfloat16().to(dtype), first, first.square(), torch.empty(3, 5).bfloat16(), 0.1)
        plain_adamw([one], AdamScalars(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=2, scale=0.5))
        made.append(one)
        assert torch.equal(one.copy, one.master.bfloat16())
    assert torch.equal(made[0].master, made[1].master) and torch.equal(made[0].exp_avg, made[1].exp_avg)


def test_a_dense_batch_is_attention_within_segments():
    """On a CPU torch takes one of its other kernels; the cutting is the same."""
    lengths = (128, 128, 128)
    q, k, v = (torch.randn(384, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    segments = Segments.of(lengths, torch.device("cpu"))
    expected = run(lambda *x: plain_attention(*x, segments), (q, k, v)) if DEVICE == "cpu" else None
    mine = dense_attention(q, k, v, lengths)
    torch.testing.assert_close(mine, plain_attention(q, k, v, segments), rtol=1e-12, atol=1e-12)
    if expected is not None:
        for found, right in zip(run(lambda *x: dense_attention(*x, lengths), (q, k, v)), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert is_even(lengths) and is_even((256,)) and not is_even((128, 256)) and not is_even((100, 100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "groups"), [(12, 2), (16, 16)])
def test_dense_attention_on_a_gpu(heads, groups):
    segments = Segments.of((256,) * 3, torch.device("cuda"))
    tensors = [values(768, n, 128, seed=seed) for seed, n in enumerate((heads, groups, groups))]
    check(
        lambda *x: plain_attention(*x, segments),
        lambda *x: dense_attention(*x, segments.lengths),
        tensors,
        torch.bfloat16,
    )


def test_what_stays_torchs_own(monkeypatch):
    """The sentence for the banner; what a machine without a GPU says beats all."""
    ask = {"dtype": torch.bfloat16, "recomputed": False}
    assert layers.choose_layer_kernels((), device=torch.device("cpu"), **ask)[0] is layers.PLAIN
    everything = tuple(layers.NAMES)
    kernels, said = layers.choose_layer_kernels(everything, device=torch.device("cuda"), **ask)
    assert kernels is layers.PLAIN and said == "torch's own operators (asked for)"
    monkeypatch.setattr(layers, "why_no_triton", lambda device: "")
    monkeypatch.setattr(layers, "_triton_kernels", lambda unfused, **_: unfused)
    _, said = layers.choose_layer_kernels((), device=torch.device("cuda"), **ask)
    assert said == "Triton: RMSNorm, rotary embedding and SwiGLU in one pass each"
    _, said = layers.choose_layer_kernels((), used={"norm", "swiglu"}, device=torch.device("cuda"), **ask)
    assert said == "Triton: RMSNorm and SwiGLU in one pass each"
    _, said = layers.choose_layer_kernels((), used=(), device=torch.device("cuda"), **ask)
    assert said == "torch's own operators (the model has none of what there are Triton kernels for)"
    _, said = layers.choose_layer_kernels(("rope",), device=torch.device("cuda"), **ask)
    assert said == "Triton: RMSNorm and SwiGLU in one pass each; torch's own operators for rotary embedding (asked for)"


@needs_triton
@pytest.mark.parametrize("recomputed", [False, True])
def test_which_kernels_are_fused(recomputed):
    names = {
        "norm": ("norm", "norm_linear", "add_norm", "add_norm_linear"),
        "rope": ("split_rotate",),  # split_norm_rotate is of both: test_norm_rope.py
        "swiglu": ("swiglu", "swiglu_linear"),
    }
    for off in names:
        kernels = layers._triton_kernels((off,), recomputed=recomputed)
        for name, fields in names.items():
            for field in fields:
                assert (getattr(kernels, field) is getattr(layers.PLAIN, field)) == (name == off), (off, field)


@needs_triton
@pytest.mark.parametrize("number", [0, 5, 2048, 5000])
def test_sum_of_gradients(number):
    from megatron_swift.kernels.fused.sums import add_wider

    first, second = (values(number, seed=n).to(torch.bfloat16) for n in (1, 2))
    exact = first.float() + second.float()
    total = add_wider(first, second)
    assert total.dtype is torch.float32 and torch.equal(total, exact)
    again = add_wider(total, second)
    assert again is total and torch.equal(again, exact + second.float())


@needs_triton
@both_types
@pytest.mark.parametrize("shape", [(0, 5), (1, 16), (3, 24), (300, 128), (1024, 40), (1100, 17), (3000, 33)])
def test_sum_of_rows(dtype, shape):
    """In one launch, and in two where there are many rows."""
    from megatron_swift.kernels.fused.sums import column_sums

    x = values(*shape).to(dtype)
    got, exact = column_sums(x, dtype), x.double().sum(0)
    assert got.shape == exact.shape and got.dtype is dtype
    assert (got.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
