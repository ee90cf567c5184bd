"""Values of 16 or 32 bits as 8-bit floating point, written as they are and transposed in one pass. `kernels.fp8_values` says what is made.

The largest absolute value is found on the integers that the float32 absolute values are: their order is the same, and NaN is above inf.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_swift.kernels.fp8_values import BLOCK, LARGEST, SMALLEST, Quantised, Recipe, Side, padded

SLOTS = 64  # places for the largest value of a tensor: programs of one launch would queue for a single one
_FLAT, _PROGRAMS = 4096, 2048


@triton.jit
def magnitude(x):  # type: ignore[no-untyped-def]  # Triton compiles it
    """|x| as the integer of its float32 bits."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _floored(bits, SMALL: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    amax = bits.to(tl.float32, bitcast=True)
    return tl.where(amax < SMALL, SMALL, amax)


@triton.jit
def _power_of_two(bits, TOP: tl.constexpr, SMALL: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    exact = tl.math.div_rn(_floored(bits, SMALL), tl.zeros_like(bits).to(tl.float32) + TOP)
    raw = exact.to(tl.int32, bitcast=True)
    up = ((raw + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(raw < 0x7F800000, up, float("nan"))


@triton.jit
def _inverse(power):  # type: ignore[no-untyped-def]  # Triton compiles it
    """1 / power, of a power of two exactly: a division on the GPU may be off by a bit. NaN gives some number, which the scale outweighs."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _to_8_bits(v, at, TOP: tl.constexpr, SOFT: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    """v, at most the largest value, as the type that `at` points to. SOFT: rounded here, since the interpreter's conversion cuts."""
    if SOFT:
        # One step of the format at v, and the sum with so large a number that float32 has no finer steps there.
        lowest: tl.constexpr = 2.0**-6 if TOP == 448.0 else 2.0**-14
        step: tl.constexpr = 2.0**-3 if TOP == 448.0 else 2.0**-2
        power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.where(power < lowest, lowest, power) * (step * 12582912.0)
        v = (v + magic) - magic
    return v.to(at.dtype.element_ty)


@triton.jit
def _amax(x, slots, size, tiles, FLAT: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    largest = tl.zeros((FLAT,), tl.int32)
    at = tl.program_id(0).to(tl.int64) * FLAT + tl.arange(0, FLAT)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        largest = tl.maximum(largest, magnitude(tl.load(x + at, at < size, 0.0)))
        at += tl.num_programs(0) * FLAT
    tl.atomic_max(slots + tl.program_id(0) % SLOTS, tl.max(largest, 0), sem="relaxed")


@triton.jit
def _amax_both(x, of_rows, of_columns, n, k, across, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles it
    row = (tl.program_id(0) // across * BN + tl.arange(0, BN)).to(tl.int64)
    column = tl.program_id(0) % across * BK + tl.arange(0, BK)
    inside = (row[:, None] < n) & (column[None, :] < k)
    bits = magnitude(tl.load(x + row[:, None] * k + column[None, :], inside, 0.0))
    tl.atomic_max(of_rows + row, tl.max(bits, 1), row < n, sem="relaxed")
    tl.atomic_max(of_columns + column, tl.max(bits, 0), column < k, sem="relaxed")


@triton.jit
def _cast(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    slots,
    scale,
    rows,
    columns,
    n,
    k,
    padded_n,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    SMALL: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    amax = _floored(tl.max(tl.load(slots + tl.arange(0, SLOTS)), 0), SMALL)
    top = tl.zeros_like(amax) + TOP
    if tl.program_id(0) == 0:
        tl.store(scale, tl.math.div_rn(amax, top))
    # From the end: what was written or measured last is in the cache still.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tile // across * BN + tl.arange(0, BN)).to(tl.int64)
    column = (tile % across * BK + tl.arange(0, BK)).to(tl.int64)
    there = (row[:, None] < n) & (column[None, :] < k)
    v = tl.load(x + row[:, None] * k + column[None, :], there, 0.0).to(tl.float32) * tl.math.div_rn(top, amax)
    inside = (row[:, None] < padded_n) & (column[None, :] < k)
    if ROWS:
        tl.store(rows + row[:, None] * k + column[None, :], _to_8_bits(v, rows, TOP, SOFT), inside)
    if COLUMNS:
        turned = tl.trans(_to_8_bits(v, columns, TOP, SOFT))
        tl.store(columns + column[:, None] * padded_n + row[None, :], turned, tl.trans(inside))


@triton.jit
def _cast_rowwise(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    of_rows,
    of_columns,
    row_scale,
    column_scale,
    rows,
    columns,
    n,
    k,
    padded_n,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    SMALL: tl.constexpr,
    SOFT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    down, right = tl.program_id(0) // across, tl.program_id(0) % across
    row = (down * BN + tl.arange(0, BN)).to(tl.int64)
    column = (right * BK + tl.arange(0, BK)).to(tl.int64)
    there = (row[:, None] < n) & (column[None, :] < k)
    v = tl.load(x + row[:, None] * k + column[None, :], there, 0.0).to(tl.float32)
    inside = (row[:, None] < padded_n) & (column[None, :] < k)
    if ROWS:
        one = _power_of_two(tl.load(of_rows + row, row < padded_n, 0), TOP, SMALL)
        if right == 0:
            tl.store(row_scale + row, one, row < padded_n)
        tl.store(
            rows + row[:, None] * k + column[None, :], _to_8_bits(v * _inverse(one)[:, None], rows, TOP, SOFT), inside
        )
    if COLUMNS:
        one = _power_of_two(tl.load(of_columns + column, column < k, 0), TOP, SMALL)
        if down == 0:
            tl.store(column_scale + column, one, column < k)
        turned = tl.trans(_to_8_bits(v * _inverse(one)[None, :], columns, TOP, SOFT))
        tl.store(columns + column[:, None] * padded_n + row[None, :], turned, tl.trans(inside))


@triton.jit
def _cast_blockwise(  # type: ignore[no-untyped-def]  # Triton compiles it
    x,
    row_scale,
    column_scale,
    rows,
    columns,
    n,
    k,
    padded_n,
    across,
    row_stride,
    column_stride,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    SMALL: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sizes are whole blocks, n aside. The strides are those of the scales from one block to the next along the longer way."""
    down, right = tl.program_id(0) // across, tl.program_id(0) % across
    row = (down * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (right * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    raw = tl.load(x + row[:, None] * k + column[None, :], (row < n)[:, None], 0.0)
    if SQUARE:
        one = _power_of_two(tl.max(tl.max(magnitude(raw), 1), 0), TOP, SMALL)
    if ROWS:
        if SQUARE:
            tl.store(row_scale + down * row_stride + right, one)
            scaled = raw.to(tl.float32) * _inverse(one)
        else:
            of_row = _power_of_two(tl.max(magnitude(raw), 1), TOP, SMALL)
            tl.store(row_scale + right * row_stride + row, of_row)
            scaled = raw.to(tl.float32) * _inverse(of_row)[:, None]
        tl.store(rows + row[:, None] * k + column[None, :], _to_8_bits(scaled, rows, TOP, SOFT))
    if COLUMNS:
        turned = tl.trans(raw)  # before it is cast: the hardware turns 16-bit values
        if SQUARE:
            tl.store(column_scale + right * column_stride + down, one)
            scaled = turned.to(tl.float32) * _inverse(one)
        else:
            of_column = _power_of_two(tl.max(magnitude(raw), 0), TOP, SMALL)
            tl.store(column_scale + down * column_stride + column, of_column)
            # Read back: a value at hand would have the compiler turn the cast tile, byte by byte, instead of the 16-bit one.
            tl.debug_barrier()
            of_column = tl.load(column_scale + down * column_stride + column)
            scaled = turned.to(tl.float32) * _inverse(of_column)[:, None]
        tl.store(columns + column[:, None] * padded_n + row[None, :], _to_8_bits(scaled, columns, TOP, SOFT))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def amax_slots(device: torch.device) -> Tensor:
    """int32 [SLOTS] of zeros, for kernels that leave there the `magnitude` of the largest value they write."""
    return torch.zeros(SLOTS, dtype=torch.int32, device=device)


def amax_of(x: Tensor) -> Tensor:
    """`amax_slots` with the largest value of x, contiguous."""
    slots = amax_slots(x.device)
    tiles = triton.cdiv(x.numel(), _FLAT)
    if tiles:
        _amax[(min(tiles, _PROGRAMS),)](x, slots, x.numel(), tiles, FLAT=_FLAT, SLOTS=SLOTS, num_warps=8)
    return slots


def quantise(
    x: Tensor,
    dtype: torch.dtype,
    recipe: Recipe,
    *,
    weight: bool = False,
    rows: bool = True,
    columns: bool = True,
    amax: Tensor | None = None,
    tile: tuple[int, int, int] = (64, 128, 4),
) -> Quantised:
    """`kernels.fp8_values.quantise`. tile: rows and columns of x that a program casts, and its warps; blockwise has its own."""
    assert x.is_contiguous() and (rows or columns)
    n, k = x.shape
    full = padded(n, recipe)
    made = [
        x.new_empty((full, k) if rows else (0,), dtype=dtype),
        x.new_empty((k, full) if columns else (0,), dtype=dtype),
    ]
    common: dict[str, Any] = dict(ROWS=rows, COLUMNS=columns, TOP=LARGEST[dtype], SMALL=SMALLEST, SOFT=interpreted())
    if recipe == "tensorwise":
        scales = [_tensorwise(x, made, amax, full, tile, common)] * 2
    elif recipe == "rowwise":
        scales = _rowwise(x, made, full, tile, common)
    else:
        scales = _blockwise(x, made, full, weight, common)
    kind = {"tensorwise": "tensor", "rowwise": "row", "blockwise": "block" if weight else "vector"}[recipe]
    sides = [Side(v, s, kind) for v, s in zip(made, scales, strict=True)]  # type: ignore[arg-type]  # a str of Kind
    return Quantised(sides[0] if rows else None, sides[1] if columns else None)


def _tensorwise(
    x: Tensor, made: list[Tensor], amax: Tensor | None, full: int, tile: tuple[int, int, int], common: dict[str, Any]
) -> Tensor:
    n, k = x.shape
    scale = x.new_empty(1, dtype=torch.float32)
    bn, bk, warps = tile
    across = triton.cdiv(k, bk)
    # At least one program: it writes the scale.
    grid = (max(triton.cdiv(full, bn), 1) * across,)
    slots = amax if amax is not None else amax_of(x)
    sizes = dict(SLOTS=SLOTS, BN=bn, BK=bk, num_warps=warps)
    _cast[grid](x, slots, scale, *made, n, k, full, across, **common, **sizes)
    return scale


def _rowwise(
    x: Tensor, made: list[Tensor], full: int, tile: tuple[int, int, int], common: dict[str, Any]
) -> list[Tensor]:
    n, k = x.shape
    largest = [torch.zeros(size, dtype=torch.int32, device=x.device) for size in (full, k)]
    scales = [x.new_empty(size, dtype=torch.float32) for size in (full, k)]
    if n:
        across = triton.cdiv(k, BLOCK)
        _amax_both[(triton.cdiv(n, BLOCK) * across,)](x, *largest, n, k, across, BN=BLOCK, BK=BLOCK, num_warps=8)
    bn, bk, warps = tile
    across = triton.cdiv(k, bk)
    grid = (max(triton.cdiv(full, bn), 1) * across,)
    _cast_rowwise[grid](x, *largest, *scales, *made, n, k, full, across, **common, BN=bn, BK=bk, num_warps=warps)
    return [s[:, None] for s in scales]


def _blockwise(x: Tensor, made: list[Tensor], full: int, weight: bool, common: dict[str, Any]) -> list[Tensor]:
    n, k = x.shape
    down, across = full // BLOCK, k // BLOCK
    if weight:
        shapes = [(down, -(-across // 4) * 4), (across, -(-down // 4) * 4)]
    else:
        shapes = [(across, full), (down, k)]
    scales = [x.new_zeros(shape, dtype=torch.float32) for shape in shapes]
    if full:
        strides = [shape[1] for shape in shapes]
        _cast_blockwise[(down * across,)](
            x, *scales, *made, n, k, full, across, *strides, SQUARE=weight, **common, BLOCK=BLOCK, num_warps=8
        )
    return scales if weight else [s.t() for s in scales]
