"""Gradients of micro-batches added up: nothing is rounded to 16 bits on the way."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.kernels.accumulate import accumulate


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_the_sum_is_wider_than_its_parts(narrow, wide):
    one, tiny = torch.ones(3, 5, dtype=narrow), torch.full((3, 5), 2.0**-12, dtype=narrow)
    total = accumulate(one, tiny, wide)
    assert total.dtype is wide and (total == 1 + 2.0**-12).all() and (one == 1).all()
    again = accumulate(total, tiny.t().contiguous().t(), wide)
    assert again is total and (again == 1 + 2.0**-11).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs CUDA")
def test_the_same_on_a_gpu():
    one, tiny = torch.ones(300, 7, dtype=torch.bfloat16), torch.full((300, 7), 2.0**-12, dtype=torch.bfloat16)
    for second in (tiny.cuda(), tiny.t().contiguous().t().cuda()):
        assert torch.equal(accumulate(one.cuda(), second, torch.float32).cpu(), accumulate(one, tiny, torch.float32))
