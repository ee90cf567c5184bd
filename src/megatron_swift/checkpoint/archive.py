"""Files that torch.save wrote, whoever made them, opened without running anything that is in them.

torch.load(weights_only=True) refuses what Megatron puts beside its tensors (its arguments, enumerations, random states), and without it runs
whatever the file says. Here every class that is no tensor becomes an inert stand-in, and tensors are views of the mapped file: nothing is
read before it is looked at.
"""

from __future__ import annotations

import collections
import math
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_swift.checkpoint.safe_pickle import FrugalUnpickler
from megatron_swift.utils.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of the name and of the extra field
STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands for an object of a class that we do not import. `state`: its attributes, where it had any."""

    def __init__(self, *_: Any, **__: Any):
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list would; forgotten."""

    def extend(self, values: Any) -> None:
        """As a list would; forgotten."""


def attributes(value: Any) -> dict[str, Any]:
    """What a pickled object was made of: an argparse.Namespace, for instance."""
    state = value.__dict__.get("state") if isinstance(value, Inert) else None
    return {str(key): item for key, item in state.items()} if isinstance(state, dict) else {}


class Placed(NamedTuple):
    """Where a contiguous tensor lies in its file, from byte `start` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def read_archive(path: Path, *, placed: bool = False) -> Any:
    """What the file holds; with `placed` no tensors but where they lie.

    Raises CheckpointError where it is missing, damaged, or older than torch 1.6's format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", do="use another checkpoint")
    if not _is_zip(path):
        raise CheckpointError(
            f"{path} is no file of torch.save",
            why="it is damaged, or written by a torch before 1.6",
            do="use another checkpoint, or write it again with a newer torch",
        )
    try:
        return _read(path, placed=placed)
    except Exception as error:  # a damaged or forged file raises nearly anything
        raise CheckpointError(f"{path} cannot be read: {error!r}", do="use another checkpoint") from None


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of a damaged directory, before Python 3.14
        return False


class _Place(NamedTuple):
    """A storage that the pickle names: what its values are and where they lie."""

    dtype: torch.dtype
    start: int
    numel: int


def _read(path: Path, *, placed: bool) -> Any:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        order = _content(archive, names["byteorder"]) if "byteorder" in names else b"little"
        if order.decode() != sys.byteorder:
            raise ValueError(f"its byte order is {order!r}")
        places = {name: (data_start(file, info), info.file_size) for name, info in names.items() if name[:5] == "data/"}
        content = _content(archive, names["data.pkl"])
    return _Unpickler(content, path, places, placed=placed).load()


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A small member; without its CRC, which our own writer leaves out."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    assert archive.fp is not None
    start = data_start(archive.fp, info)
    archive.fp.seek(start)
    return archive.fp.read(info.file_size)


def data_start(file: Any, info: zipfile.ZipInfo) -> int:
    """The first byte of an uncompressed member's data. ValueError where it does not lie there."""
    file.seek(info.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} does not lie as torch.save puts it")
    return info.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


class _Unpickler(FrugalUnpickler):
    def __init__(self, content: bytes, path: Path, places: dict[str, tuple[int, int]], *, placed: bool):
        super().__init__(content)
        self.placed = placed
        self.path, self.places, self.size = path, places, path.stat().st_size
        self._mapped: Any = None  # the file as one storage
        self._twins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        key = (module, name)
        if key not in self._twins:
            self._twins[key] = self._twin(module, name)
        return self._twins[key]

    def _twin(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: self._tensor(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("builtins", "set"): set,
            # An enumeration's member, as Python 3.11 pickles it; of anything but our stand-ins there is nothing to get.
            ("builtins", "getattr"): lambda *_: Inert(),
        }
        module = {"__builtin__": "builtins"}.get(module, module)  # in torch.save's old protocol
        return known[module, name] if (module, name) in known else type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> _Place:
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage not in STORAGES or type(numel) is not int:
            raise pickle.UnpicklingError("no storage")
        (start, length), dtype = self.places[f"data/{key}"], STORAGES[storage]
        if numel * dtype.itemsize > length or start + length > self.size:
            raise pickle.UnpicklingError(f"storage {key} is cut off")
        return _Place(dtype, start, numel)

    def _tensor(self, place: Any, offset: Any, size: Any, stride: Any) -> Tensor | Placed:
        if not isinstance(place, _Place) or len(size) != len(stride):
            raise pickle.UnpicklingError("no tensor")
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("no sizes of a tensor")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and last >= place.numel:
            raise pickle.UnpicklingError("a tensor is larger than its storage")
        if self.placed:
            return Placed(place.dtype, tuple(size), place.start + offset * place.dtype.itemsize)
        if self._mapped is None:
            # Private: whatever is written to a view never reaches the file.
            self._mapped = torch.UntypedStorage.from_file(str(self.path), False, self.size)
        storage = self._mapped[place.start : place.start + place.numel * place.dtype.itemsize]
        return torch.empty(0, dtype=place.dtype).set_(storage, offset, tuple(size), tuple(stride))
