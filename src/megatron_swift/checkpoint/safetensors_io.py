"""Safetensors files: read by slices and written as a stream, so that no more than a few rows of a tensor need be in memory.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the tensors' bytes. The library would map
whole files privately, which counts against limits of memory as if they were copied; here the wanted bytes are read and nothing else.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_swift.checkpoint.manifest import Entry, Sums
from megatron_swift.utils.errors import CheckpointError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
INDEX = "model.safetensors.index.json"
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_LONGEST_HEADER = 100_000_000  # the library's own bound


@dataclass(frozen=True)
class Slice:
    """A tensor in a file; indexing it with slices reads just those values."""

    path: Path
    file: FileIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        bounds += [(0, n) for n in self.shape[len(bounds) :]]
        out = torch.empty([max(b - a, 0) for a, b in bounds], dtype=self.dtype)
        if out.numel():
            self._fill(memoryview(out.view(-1).view(torch.uint8).numpy()), bounds)  # type: ignore[arg-type]
        return out

    def _fill(self, view: memoryview, bounds: list[tuple[int, int]]) -> None:
        """Read run by run: behind the last axis that is cut, all lies together."""
        cut = max((i for i, n in enumerate(self.shape) if bounds[i] != (0, n)), default=0)
        strides = [math.prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape))]
        first, last = bounds[cut] if bounds else (0, 1)
        run = (last - first) * (strides[cut] if strides else self.dtype.itemsize)
        done = 0
        for outer in itertools.product(*(range(a, b) for a, b in bounds[:cut])):
            place = (*outer, first)[: len(strides)]
            at = self.start + sum(i * stride for i, stride in zip(place, strides, strict=False))
            self._read(view[done : done + run], at)
            done += run

    def _read(self, view: memoryview, at: int) -> None:
        while len(view):
            got = os.preadv(self.file.fileno(), [view], at)
            if not got:
                raise CheckpointError(f"{self.path} cannot be read: it ends too early", do="fetch it again")
            view, at = view[got:], at + got


class _File:
    """An open file and its header. Raises ValueError (or what json raises) for a header that does not fit the file."""

    def __init__(self, path: Path):
        self.path = path
        self.stream = open(path, "rb", buffering=0)  # noqa: SIM115  (open as long as the folder is)
        size = os.fstat(self.stream.fileno()).st_size
        length = int.from_bytes(self.stream.read(8), "little")
        self.start = 8 + length
        if size < 8 or length > _LONGEST_HEADER or self.start > size:
            raise ValueError("no header that fits the file")
        header = json.loads(self.stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        self.tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in self.tensors.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - self.start:
                raise ValueError(f"{name} lies behind its end")

    def slice(self, name: str) -> Slice:
        """Raises CheckpointError for a type that is no weight's, and ValueError or KeyError for a wrong entry."""
        entry = self.tensors[name]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {entry['dtype']}",
                do="give weights that are not quantised, in " + ", ".join(_DTYPES),
            )
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"shape {shape} does not fit {end - begin} bytes")
        return Slice(self.path, self.stream, dtype, shape, self.start + begin)


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, _File] = {}
        self.file_of = self._find()

    def _find(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.exists():
            single = self.folder / "model.safetensors"
            if not single.exists():
                others = sorted(p.name for p in self.folder.glob("*.bin"))
                why = (
                    f"it holds {', '.join(others[:3])}, pickled weights that could run code when read" if others else ""
                )
                raise CheckpointError(
                    f"{self.folder} holds no model.safetensors and no {INDEX}",
                    why=why,
                    do="give a folder with safetensors weights",
                )
            return dict.fromkeys(self._file("model.safetensors").tensors, "model.safetensors")
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {name: str(file) for name, file in mapping.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from None
        for name, file in names.items():
            if Path(file).name != file or file in ("", ".."):
                raise CheckpointError(
                    f"{index} sends {name} to {file!r}, outside the folder", do="do not use this folder"
                )
        return names

    def _file(self, name: str) -> _File:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = _File(path)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path} does not exist, but {INDEX} names it", do="complete the download"
                ) from None
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} cannot be read: {error}", do="the file is cut or damaged; fetch it again"
                ) from None
        return self._open[name]

    def slice(self, name: str) -> Slice:
        """The tensor, of which nothing is read yet."""
        try:
            return self._file(self.file_of[name]).slice(name)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / self.file_of[name]}: {name} cannot be read: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self.slice(name).shape


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Iterable[Tensor]]
) -> Entry:
    """Write a file part by part and fsync it; returns the checksums of what was written.

    read : called once per tensor, in order; its parts, one behind the other, are the tensor's values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    sums = Sums()
    with open(path, "wb") as file:
        for data in itertools.chain((len(text).to_bytes(8, "little"), text), _bytes_of(tensors, read)):
            sums.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return sums.entry()


def _bytes_of(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Iterable[Tensor]]
) -> Iterable[Any]:
    for name, (dtype, shape) in tensors.items():
        count = 0
        for part in read(name):
            assert part.dtype == dtype, name
            count += part.numel()
            if part.numel():  # a view of nothing has no buffer
                yield part.contiguous().view(-1).view(torch.uint8).numpy().data
        assert count == math.prod(shape), name
