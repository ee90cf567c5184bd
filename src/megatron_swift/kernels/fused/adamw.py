"""AdamW in one pass over memory: 16 bytes of state and gradient in, 14 out, for each parameter of a bfloat16 model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from megatron_swift.kernels.adamw import AdamScalars, Updated

_BLOCK = 2048


@triton.jit
def _update(  # type: ignore[no-untyped-def]  # Triton compiles it
    master,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    number,
    scale,
    keep,
    rate,
    beta1,
    beta2,
    root_correction,
    eps,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    inside = at < tl.where(factor == factor, number, 0)  # NaN: a step that is left out
    g = tl.load(grad + at, inside, 0.0).to(tl.float32) * factor
    m = tl.load(exp_avg + at, inside, 0.0)
    v = tl.load(exp_avg_sq + at, inside, 0.0)
    p = tl.load(master + at, inside, 0.0)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * keep - rate * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    tl.store(master + at, p, inside)
    if HAS_COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), inside)


def fused_adamw(tensors: Iterable[Updated], scalars: AdamScalars) -> None:
    """`kernels.adamw.plain_adamw` for float32 masters on a GPU; gradients of any floating type, read once and left alone."""
    scale = scalars.scale
    for one in tensors:
        if not isinstance(scale, torch.Tensor):
            scale = torch.full((), scale, dtype=torch.float32, device=one.master.device)
        grad = one.grad if one.grad.stride() == one.master.stride() else one.grad.contiguous()
        number = one.master.numel()
        copy = one.master if one.copy is None else one.copy
        _update[(triton.cdiv(number, _BLOCK),)](
            one.master,
            grad,
            one.exp_avg,
            one.exp_avg_sq,
            copy,
            number,
            scale,
            1.0 - scalars.lr * one.weight_decay,
            scalars.lr / scalars.correction1,
            scalars.beta1,
            scalars.beta2,
            scalars.correction2**0.5,
            scalars.eps,
            HAS_COPY=one.copy is not None,
            BLOCK=_BLOCK,
        )
