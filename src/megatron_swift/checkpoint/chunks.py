"""A tensor that torch.save wrote into a part of a file, read by rows straight to where it is wanted.

torch.load would allocate the whole tensor and fill it first. What it wrote is a zip archive with the values uncompressed in one record,
so the bytes of a row are found by arithmetic. An archive of any other make is left to torch.load, which runs nothing with weights_only.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_swift.checkpoint.archive import STORAGES, data_start
from megatron_swift.checkpoint.safe_pickle import FrugalUnpickler
from megatron_swift.checkpoint.stored import long_axis


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of an open file as a file of their own, without a copy of them."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.position, self.length)[whence]
        self.position = min(max(base + offset, 0), self.length)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self.length - self.position]
        self.file.seek(self.start + self.position)
        got = self.file.readinto(view)
        self.position += got
        return got


class _Record(NamedTuple):
    """A contiguous tensor whose values begin at byte `start` of the part."""

    dtype: torch.dtype
    size: tuple[int, ...]
    start: int


def read_rows(
    file: io.FileIO,
    start: int,
    length: int,
    *,
    dtype: torch.dtype,
    size: tuple[int, ...],
    rows: tuple[int, int],
    out: Tensor | None = None,
) -> Tensor:
    """Rows [rows) along the first dim that is longer than 1 of the tensor in bytes [start, start + length) of a file.

    out : a contiguous tensor on the CPU, of that dtype and shape, which is filled and returned.
    Raises ValueError when it is not of this dtype and size, and nearly anything where the bytes are damaged.
    """
    record = _find(_Part(file, start, length))
    part = _Part(file, start, length)  # a new one: the reader around the other closes it
    axis = long_axis(size)
    if record is None:
        whole = torch.load(io.BufferedReader(part, 1 << 12), map_location="cpu", weights_only=True)
        if not isinstance(whole, Tensor) or tuple(whole.shape) != size or whole.dtype != dtype:
            raise ValueError("it is not the tensor that .metadata describes")
        whole = whole.narrow(axis, rows[0], rows[1] - rows[0]) if size else whole
        return whole if out is None else out.copy_(whole)
    if (record.dtype, record.size) != (dtype, size):
        raise ValueError("it is not the tensor that .metadata describes")
    shape = [*size[:axis], rows[1] - rows[0], *size[axis + 1 :]] if size else []
    out = torch.empty(shape, dtype=dtype) if out is None else out
    row = math.prod(size[axis + 1 :]) * dtype.itemsize
    _fill(part, record.start + rows[0] * row, out)
    return out


def _fill(part: _Part, start: int, out: Tensor) -> None:
    if not out.numel():
        return
    view: Any = memoryview(out.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    part.seek(start)
    while len(view):
        got = part.readinto(view)
        if not got:
            raise EOFError("the file ends before the tensor does")
        view = view[got:]


def _find(part: _Part) -> _Record | None:
    """Where the values lie, None for an archive that torch.load must read. The pickle in it is looked at by an unpickler of our own."""
    with zipfile.ZipFile(io.BufferedReader(part, 1 << 10)) as archive:
        members = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        if "data.pkl" not in members or "data/0" not in members or sys.byteorder != "little":
            return None
        if "byteorder" in members and _content(part, members["byteorder"]) != b"little":
            return None
        try:
            found = _Unpickler(_content(part, members["data.pkl"])).load()
        except pickle.UnpicklingError:
            return None
        values = members["data/0"]
        if not isinstance(found, _Tensor) or values.compress_type != zipfile.ZIP_STORED:
            return None
        if not found.plain or values.file_size != math.prod(found.size) * found.dtype.itemsize:
            return None
        return _Record(found.dtype, found.size, data_start(part, values))


def _content(part: _Part, info: zipfile.ZipInfo) -> bytes:
    """A small uncompressed member; not by zipfile, which would insist on the CRC that our writer leaves out."""
    if info.compress_type != zipfile.ZIP_STORED:
        return b""
    data = bytearray(info.file_size)
    part.seek(data_start(part, info))
    part.readinto(data)
    return bytes(data)


class _Tensor(NamedTuple):
    """A pickled tensor. plain: it is contiguous and all of its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    plain: bool


class _Storage(NamedTuple):
    dtype: torch.dtype
    numel: int


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("no storage")
    step, plain = 1, offset == 0 and storage.numel == math.prod(size)
    for length, given in zip(reversed(size), reversed(stride), strict=True):
        plain = plain and (given == step or length == 1)
        step *= length
    return _Tensor(storage.dtype, tuple(size), plain)


class _Unpickler(FrugalUnpickler):
    """Knows a plain tensor and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuilt(*args),
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel = pid
        if kind != "storage" or key != "0" or storage not in STORAGES:
            raise pickle.UnpicklingError("no plain storage")
        return _Storage(STORAGES[storage], numel)
