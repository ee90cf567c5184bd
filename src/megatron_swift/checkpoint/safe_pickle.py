"""The `.metadata` of a torch.distributed.checkpoint folder, read without running anything that is in it.

It is a pickle. Its known classes become inert twins of our own, made for this one file, so that not even attributes of torch's classes can
be changed; every other class becomes an empty stand-in, and nothing is imported or called for it.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_ENUM = "_MEM_FORMAT_ENCODING"


class _Record:
    """An object of attributes, as the pickle sets them."""

    fqn: str = ""
    offset: tuple[int, ...] | None = None

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state:  # TensorProperties: dtype, layout, ...
            self.__dict__["dtype"] = state[0]

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Record) and (self.fqn, self.offset) == (other.fqn, other.offset)


class _Unknown:
    """Stands for an object whose class we do not import (Megatron's own save plans, for instance)."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_metadata(path: Path) -> Any:
    """The object of attributes that the file holds. Raises nearly anything where it is damaged or forged."""
    return _Unpickler(path.read_bytes()).load()


class FrugalUnpickler(pickle.Unpickler):
    """Asks for no memory that the pickle does not fill. To go through the bytes beforehand takes about a microsecond an operation.

    Raises ValueError where they name a length or a place that they have no bytes for: Python's own would first ask for all that memory.
    """

    def __init__(self, content: bytes):
        for number, (opcode, argument, at) in enumerate(pickletools.genops(content)):
            # Places are counted up from 0, one for an operation at most.
            if "PUT" in opcode.name and (argument or 0) > number:
                raise ValueError(
                    f"byte {at} of the pickle puts something at place {argument}, after {number} operations"
                )
        super().__init__(io.BytesIO(content))


class _Unpickler(FrugalUnpickler):
    def __init__(self, content: bytes):
        super().__init__(content)
        self._twins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        key = module, name
        if key not in self._twins:
            self._twins[key] = _twin(module, name)
        return self._twins[key]


def _twin(module: str, name: str) -> Any:
    """What stands for a global of this name; one per file, whose attributes nobody else sees."""
    builtin: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch", "Size"): torch.Size,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("builtins", "set"): set,
        ("builtins", "getattr"): lambda owner, member: _enum_member(owner, member),
        ("torch.serialization", "_get_layout"): lambda layout: str(layout),
    }
    if (module, name) in builtin:
        return builtin[module, name]
    if module == _METADATA and name == _ENUM:
        return type(name, (_Unknown,), {"is_enum": True})
    if module in (_METADATA, _FILESYSTEM) and "." not in name:
        return type(name, (_Record,), {})
    return type(name, (_Unknown,), {})


def _enum_member(owner: Any, name: str) -> str:
    """Enum members are pickled as getattr(class, name): allowed for the one enum that a `.metadata` holds."""
    if not (isinstance(owner, type) and issubclass(owner, _Unknown) and owner.__dict__.get("is_enum")):
        raise pickle.UnpicklingError(f"getattr on {owner!r} is not allowed")
    return name
