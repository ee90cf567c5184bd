"""What lies between a layer's matrix products: RMSNorm, rotation, SwiGLU. Plain forms for every device, and the choice of Triton's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.later import AT_ONCE, STREAM_SAID, Later
from megatron_swift.kernels.triton_runs import why_no_triton

Norm = Callable[[Tensor, Tensor, float], Tensor]
SplitRotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dim, computed in float32 (float64 stays float64), as transformers does it."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """linear(rms_norm(x)), x [T, H]."""
    return F.linear(rms_norm(x, norm_weight, epsilon), weight, bias)


def add_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x + added, its RMSNorm): what a layer adds, and what the next one reads of the sum."""
    total = x + added
    return total, rms_norm(total, weight, epsilon)


def add_norm_linear(
    x: Tensor, added: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(x + added, linear(rms_norm(x + added))), x and added [T, H]."""
    total, normalised = add_norm(x, added, norm_weight, epsilon)
    return total, F.linear(normalised, weight, bias)


def swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2F] -> silu(first half) * second half [N, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """linear(swiglu(gate_up)), gate_up [N, 2F]."""
    return F.linear(swiglu(gate_up), weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the half-rotation form of rotary embedding to x [T, heads, d]; cos, sin [T, 1, d], their halves alike."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of the first dims of each head, as many as cos has; the others stay as they are."""
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    return torch.cat((rotate(turned, cos, sin), rest), dim=-1)


def no_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: positions enter elsewhere, or nowhere."""
    return x


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, groups, n + 2, d]: each group's n query heads, its key, its value -> q [T, groups * n, d], k, v [T, groups, d]."""
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
    return q.flatten(1, 2), k.squeeze(2), v.squeeze(2)


def split_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv`, with q and k rotated."""
    q, k, v = split_qkv(qkv)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def split_norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv`, with each head of q and of k normalised over its dims by `rms_norm`, then rotated. q_weight, k_weight [d]."""
    return _split_norm_rotate(rms_norm, qkv, q_weight, k_weight, epsilon, cos, sin)


def _split_norm_rotate(
    norm: Norm, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_qkv(qkv)
    return rotate(norm(q, q_weight, epsilon), cos, sin), rotate(norm(k, k_weight, epsilon), cos, sin), v


def _norm_split_rotate(
    split: SplitRotate, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_norm_rotate` by a fused cut and rotation, for which the normalised heads are put together again."""
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
    heads = torch.cat((rms_norm(q, q_weight, epsilon), rms_norm(k, k_weight, epsilon), v), dim=2)
    return split(heads, cos, sin)


@dataclass(frozen=True)
class LayerKernels:
    """The forms in use; each behaves as the plain function of its name, linear(x, weight, bias) as torch's."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    norm: Norm = rms_norm
    norm_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = norm_linear
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    add_norm_linear: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]] = (
        add_norm_linear
    )
    swiglu: Callable[[Tensor], Tensor] = swiglu
    swiglu_linear: Callable[[Tensor, Tensor], Tensor] = swiglu_linear
    split_rotate: SplitRotate = split_rotate
    split_norm_rotate: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
        split_norm_rotate
    )


PLAIN = LayerKernels()


NAMES = {"norm": "RMSNorm", "rope": "rotary embedding", "swiglu": "SwiGLU"}


def choose_layer_kernels(
    unfused: Collection[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    recomputed: bool,
    used: Collection[str] = NAMES,
    later: Later = AT_ONCE,
) -> tuple[LayerKernels, str]:
    """(kernels, the sentence about them for the banner).

    unfused    : of NAMES, those that shall stay torch's own operators.
    used       : of NAMES, those that the model has in the form of the kernels.
    recomputed : whole layers or MLPs are computed again before their backward pass. That stops at the last tensor which the backward pass
    needs, so the input of linear_fc2 is kept: to form it there would cost the product of linear_fc2 once more.
    later      : how the kernels form the gradients of the linear layers' weights.
    """
    assert set(unfused) <= NAMES.keys(), unfused
    parts = [name for name in NAMES if name in used]
    reason = why_no_triton(device)
    if set(parts) <= set(unfused):
        reason = "asked for" if parts else "the model has none of what there are Triton kernels for"
    if not reason and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"Triton kernels are not written for {dtype}"
    if reason:
        return PLAIN, f"torch's own operators ({reason})"
    fused, plain = (_listed([NAMES[n] for n in parts if (n in unfused) == there]) for there in (False, True))
    rest = f"; torch's own operators for {plain} (asked for)" if plain else ""
    if later is not AT_ONCE:
        rest += STREAM_SAID
    return _triton_kernels(unfused, recomputed=recomputed, later=later), f"Triton: {fused} in one pass each{rest}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _triton_kernels(unfused: Collection[str], *, recomputed: bool, later: Later = AT_ONCE) -> LayerKernels:
    from megatron_swift.kernels.fused import norm
    from megatron_swift.kernels.fused.linear import fused_linear
    from megatron_swift.kernels.fused.norm_rope import fused_split_norm_rotate
    from megatron_swift.kernels.fused.rope import fused_split_rotate
    from megatron_swift.kernels.fused.swiglu import fused_swiglu, fused_swiglu_linear

    kernels = PLAIN
    # torch's own operator keeps its input before it multiplies: recomputation stops there, and spares the product.
    if later is not AT_ONCE and not recomputed:
        kernels = dataclasses.replace(kernels, linear=partial(fused_linear, later=later))
    if "norm" not in unfused:
        kernels = dataclasses.replace(
            kernels,
            norm=norm.fused_norm,
            norm_linear=partial(norm.fused_norm_linear, later=later),
            add_norm=norm.fused_add_norm,
            add_norm_linear=partial(norm.fused_add_norm_linear, later=later),
            split_norm_rotate=partial(_split_norm_rotate, norm.fused_norm),
        )
    if "rope" not in unfused:
        at_once = fused_split_norm_rotate if "norm" not in unfused else partial(_norm_split_rotate, fused_split_rotate)
        kernels = dataclasses.replace(kernels, split_rotate=fused_split_rotate, split_norm_rotate=at_once)
    if "swiglu" not in unfused:
        at_end = partial(fused_swiglu_linear, later=later)
        after = (lambda x, weight: F.linear(fused_swiglu(x), weight)) if recomputed else at_end
        kernels = dataclasses.replace(kernels, swiglu=fused_swiglu, swiglu_linear=after)
    return kernels
