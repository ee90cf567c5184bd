"""Safetensors files: opened by slices, and written as a stream so that one tensor at a time is in memory.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Any] = {}
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
            return dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
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

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path} does not exist, but {INDEX} names it", do="complete the download"
                ) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} cannot be read: {error}", do="the file is cut or damaged; fetch it again"
                ) from None
        return self._open[name]

    def slice(self, name: str) -> Any:
        """safetensors' lazy slice of a tensor (get_shape, indexing)."""
        try:
            return self._file(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self.file_of[name]}: {name} cannot be read: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return tuple(self.slice(name).get_shape())


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> int:
    """Write a file tensor by tensor and fsync it; returns its size in bytes. `read(name)` is called once per tensor, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize
        for dim in shape:
            size *= dim
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (dtype, shape) in tensors.items():
            tensor = read(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset
