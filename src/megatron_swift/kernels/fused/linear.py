"""A linear layer whose weight's and bias's gradients are formed beside the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.fused.sums import column_sums
from megatron_swift.kernels.later import AT_ONCE, Later


def parameter_grads(grad: Tensor, x: Tensor, later: Later, *, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight and of the bias, from that of the layer's output [N, C] and its input x [N, K]."""

    def work() -> tuple[Tensor, Tensor | None]:
        return grad.t() @ x, column_sums(grad.contiguous(), grad.dtype) if with_bias else None

    return later.run(work, grad, x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Later) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias, ctx.later = bias is not None, later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        return dx, *parameter_grads(grad, x, ctx.later, with_bias=ctx.with_bias), None


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, later: Later = AT_ONCE) -> Tensor:
    """torch.nn.functional.linear of x [N, K]."""
    return _Linear.apply(x, weight, bias, later)  # type: ignore[no-any-return]
