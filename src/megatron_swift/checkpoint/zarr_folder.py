"""Megatron-Core's `ckpt_format zarr` (written by 0.11 and older): a folder of a zarr version 2 array for each tensor, read without zarr.

Megatron writes its arrays uncompressed, so a chunk is a file of plain values in C order, named by its place in the grid of chunks. The array's
`.zarray` is JSON, whose dtype may be `bfloat16`, which no zarr library knows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_swift.checkpoint.stored import Chunk, Stored, StoredTensors, long_axis
from megatron_swift.utils.errors import CheckpointError

ARRAY = ".zarray"
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|u1": torch.uint8,
}


def is_zarr(folder: Path) -> bool:
    """Whether the folder holds arrays of this format."""
    return next(folder.glob(f"*/{ARRAY}"), None) is not None


class ZarrFolder(StoredTensors):
    """Its arrays by key. Raises CheckpointError where one is damaged, or compressed, which Megatron's never are."""

    def __init__(self, folder: Path):
        super().__init__(folder, {path.parent.name: _stored(path) for path in sorted(folder.glob(f"*/{ARRAY}"))})


def _stored(path: Path) -> Stored:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        shape, box = _sizes(described["shape"]), _sizes(described["chunks"])
        dtype, separator = _DTYPES[described["dtype"]], described.get("dimension_separator", ".")
        plain = described["compressor"] is None and not described["filters"] and described["order"] == "C"
        if described["zarr_format"] != 2 or len(shape) != len(box) or separator not in (".", "/") or not all(box):
            raise ValueError("it contradicts itself")
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", do="use another checkpoint") from None
    if not plain:
        raise CheckpointError(
            f"{path.parent} is compressed",
            why="another program than Megatron has written it",
            do="convert it with Megatron's own tools to torch_dist",
        )
    chunks = []
    for place in itertools.product(*(range(-(-size // step)) for size, step in zip(shape, box, strict=True))):
        offset = tuple(number * step for number, step in zip(place, box, strict=True))
        size = tuple(min(step, whole - at) for step, whole, at in zip(box, shape, offset, strict=True))
        file = path.parent / (separator.join(map(str, place)) or "0")
        if file.is_file():
            chunks.append(Chunk(offset, size, _File(file, dtype, box, size).read))
    return Stored(shape, dtype, tuple(chunks))


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


@dataclass(frozen=True)
class _File:
    """A chunk's values, of shape `box`; those beyond `size` lie beyond the array's end and mean nothing."""

    path: Path
    dtype: torch.dtype
    box: tuple[int, ...]
    size: tuple[int, ...]

    def read(self, rows: tuple[int, int], out: Tensor | None) -> Tensor:
        """Chunk.read: some rows of the part that is inside the array, along its first dim that is longer than 1."""
        wanted = math.prod(self.box) * self.dtype.itemsize
        if os.path.getsize(self.path) != wanted:
            raise CheckpointError(f"{self.path} is damaged: it has not {wanted} bytes", do="use another checkpoint")
        whole = torch.from_file(str(self.path), size=math.prod(self.box), dtype=self.dtype).view(self.box)
        inside = whole[tuple(slice(0, length) for length in self.size)]
        part = inside.narrow(long_axis(self.size), rows[0], rows[1] - rows[0]) if self.size else inside
        return part if out is None else out.copy_(part)
