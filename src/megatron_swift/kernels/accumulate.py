"""A gradient added to those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_swift.kernels.triton_runs import triton_takes


def accumulate(before: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """before + grad in `dtype`, the sum being rounded to nothing narrower. Into `before` where that is of this type already.

    Two 16-bit gradients make a float32 one in one pass on a GPU, 8 bytes a value; torch's operators need 16.
    """
    if dtype is torch.float32 and triton_takes(grad) and before.is_contiguous() and grad.is_contiguous():
        from megatron_swift.kernels.fused.sums import add_wider

        return add_wider(before, grad)
    return before.to(dtype).add_(grad)
