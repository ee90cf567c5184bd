"""torch's FlashAttention-2 for runs of rows of any length, one launch for all: CUDA, 16-bit types, grouped heads.

Its operators are called directly. torch.nn.attention.varlen, the public form, needs several times as long on the host to start the same
kernels, and from some version on it takes grouped heads only with an argument that torch 2.11 does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_swift.kernels.to_device import to_device

_aten = torch.ops.aten


class Runs(NamedTuple):
    """The runs of one side. ends: int32 [number + 1] on the device, from 0.  longest: the largest length."""

    ends: Tensor
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Runs:
        """Runs of these lengths, on `device`."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Runs(to_device(ends, device), max(lengths))


def flash_forward(q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [Tq, heads, d], log-sum-exp float32 [heads, Tq]) of each run of queries over its run of keys.

    q [Tq, heads, d]; k, v [Tk, groups, d], heads a multiple of groups.
    """
    out, log_sum, *_ = _aten._flash_attention_forward(
        q, k, v, queries.ends, keys.ends, queries.longest, keys.longest, 0.0, causal, False
    )
    return out, log_sum


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    queries: Runs,
    keys: Runs,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `flash_forward`; grad and log_sum are contiguous."""
    # Of dropout, which this does not have: never read.
    seed, offset = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    lengths = queries.ends, keys.ends, queries.longest, keys.longest
    return _aten._flash_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, log_sum, *lengths, 0.0, causal, seed, offset
    )


class CausalFlash(torch.autograd.Function):
    """out of the causal `flash_forward`, where a run's queries attend to its own keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        runs = Runs(ends, longest)
        out, log_sum = flash_forward(q, k, v, runs, runs, causal=True)
        ctx.save_for_backward(q, k, v, out, log_sum, ends)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum, ends = ctx.saved_tensors
        runs = Runs(ends, ctx.longest)
        return (*flash_backward(grad.contiguous(), q, k, v, out, log_sum, runs, runs, causal=True), None, None)
