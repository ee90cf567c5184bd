"""Global tensors that lie in a folder as boxes, whatever the format of its files, read box by box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_swift.utils.errors import CheckpointError


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor.

    read(rows, out) : rows of it along `long_axis(size)`, in `out` if it is given (contiguous, on the CPU, of the stored dtype), else in a
                      tensor that must not be written to. Raises CheckpointError where its file is damaged.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    read: Callable[[tuple[int, int], Tensor | None], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor as a folder describes it; its chunks need not cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def long_axis(size: tuple[int, ...]) -> int:
    """The first dim that is longer than 1: before it, all rows lie one behind the other."""
    return next((axis for axis, length in enumerate(size) if length > 1), max(len(size) - 1, 0))


class StoredTensors:
    """What is in `folder`, by key, read by boxes.

    cut : the real shapes of tensors that Megatron-Core 0.11 stores as a grid of flattened boxes (its optimizer state).
    """

    def __init__(self, folder: Path, tensors: dict[str, Stored], cut: dict[str, tuple[int, ...]] | None = None):
        self.folder, self.tensors, self.cut = folder, tensors, cut or {}

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return self.cut.get(key, self.tensors[key].shape)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `offset`, in its stored dtype. Raises CheckpointError when the chunks on disk do not cover it."""
        out = torch.empty(shape, dtype=self._stored(key).dtype)
        self.fill(out, key, offset)
        return out

    def fill(self, out: Tensor, key: str, offset: tuple[int, ...]) -> None:
        """Read the box of out's shape at `offset` into it, cast to its dtype; straight from the file where it lies alike there."""
        if key in self.cut:
            self._fill_from_grid(out, key, offset)
        else:
            self._fill(out, key, offset)

    def _fill_from_grid(self, out: Tensor, key: str, offset: tuple[int, ...]) -> None:
        """`fill` of a tensor that lies as a grid of flattened boxes, cell by cell."""
        shape, grid = self.cut[key], self._stored(key).shape[:-1]
        box = [size // n for size, n in zip(shape, grid, strict=True)]
        ends = [o + n for o, n in zip(offset, out.shape, strict=True)]
        cells = [range(o // b, -(-e // b)) for o, e, b in zip(offset, ends, box, strict=True)]
        for cell in itertools.product(*cells):
            flat = torch.empty((*(1 for _ in grid), math.prod(box)), dtype=self._stored(key).dtype)
            self._fill(flat, key, (*cell, 0))
            start = [c * b for c, b in zip(cell, box, strict=True)]
            low = [max(a, b) for a, b in zip(offset, start, strict=True)]
            high = [min(e, a + b) for e, a, b in zip(ends, start, box, strict=True)]
            inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = flat.view(box)[inside]

    def _stored(self, key: str) -> Stored:
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no {key}", do="use a checkpoint of the same model")
        return self.tensors[key]

    def _fill(self, out: Tensor, key: str, offset: tuple[int, ...]) -> None:
        stored, covered = self._stored(key), 0
        for chunk in stored.chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(offset, out.shape, chunk.offset, chunk.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
            axis = long_axis(chunk.size)
            first = chunk.offset[axis] if chunk.size else 0
            rows = (low[axis] - first, high[axis] - first) if chunk.size else (0, 1)
            alike = (*chunk.size[:axis], rows[1] - rows[0], *chunk.size[axis + 1 :]) == tuple(target.shape)
            if alike and target.is_cpu and target.is_contiguous() and target.dtype == stored.dtype:
                chunk.read(rows, target)
            else:
                data = chunk.read(rows, None)
                start = [low[i] if i == axis else o for i, o in enumerate(chunk.offset)]
                target.copy_(data[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))])
            covered += target.numel()
        if covered != out.numel():
            raise CheckpointError(
                f"{self.folder}: the chunks of {key} do not cover what is asked for",
                why=f"{covered} of {out.numel()} values",
                do="use another checkpoint",
            )
