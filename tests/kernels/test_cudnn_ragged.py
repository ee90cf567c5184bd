"""cuDNN's ragged attention against the plain form in float64. It needs a Hopper GPU and nvidia-cudnn-frontend."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_swift.kernels import cudnn_ragged
from megatron_swift.kernels.attention import Segments, plain_attention

needs_cudnn = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < (9, 0)
    or importlib.util.find_spec("cudnn") is None,
    reason="needs a Hopper GPU and nvidia-cudnn-frontend",
)


@needs_cudnn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(12, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("lengths", [(1, 17, 300, 512, 999, 128), (2048,), (3,) * 70])
def test_against_float64(lengths, heads, groups, dim, dtype):
    """Output and gradients; every value is written, other segments are not seen, and the plan of one row serves another."""
    cuda = torch.device("cuda")
    rng = torch.Generator().manual_seed(0)
    for row in (lengths, tuple(reversed(lengths))):
        segments = Segments.of(row, cuda)
        tensors = [torch.randn(sum(row), n, dim, generator=rng).to(cuda, dtype) for n in (heads, groups, groups)]
        upstream = torch.randn(sum(row), heads, dim, generator=rng).to(cuda, dtype)
        mine, exact = ([t.to(kind).requires_grad_() for t in tensors] for kind in (dtype, torch.float64))
        out = cudnn_ragged.ragged_attention(*mine, ends=segments.cumulative, longest=segments.longest)
        expected = plain_attention(*exact, segments)
        found = [out, *torch.autograd.grad(out, mine, upstream)]
        for value, right in zip(
            found, [expected, *torch.autograd.grad(expected, exact, upstream.double())], strict=True
        ):
            assert value.dtype == dtype
            assert (value.double() - right).norm() <= 6e-3 * right.norm()


def test_sizes_share_plans():
    """Rounded to powers of two, so that rows of all kinds need few."""
    assert [cudnn_ragged._grain(n, 64) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]


def test_what_it_takes():
    assert cudnn_ragged.takes(torch.empty(4, 2, 128)) and cudnn_ragged.takes(torch.empty(4, 2, 64))
    assert not cudnn_ragged.takes(torch.empty(4, 2, 96))
    assert not cudnn_ragged.takes(torch.empty(2**24, 1, 128, device="meta"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cudnn_ragged.why_no_frontend() == "the package nvidia-cudnn-frontend is not installed"
