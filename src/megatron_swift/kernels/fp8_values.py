"""Matrices in 8-bit floating point: their scales, how values become 8 bits, and the product of two of them. Plain forms and the choice.

e4m3 has 3 bits of mantissa and reaches to 448, e5m2 2 bits and 57344 (arXiv 2209.05433; torch.float8_e4m3fn, float8_e5m2). A value is stored
as round(x / scale), to the nearest, ties to even; scale = amax / largest, amax the largest absolute value of those that share the scale.

    tensorwise : one scale for a matrix.
    rowwise    : one for each row; the transposed copy has one for each of its own rows.
    blockwise  : one for 128 values of a row, or of a row of the transposed copy; for 128 x 128 of a weight (DeepSeek-V3, arXiv 2412.19437).

A matrix is written twice, as it is and transposed: the products of the backward pass run along the other dimension, and the tensor cores
of Hopper take 8-bit operands with the summed dimension last only. The scales of rowwise and blockwise are rounded up to a power of two, so that
both copies of a value are the same number unless it underflows; that of a tensor is not, since both copies share it.
An amax that is inf or NaN makes a scale that is, so that every product of it is inf or NaN: nothing is cut off in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.triton_runs import triton_takes

Recipe = Literal["tensorwise", "rowwise", "blockwise"]
Kind = Literal["tensor", "row", "vector", "block"]
BLOCK = 128
# Below it an amax counts as this much: of a matrix of zeros the scale is finite, and its inverse too.
SMALLEST = 2.0**-100
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@dataclass(frozen=True)
class Side:
    """One operand: values [R, C] in 8 bits, contiguous, standing for values * scale. Products sum over C.

    scale float32, by kind: tensor [1]; row [R, 1]; vector [R, C / 128], strides (1, R); block [R / 128, C / 128 rounded up to 4], contiguous.
    """

    values: Tensor
    scale: Tensor
    kind: Kind

    def whole(self) -> Tensor:
        """The matrix in float32."""
        rows, columns = self.values.shape
        scale = self.scale
        if self.kind in ("vector", "block"):
            down = BLOCK if self.kind == "block" else 1
            scale = scale.repeat_interleave(down, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        return self.values.float() * scale


@dataclass(frozen=True)
class Quantised:
    """A matrix [N, K]: rows [N', K], columns [K, N'], or one of them. N' is N padded with zeros to a multiple of `multiple(recipe)`."""

    rows: Side | None
    columns: Side | None


def multiple(recipe: Recipe) -> int:
    """Every side of a matrix must be a multiple of it: torch's scaled products need 16, blocks are whole."""
    return BLOCK if recipe == "blockwise" else 16


def padded(number: int, recipe: Recipe) -> int:
    """number, rounded up to a multiple that products take."""
    return -(-number // multiple(recipe)) * multiple(recipe)


def quantise(
    x: Tensor,
    dtype: torch.dtype,
    recipe: Recipe,
    *,
    weight: bool = False,
    rows: bool = True,
    columns: bool = True,
    amax: Tensor | None = None,
) -> Quantised:
    """x [N, K], 16 or 32 bits, contiguous, as `dtype`. K, and N of a weight, are multiples of `multiple(recipe)`.

    rows, columns : which copies are made.  weight: blocks are square.
    amax : tensorwise, the bits of the largest value, as `fused.fp8.amax_slots` holds them, where a kernel before has found it.
    """
    assert x.shape[1] % multiple(recipe) == 0 and (not weight or x.shape[0] % multiple(recipe) == 0), x.shape
    if triton_takes(x):
        from megatron_swift.kernels.fused import fp8 as fused

        return fused.quantise(x, dtype, recipe, weight=weight, rows=rows, columns=columns, amax=amax)
    assert amax is None
    return plain_quantise(x, dtype, recipe, weight=weight, rows=rows, columns=columns)


def plain_quantise(
    x: Tensor, dtype: torch.dtype, recipe: Recipe, *, weight: bool = False, rows: bool = True, columns: bool = True
) -> Quantised:
    """`quantise` by torch's operators."""
    exact = F.pad(x.float(), (0, 0, 0, padded(len(x), recipe) - len(x)))
    if recipe == "tensorwise":
        largest = LARGEST[dtype]
        amax = _floored(exact.abs().max() if exact.numel() else exact.new_zeros(()))
        # Both divided as such: a number over a tensor would be its reciprocal times the number, rounded twice.
        inverse = torch.full_like(amax, largest) / amax
        values, scale = (exact * inverse).to(dtype), (amax / largest).reshape(1)
        return Quantised(
            Side(values, scale, "tensor") if rows else None,
            Side(values.t().contiguous(), scale, "tensor") if columns else None,
        )
    one = _square if weight and recipe == "blockwise" else _along_rows
    return Quantised(
        one(exact, dtype, recipe) if rows else None, one(exact.t().contiguous(), dtype, recipe) if columns else None
    )


def _along_rows(exact: Tensor, dtype: torch.dtype, recipe: Recipe) -> Side:
    size, columns = exact.shape
    count, width = (columns // BLOCK, BLOCK) if recipe == "blockwise" else (1, columns)
    parts = exact.view(size, count, width)
    amax = parts.abs().amax(-1) if parts.numel() else exact.new_zeros(size, count)
    scale = _power_of_two(amax, dtype)
    values = (parts * (1.0 / scale)[..., None]).to(dtype).view(size, columns)
    return Side(values, scale, "row") if recipe == "rowwise" else Side(values, scale.t().contiguous().t(), "vector")


def _square(exact: Tensor, dtype: torch.dtype, recipe: Recipe) -> Side:
    down, across = (size // BLOCK for size in exact.shape)
    parts = exact.view(down, BLOCK, across, BLOCK)
    scale = _power_of_two(parts.abs().amax((1, 3)), dtype)
    values = (parts * (1.0 / scale)[:, None, :, None]).to(dtype).view(exact.shape)
    return Side(values, F.pad(scale, (0, -across % 4)), "block")


def _floored(amax: Tensor) -> Tensor:
    return torch.where(amax < SMALLEST, SMALLEST, amax)  # unlike a maximum it keeps NaN in every version


def _power_of_two(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two that is amax / largest or more; NaN where amax is not finite."""
    exact = _floored(amax) / LARGEST[dtype]
    up = ((exact.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(exact.isfinite(), up, torch.nan)


def product(a: Side, b: Side, *, fast: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T [R of a, R of b].

    fast : sums within the tensor cores alone, with about 14 bits; else they are added up in float32 on the way. It matters on Hopper only.
    """
    if not a.values.is_cuda:
        return (a.whole() @ b.whole().t()).to(dtype)
    if not a.values.numel():  # no tokens
        return torch.zeros(len(a.values), len(b.values), dtype=dtype, device=a.values.device)
    return scaled_product(a, b, fast=fast, dtype=dtype)


def scaled_product(a: Side, b: Side, *, fast: bool, dtype: torch.dtype) -> Tensor:
    """`product` by torch's scaled matrix products."""
    if b.kind == "block" and b.values.shape[1] % (4 * BLOCK):
        return padded_block_product(a, b, dtype=dtype)
    # Adding up in float32 is part of the recipe of blocks.
    fast = fast and a.kind in ("tensor", "row")
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale.t(), out_dtype=dtype, use_fast_accum=fast
    )


def padded_block_product(a: Side, b: Side, *, dtype: torch.dtype) -> Tensor:
    """`product` of a vector and a block side by torch.nn.functional.scaled_mm, which knows that a row of blocks' scales is padded.

    It takes e4m3 alone, as _scaled_mm does not say; shapes are those of torch 2.11 and later.
    """
    how: Any = F.ScalingType
    return F.scaled_mm(
        a.values, b.values.t(), a.scale, how.BlockWise1x128, b.scale.t(), how.BlockWise128x128, output_dtype=dtype
    )
