"""Attention over packed rows: the plain kernel against the one written out, segment by segment."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_swift.kernels import attention
from megatron_swift.kernels.attention import Segments, choose_attention, plain_attention, unfused_attention

CPU = torch.device("cpu")
LENGTHS = (1, 17, 1, 40, 5)


def inputs(heads: int, groups: int, dtype: torch.dtype, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, 8) for n in (heads, groups, groups)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def run(core, tensors, lengths=LENGTHS, grad=None):
    """Output, and the gradients of q, k and v for a fixed cotangent."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = core(*leaves, Segments.of(lengths, CPU))
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_definition(q, k, v, lengths):
    """Query by query in float64, sharing nothing with the kernels."""
    out = torch.zeros_like(q)
    starts = [0, *itertools.accumulate(lengths)]
    for start, length in zip(starts, lengths, strict=False):
        for t, head in itertools.product(range(start, start + length), range(q.shape[1])):
            group = head // (q.shape[1] // k.shape[1])
            weights = (k[start : t + 1, group] @ q[t, head] / q.shape[2] ** 0.5).softmax(0)
            out[t, head] = weights @ v[start : t + 1, group]
    return out


@pytest.mark.parametrize("core", [plain_attention, unfused_attention])
def test_by_definition(core):
    q, k, v = inputs(4, 2, torch.float64, (1, 6, 3))
    expected = by_definition(q, k, v, (1, 6, 3))
    torch.testing.assert_close(core(q, k, v, Segments.of((1, 6, 3), CPU)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_plain_equals_unfused(heads, groups, dtype, tolerance):
    tensors = inputs(heads, groups, dtype)
    for mine, expected in zip(run(plain_attention, tensors), run(unfused_attention, tensors), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "core", [plain_attention, unfused_attention, lambda *x: unfused_attention(*x, softmax_in_fp32=False)]
)
def test_16_bit_is_close(core, dtype):
    tensors = inputs(4, 2, dtype)
    expected = run(unfused_attention, [t.double() for t in tensors])
    for mine, exact in zip(run(core, tensors), expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("core", [plain_attention, unfused_attention])
def test_a_segment_does_not_see_another(core):
    """Changing one segment leaves every other bit for bit, also in the gradients."""
    tensors = inputs(4, 2, torch.float32)
    before, changed = run(core, tensors), [t.clone() for t in tensors]
    for tensor in changed:
        tensor[18:19] = 9.0  # the segment of one token in the middle
        tensor[59:] = -3.0  # the last one
    for first, second in zip(before, run(core, changed), strict=True):
        kept = torch.ones(len(first), dtype=torch.bool)
        kept[18:19] = kept[59:] = False
        assert torch.equal(first[kept], second[kept]) and not torch.equal(first, second)


def test_segments():
    segments = Segments.of([3, 1, 4], CPU)
    assert segments.lengths == (3, 1, 4) and segments.longest == 4
    assert segments.cumulative.tolist() == [0, 3, 4, 8] and segments.cumulative.dtype == torch.int32


@pytest.mark.parametrize("backend", ["auto", "fused", "unfused", "local"])
def test_choice_on_cpu(backend):
    choice = choose_attention(backend, device=CPU, dtype=torch.bfloat16)
    assert choice.reason and (choice.core is plain_attention) == (backend in ("auto", "fused"))


def test_choice_passes_on_the_softmax_precision():
    """The CPU's own softmax of bfloat16 computes in float32, so the outputs do not tell."""
    choice = choose_attention("unfused", device=CPU, dtype=torch.bfloat16, softmax_in_fp32=False)
    assert choice.core.keywords == {"softmax_in_fp32": False}


class KernelsAllowed(TorchFunctionMode):
    """Notes at each scaled_dot_product_attention whether it may pick cuDNN and flash."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return function(*args, **(kwargs or {}))


def test_fused_never_picks_cudnn():
    """It would build a plan for every length of segment; nothing is left switched off for the rest of the program."""
    core = choose_attention("fused", device=torch.device("cuda"), dtype=torch.bfloat16).core
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with KernelsAllowed() as allowed:
        run(core, inputs(4, 2, torch.float32))
    assert allowed.seen == [(False, True)] * len(LENGTHS)
    assert before and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_flash_where_it_cannot_run(device, dtype):
    with pytest.raises(ValueError, match=f"not {device} and {str(dtype)[6:]}"):
        choose_attention("flash", device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("head_dim", [6, 12, 264])
def test_heads_that_flash_does_not_take(head_dim):
    """Seen on an H100: head_size must be a multiple of 8."""
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": head_dim}
    assert choose_attention("auto", **settings).core is plain_attention
    with pytest.raises(ValueError, match=f"and {head_dim}$"):
        choose_attention("flash", **settings)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_cudnn_where_it_cannot_run(device, dtype):
    with pytest.raises(ValueError, match="a CUDA device and a 16-bit type"):
        choose_attention("cudnn", device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(("missing", "core"), [("", "cudnn_attention"), ("it is not there", "even_or_flash_attention")])
def test_what_auto_takes_on_hopper(monkeypatch, missing, core):
    """A missing package is named, and an explicit request for it refused."""
    monkeypatch.setattr(attention, "cudnn_is_fastest", lambda device: True)
    monkeypatch.setattr(attention, "why_no_frontend", lambda: missing)
    cuda = torch.device("cuda")
    choice = choose_attention("auto", device=cuda, dtype=torch.bfloat16)
    assert choice.core is getattr(attention, core) and missing in choice.reason
    with pytest.raises(ValueError, match="64 or 128 dimensions, not 96"):
        choose_attention("cudnn", device=cuda, dtype=torch.bfloat16, head_dim=96)
    if missing:
        with pytest.raises(ValueError, match=missing):
            choose_attention("cudnn", device=cuda, dtype=torch.bfloat16)
    else:
        assert choose_attention("cudnn", device=cuda, dtype=torch.bfloat16) == choice


@pytest.mark.parametrize(
    ("lengths", "dim", "deterministic", "kernel"),
    [
        ((256, 256), 128, False, "dense_attention"),
        ((1024, 17), 128, False, "ragged_attention"),
        ((1024, 17), 96, False, "flash_attention"),
        ((1024, 17), 128, True, "flash_attention"),
        ((1023, 17), 128, False, "flash_attention"),
    ],
)
def test_which_rows_cudnn_gets(monkeypatch, lengths, dim, deterministic, kernel):
    taken = []
    for name in ("dense_attention", "ragged_attention", "flash_attention"):
        monkeypatch.setattr(attention, name, lambda *_, name=name, **__: taken.append(name))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q = torch.empty(sum(lengths), 2, dim)
    attention.cudnn_attention(q, q, q, Segments.of(lengths, CPU))
    assert taken == [kernel]


@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_flash_is_chosen_on_cuda(backend):
    choice = choose_attention(backend, device=torch.device("cuda"), dtype=torch.float16)
    assert choice.core not in (plain_attention, unfused_attention) and "Flash" in choice.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_is_close(dtype):
    choice = choose_attention("flash", device=torch.device("cuda"), dtype=dtype)
    tensors = [t.repeat(1, 1, 8).cuda() for t in inputs(4, 2, dtype)]

    def on_cuda(q, k, v, _):
        return choice.core(q, k, v, Segments.of(LENGTHS, torch.device("cuda")))

    leaves = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    out, expected = on_cuda(*leaves, None), unfused_attention(*exact, Segments.of(LENGTHS, torch.device("cuda")))
    grads = torch.autograd.grad(out.double().square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for mine, right in zip([out, *grads], [expected, *wanted], strict=True):
        assert (mine.double() - right).norm() < 4 * torch.finfo(dtype).eps * right.norm()
