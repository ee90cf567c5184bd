"""Sums: of a gradient into a wider one, in one pass; and of the rows of a matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_ROWS, _COLUMNS = 256, 16  # of a tile of `_down`
_ROWS_OF_A_PART = 512


@triton.jit
def _add(  # type: ignore[no-untyped-def]  # Triton compiles it
    first,
    second,
    total,
    number,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < number
    a = tl.load(first + at, inside, 0.0).to(tl.float32)
    b = tl.load(second + at, inside, 0.0).to(tl.float32)
    tl.store(total + at, a + b, inside)


@triton.jit
def _down(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    y,
    rows,
    columns,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, PART, ROWS):
        row = (part * PART + first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        total += tl.load(x + row[:, None] * columns + column[None, :], inside, 0.0).to(tl.float32)
    at = part.to(tl.int64) * columns + column
    tl.store(y + at, tl.sum(total, 0).to(y.dtype.element_ty), column < columns)


def add_wider(first: Tensor, second: Tensor) -> Tensor:
    """first + second in float32, both contiguous and of one shape; into first where that is of float32, else into a new tensor."""
    total = first if first.dtype is torch.float32 else torch.empty_like(first, dtype=torch.float32)
    number = first.numel()
    if number:
        _add[(triton.cdiv(number, _BLOCK),)](first, second, total, number, BLOCK=_BLOCK)
    return total


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of x [N, C], contiguous, in float32 and rounded to `dtype` once: [C]. Always in the same order."""
    rows, columns = x.shape
    while True:
        parts = triton.cdiv(rows, _ROWS_OF_A_PART) if rows > 2 * _ROWS_OF_A_PART else 1
        y = torch.empty(parts, columns, dtype=dtype if parts == 1 else torch.float32, device=x.device)
        part = _ROWS_OF_A_PART if parts > 1 else max(triton.cdiv(rows, _ROWS), 1) * _ROWS
        _down[(triton.cdiv(columns, _COLUMNS), parts)](
            x, y, rows, columns, PART=part, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
        if parts == 1:
            return y[0]
        x, rows = y, parts
