"""Dropout whose zeros are a pure function of what is dropped: seed, iteration, micro-batch, layer, token and column.

No generator has a state. So the same values are dropped under every parallel layout, on every device, when a layer is computed again
for its backward pass, and when a run is resumed. Bits come from multiplying and shifting integers (splitmix64 for rows, and Wellons'
"lowbias32" for each pair of row and column), which wrap alike on CPUs and GPUs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One signed 64-bit number out of several, each of which changes all of its bits."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return _signed(state, 64)


@dataclass(frozen=True)
class Noise:
    """What dropout needs to know of a row.

    seed   : of this iteration and micro-batch.
    tokens : int64, for each token that this rank attends with its segment's number * 2^32 + its position there.
    own    : the same for the tokens whose hidden states this rank holds; fewer under sequence parallelism.
    """

    seed: int
    tokens: Tensor
    own: Tensor

    @property
    def positions(self) -> Tensor:
        """Of `tokens`, in their segments."""
        return self.tokens & 0xFFFFFFFF


def row_bits(tokens: Tensor, seed: int, stream: int) -> Tensor:
    """int32, well mixed, one for each token. stream: which of the model's dropouts it is."""
    x = tokens * _signed(0xD1342543DE82EF95, 64) + mix(seed, stream)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB, 64)
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)).to(torch.int32)


@functools.lru_cache(maxsize=64)
def column_bits(columns: int, device: torch.device) -> Tensor:
    """int32 [columns], well mixed."""
    return row_bits(torch.arange(columns, device=device), 0, -2)


def kept(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """bool in the shape that int32 rows and columns broadcast to: False with probability p."""
    x = rows ^ columns
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(_signed(0x846CA68B, 32))
    x.bitwise_xor_((x >> 16) & 0xFFFF)
    return x >= int(p * 2**32) - 2**31


def dropout(x: Tensor, p: float, noise: Noise, stream: int) -> Tensor:
    """x [T, H], of the tokens that this rank holds, with values dropped and the others divided by 1 - p."""
    rows = row_bits(noise.own, noise.seed, stream)
    keep = kept(rows[:, None], column_bits(x.shape[1], x.device), p)
    return torch.where(keep, x / (1 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def _signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> (bits - 1) else number
