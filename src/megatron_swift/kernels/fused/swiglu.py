"""SwiGLU in one pass, and with the linear layer it feeds: the product is formed again in the backward pass, where it costs a write."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.fused.fp8 import SLOTS, magnitude
from megatron_swift.kernels.fused.linear import parameter_grads
from megatron_swift.kernels.later import AT_ONCE, Later

_BLOCK = 1024


@triton.jit
def _forward(gate_up, y, amax, columns, AMAX: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = gate_up + row * 2 * columns + column
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + columns, inside, 0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)  # rounded as the plain form does
    out = (activated * up).to(y.dtype.element_ty)
    tl.store(y + row * columns + column, out, inside)
    if AMAX:
        tl.atomic_max(amax + tl.program_id(0) % SLOTS, tl.max(magnitude(out), 0), sem="relaxed")


@triton.jit
def _backward(  # type: ignore[no-untyped-def]  # Triton compiles it
    gate_up,
    grad,
    d_gate_up,
    again,
    amax,
    columns,
    AGAIN: tl.constexpr,
    AMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    pair = row * 2 * columns + column
    gate = tl.load(gate_up + pair, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + pair + columns, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * columns + column, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    activated = (gate * share).to(grad.dtype.element_ty).to(tl.float32)
    d_gate = (g * up * share * (1.0 + gate * (1.0 - share))).to(grad.dtype.element_ty)
    d_up = (g * activated).to(grad.dtype.element_ty)
    tl.store(d_gate_up + pair, d_gate, inside)
    tl.store(d_gate_up + pair + columns, d_up, inside)
    if AGAIN:
        tl.store(again + row * columns + column, (activated * up).to(grad.dtype.element_ty), inside)
    if AMAX:
        largest = tl.max(tl.maximum(magnitude(d_gate), magnitude(d_up)), 0)
        tl.atomic_max(amax + tl.program_id(0) % SLOTS, largest, sem="relaxed")


@triton.jit
def _weighted_backward(  # type: ignore[no-untyped-def]  # Triton compiles it
    gate_up, grad, weight, d_gate_up, product, d_weight, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        pair = row * 2 * columns + column
        gate = tl.load(gate_up + pair, inside, 0.0).to(tl.float32)
        up = tl.load(gate_up + pair + columns, inside, 0.0).to(tl.float32)
        g = tl.load(grad + row * columns + column, inside, 0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        activated = gate * share
        total += g * activated * up
        weighted = g * w
        d_gate = weighted * up * share * (1.0 + gate * (1.0 - share))
        tl.store(d_gate_up + pair, d_gate.to(grad.dtype.element_ty), inside)
        tl.store(d_gate_up + pair + columns, (weighted * activated).to(grad.dtype.element_ty), inside)
        tl.store(product + row * columns + column, (activated * up * w).to(grad.dtype.element_ty), inside)
    tl.store(d_weight + row, tl.sum(total, 0))


def swiglu_forward(gate_up: Tensor, *, amax: Tensor | None = None) -> Tensor:
    """[N, 2F] contiguous -> silu(first half) * second half [N, F].

    amax, here and below: `fused.fp8.amax_slots`, where the largest value of the result shall be left.
    """
    number, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(number, columns)
    if number:
        _forward[(number, triton.cdiv(columns, _BLOCK))](
            gate_up, y, y if amax is None else amax, columns, AMAX=amax is not None, SLOTS=SLOTS, BLOCK=_BLOCK
        )
    return y


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, *, again: bool, amax: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of gate_up, the product once more if `again`)."""
    number, columns = grad.shape
    d_gate_up = torch.empty_like(gate_up)
    product = torch.empty_like(grad) if again else None
    if number:
        _backward[(number, triton.cdiv(columns, _BLOCK))](
            gate_up,
            grad,
            d_gate_up,
            grad if product is None else product,
            grad if amax is None else amax,
            columns,
            AGAIN=again,
            AMAX=amax is not None,
            SLOTS=SLOTS,
            BLOCK=_BLOCK,
        )
    return d_gate_up, product


def weighted_swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_weighted_swiglu_backward`, all contiguous; the weight's gradient in float32."""
    number, columns = grad.shape
    d_gate_up, product = torch.empty_like(gate_up), torch.empty_like(grad)
    d_weight = torch.empty(number, dtype=torch.float32, device=grad.device)
    if number:
        block = min(triton.next_power_of_2(columns), 2048)
        _weighted_backward[(number,)](gate_up, grad, weight, d_gate_up, product, d_weight, columns, BLOCK=block)
    return d_gate_up, product, d_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up, grad.contiguous(), again=False)[0]


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, later: Later) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, weight)
        ctx.later = later
        return F.linear(swiglu_forward(gate_up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate_up, weight = ctx.saved_tensors
        d_gate_up, product = swiglu_backward(gate_up, grad @ weight, again=True)
        assert product is not None
        return d_gate_up, parameter_grads(grad, product, ctx.later, with_bias=False)[0], None


def fused_swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu` for float32 and 16-bit types."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return]


def fused_swiglu_linear(gate_up: Tensor, weight: Tensor, later: Later = AT_ONCE) -> Tensor:
    """linear(swiglu(gate_up)), gate_up [N, 2F], keeping gate_up alone for the backward pass."""
    return _SwiGLULinear.apply(gate_up, weight, later)  # type: ignore[no-any-return]
