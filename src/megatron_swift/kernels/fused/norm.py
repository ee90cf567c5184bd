"""RMSNorm in one pass, and with the linear layer it feeds: the normalised rows are formed again in the backward pass, where they cost a write."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.fused.fp8 import SLOTS, magnitude
from megatron_swift.kernels.fused.linear import parameter_grads
from megatron_swift.kernels.fused.sums import column_sums
from megatron_swift.kernels.later import AT_ONCE, Later

_PROGRAMS_PER_PROCESSOR = 4  # of the backward pass: each keeps a row of the weight's gradient in registers


@triton.jit
def _forward(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    added,
    total,
    weight,
    y,
    rstd,
    amax,
    rows,
    columns,
    epsilon,
    ADD: tl.constexpr,
    AMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        whole = (v + tl.load(added + at, inside, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, whole, inside)
        v = whole.to(tl.float32)  # the norm is of the rounded sum, as in the plain form
    r = tl.rsqrt(tl.sum(v * v, 1) / columns + epsilon)
    w = tl.load(weight + column, column < columns, 0.0).to(tl.float32)
    # Rounded before the product with the weight, as the plain form does it.
    scaled = (v * r[:, None]).to(y.dtype.element_ty).to(tl.float32)
    out = (scaled * w[None, :]).to(y.dtype.element_ty)
    tl.store(y + at, out, inside)
    tl.store(rstd + row, r, row < rows)
    if AMAX:
        tl.atomic_max(amax + tl.program_id(0) % SLOTS, tl.max(tl.max(magnitude(out), 1), 0), sem="relaxed")


@triton.jit
def _backward(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    weight,
    rstd,
    grad,
    beside,
    dx,
    partial,
    again,
    amax,
    rows,
    columns,
    tiles,
    ADD: tl.constexpr,
    AGAIN: tl.constexpr,
    AMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, column < columns, 0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for tile in range(program, tiles, programs):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * columns + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        r = tl.load(rstd + row, row < rows, 0.0)
        exact = tl.load(x + at, inside, 0.0).to(tl.float32) * r[:, None]
        scaled = exact.to(dx.dtype.element_ty).to(tl.float32)
        dw += tl.sum(g * scaled, 0)
        gw = g * w[None, :]
        mean = tl.sum(gw * exact, 1) / columns
        d = r[:, None] * (gw - exact * mean[:, None])
        if ADD:
            d += tl.load(beside + at, inside, 0.0).to(tl.float32)
        rounded = d.to(dx.dtype.element_ty)
        tl.store(dx + at, rounded, inside)
        if AMAX:
            largest = tl.maximum(largest, tl.max(magnitude(rounded), 0))
        if AGAIN:
            tl.store(again + at, (scaled * w[None, :]).to(dx.dtype.element_ty), inside)
    tl.store(partial + program.to(tl.int64) * columns + column, dw, column < columns)
    if AMAX:
        tl.atomic_max(amax + program % SLOTS, tl.max(largest, 0), sem="relaxed")


def _tile(columns: int) -> tuple[int, int, int]:
    """(rows of a tile, its width, warps): narrow rows (one attention head) go several at a time."""
    block = triton.next_power_of_2(columns)
    return max(1, 1024 // block), block, 4 if block <= 2048 else 8


def norm_forward(
    x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None, *, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., H] contiguous -> (x + added, or x itself; the RMSNorm of that; 1 / its root mean square, float32 [number of rows]).

    amax : `fused.fp8.amax_slots`, where the largest value of the norm shall be left.
    """
    columns = x.shape[-1]
    number = x.numel() // columns
    y, rstd = torch.empty_like(x), torch.empty(number, dtype=torch.float32, device=x.device)
    total = x if added is None else torch.empty_like(x)
    rows, block, warps = _tile(columns)
    if number:
        _forward[(triton.cdiv(number, rows),)](
            x,
            x if added is None else added,
            total,
            weight,
            y,
            rstd,
            rstd if amax is None else amax,
            number,
            columns,
            epsilon,
            ADD=added is not None,
            AMAX=amax is not None,
            SLOTS=SLOTS,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
    return total, y, rstd


def norm_backward(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad: Tensor,
    *,
    again: bool,
    beside: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of x, gradient of the weight, the normalised rows once more if `again`).

    beside : what reaches x past the norm; the gradient of x is the sum.
    amax   : as in `norm_forward`, of the gradient of x.
    """
    columns = x.shape[-1]
    number = len(rstd)
    dx = torch.empty_like(x)
    normalised = torch.empty_like(x) if again else None
    rows, block, warps = _tile(columns)
    tiles = triton.cdiv(number, rows)
    programs = max(min(tiles, _PROGRAMS_PER_PROCESSOR * processors(x.device)), 1)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        x,
        weight,
        rstd,
        grad,
        grad if beside is None else beside,
        dx,
        partial,
        dx if normalised is None else normalised,
        dx if amax is None else amax,
        number,
        columns,
        tiles,
        ADD=beside is not None,
        AGAIN=again,
        AMAX=amax is not None,
        SLOTS=SLOTS,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return dx, column_sums(partial, weight.dtype), normalised


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 under the interpreter, so that programs share tiles there, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        _, y, rstd = norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        dx, dw, _ = norm_backward(x, weight, rstd, grad.contiguous(), again=False)
        return dx, dw, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, later: Later
    ) -> Tensor:
        x = x.contiguous()
        _, normalised, rstd = norm_forward(x, norm_weight, epsilon)
        ctx.save_for_backward(x, norm_weight, rstd, weight)
        ctx.with_bias, ctx.later = bias is not None, later
        return F.linear(normalised, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, norm_weight, rstd, weight = ctx.saved_tensors
        dx, dn, normalised = norm_backward(x, norm_weight, rstd, grad @ weight, again=True)
        assert normalised is not None
        return dx, dn, *parameter_grads(grad, normalised, ctx.later, with_bias=ctx.with_bias), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total, y, rstd = norm_forward(x.contiguous(), weight, epsilon, added.contiguous())
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    def backward(ctx: Any, beside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        total, weight, rstd = ctx.saved_tensors
        dx, dw, _ = norm_backward(total, weight, rstd, grad.contiguous(), again=False, beside=beside.contiguous())
        return dx, dx, dw, None


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        later: Later,
    ) -> tuple[Tensor, Tensor]:
        total, normalised, rstd = norm_forward(x.contiguous(), norm_weight, epsilon, added.contiguous())
        ctx.save_for_backward(total, norm_weight, rstd, weight)
        ctx.with_bias, ctx.later = bias is not None, later
        return total, F.linear(normalised, weight, bias)

    @staticmethod
    def backward(ctx: Any, beside: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, norm_weight, rstd, weight = ctx.saved_tensors
        dx, dn, normalised = norm_backward(
            total, norm_weight, rstd, grad @ weight, again=True, beside=beside.contiguous()
        )
        assert normalised is not None
        return dx, dx, dn, *parameter_grads(grad, normalised, ctx.later, with_bias=ctx.with_bias), None, None


def fused_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` for float32 and 16-bit types."""
    return _Norm.apply(x, weight, epsilon)  # type: ignore[no-any-return]


def fused_norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, later: Later = AT_ONCE
) -> Tensor:
    """linear(rms_norm(x)), x [T, H], keeping x alone for the backward pass."""
    return _NormLinear.apply(x, norm_weight, weight, bias, epsilon, later)  # type: ignore[no-any-return]


def fused_add_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_norm` in one pass, and its two gradients added up in one."""
    return _AddNorm.apply(x, added, weight, epsilon)  # type: ignore[no-any-return]


def fused_add_norm_linear(
    x: Tensor,
    added: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    later: Later = AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """`add_norm_linear`, keeping the sum alone for the backward pass."""
    return _AddNormLinear.apply(x, added, norm_weight, weight, bias, epsilon, later)  # type: ignore[no-any-return]
