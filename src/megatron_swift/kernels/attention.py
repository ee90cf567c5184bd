"""Causal attention over packed rows: cuDNN's and torch's variable-length FlashAttention on CUDA, and their plain twin everywhere else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_swift.kernels.cudnn_ragged import HEAD_DIMS, ragged_attention, takes, why_no_frontend
from megatron_swift.kernels.dense_attention import cudnn_is_fastest, dense_attention, flash_takes, is_even
from megatron_swift.kernels.dropout import Noise
from megatron_swift.kernels.varlen_flash import CausalFlash, Runs

# Not cuDNN: it builds a plan, which takes milliseconds, for every new length, and the segments of packed rows all differ.
SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# The longest segment of a ragged row from which cuDNN's kernel is worth what its start costs the host: docs/speed.md.
LONG = 1024


@dataclass(frozen=True)
class Segments:
    """Where the segments of a packed row lie.

    lengths : in order, summing to T.  cumulative : int32 [num + 1] on the row's device.  longest : the largest length.
    noise   : what dropout is drawn from; None where nothing is dropped, as in evaluation.
    """

    lengths: tuple[int, ...]
    cumulative: Tensor
    longest: int
    noise: Noise | None = field(default=None, kw_only=True)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments of these lengths, on `device`."""
        return Segments(tuple(lengths), *Runs.of(lengths, device))


# core(q [T, heads, d], k and v [T, groups, d], segments) -> [T, heads, d]
AttentionCore = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """One scaled_dot_product_attention per segment: any device, any dtype. The reference of every other kernel here."""
    outputs = []
    with sdpa_kernel(SDPA_KERNELS):
        for q_part, k_part, v_part in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
            q_heads, k_heads, v_heads = (x.transpose(0, 1)[None] for x in (q_part, k_part, v_part))
            attended = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=True, enable_gqa=True)
            outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, softmax_in_fp32: bool = True) -> Tensor:
    """Matrix products and a softmax written out, per segment: the slowest and the most literal form.

    softmax_in_fp32 applies to 16-bit inputs; float32 and float64 keep their own precision.
    """
    repeat = q.shape[1] // k.shape[1]
    outputs = []
    for q_part, k_part, v_part in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
        k_part, v_part = k_part.repeat_interleave(repeat, 1), v_part.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q_part, k_part) / math.sqrt(q.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        exact = torch.promote_types(q.dtype, torch.float32) if softmax_in_fp32 else q.dtype
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1, dtype=exact).to(q.dtype), v_part))
    return torch.cat(outputs)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's variable-length FlashAttention-2: CUDA, 16-bit types, one launch for all segments."""
    return CausalFlash.apply(q, k, v, segments.cumulative, segments.longest)  # type: ignore[no-any-return]


def even_or_flash_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A dense batch where the segments make one, `flash_attention` otherwise; the same choice whenever a row is computed again."""
    if is_even(segments.lengths):
        return dense_attention(q, k, v, segments.lengths)
    return flash_attention(q, k, v, segments)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """cuDNN wherever it is ahead: a dense batch, or a ragged row that is not of short segments only; `flash_attention` otherwise."""
    if is_even(segments.lengths):
        return dense_attention(q, k, v, segments.lengths)
    if segments.longest >= LONG and takes(q) and not torch.are_deterministic_algorithms_enabled():
        return ragged_attention(q, k, v, ends=segments.cumulative, longest=segments.longest)
    return flash_attention(q, k, v, segments)


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel in use, the sentence about it for the start-up banner, and whether it keeps the attention weights for the backward pass."""

    core: AttentionCore
    reason: str
    keeps_weights: bool = False


def choose_attention(
    backend: str, *, device: torch.device, dtype: torch.dtype, head_dim: int = 128, softmax_in_fp32: bool = True
) -> AttentionChoice:
    """Pick the kernel for `--attention_backend`: auto, flash, cudnn, fused, unfused or local. head_dim: dims of a head.

    Raises ValueError when `flash` or `cudnn` is asked for where it cannot run.
    """
    flash_fits = flash_takes(device, dtype, head_dim)
    if backend in ("unfused", "local"):
        core = functools.partial(unfused_attention, softmax_in_fp32=softmax_in_fp32)
        return AttentionChoice(core, "written out (unfused)", keeps_weights=True)
    if backend == "flash" and not flash_fits:
        raise ValueError(
            f"FlashAttention needs a CUDA device, a 16-bit type and heads of a multiple of 8 dimensions up to 256, "
            f"not {device.type} and {str(dtype)[6:]} and {head_dim}"
        )
    missing = _why_no_cudnn(device, head_dim) if flash_fits else "it takes a CUDA device and a 16-bit type"
    if backend == "cudnn" and missing:
        raise ValueError(f"cuDNN for ragged rows cannot run: {missing}")
    if backend in ("auto", "cudnn") and flash_fits and cudnn_is_fastest(device):
        if missing:
            reason = (
                f"cuDNN where all segments of a row are of one length, else torch varlen FlashAttention ({missing})"
            )
            return AttentionChoice(even_or_flash_attention, reason)
        return AttentionChoice(
            cudnn_attention, f"cuDNN; torch varlen FlashAttention for ragged rows without a segment of {LONG} tokens"
        )
    if backend in ("auto", "flash") and flash_fits:
        return AttentionChoice(flash_attention, "torch varlen FlashAttention")
    return AttentionChoice(plain_attention, "torch scaled_dot_product_attention, segment by segment")


def _why_no_cudnn(device: torch.device, head_dim: int) -> str:
    """Why cuDNN cannot do all rows of a 16-bit type; "" where it can."""
    if not cudnn_is_fastest(device):
        return "it takes a GPU of compute capability 9.0 or later"
    if head_dim not in HEAD_DIMS:
        return f"its ragged form takes heads of {' or '.join(map(str, HEAD_DIMS))} dimensions, not {head_dim}"
    return why_no_frontend()
