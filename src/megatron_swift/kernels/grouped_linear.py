"""One linear layer per group of consecutive rows: torch's grouped matrix product, and a loop as its plain twin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# run(x [N, in], weight [groups, out, in], counts int64 [groups], summing to N) -> [N, out]
GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


def looped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A matrix product per group: any dtype and size. On a GPU it waits for the counts."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """All groups in one kernel; nothing is read back from the device."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


def choose_grouped(
    wanted: bool, *, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]
) -> tuple[GroupedLinear, str]:
    """(kernel, reason for the banner). sizes: inner and outer sizes of the matrices; torch wants rows of whole 16 bytes."""
    if not wanted:
        return looped_linear, "one matrix product per expert (--moe_grouped_gemm true computes all in one)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return looped_linear, f"one matrix product per expert: torch has no grouped one in {dtype}"
    odd = [size for size in sizes if size * dtype.itemsize % 16]
    if odd:
        return (
            looped_linear,
            f"one matrix product per expert: a grouped one needs sizes of whole 16 bytes, not {odd[0]} {dtype}",
        )
    if device.type == "cuda" and not _works(dtype, device):
        return looped_linear, f"one matrix product per expert: torch's grouped one does not run in {dtype} on this GPU"
    return grouped_linear, "all experts in one grouped matrix product"


def _works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tiny product runs: which types a GPU takes differs between torch versions."""
    try:
        x = torch.ones(16, 16, dtype=dtype, device=device)
        grouped_linear(x, torch.ones(1, 16, 16, dtype=dtype, device=device), torch.tensor([16], device=device))
    except (RuntimeError, ValueError):
        return False
    return True
