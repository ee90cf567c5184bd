"""What a GPU did, by CUPTI's records of kernels and copies alone: torch's profiler also notes each call of the host, which slows the host down.

Takes the library that torch has loaded. Of a record only what all its versions share is read: kind, start, end, and a kernel's name
(CUPTI's reference, CUpti_ActivityKernel9, CUpti_ActivityMemcpy5 and CUpti_ActivityMemset4).
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MEMCPY, MEMSET, CONCURRENT_KERNEL = 1, 2, 10  # CUpti_ActivityKind
NAMES = {MEMCPY: "Memcpy", MEMSET: "Memset"}
BLOCK = 64 << 20  # bytes: few blocks, for each of which Python is called
NAME_AT = 104  # of a kernel's record
_ASKED = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_FULL = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)  # context, stream, block, its size, how much of it is filled


def _library() -> ctypes.CDLL:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcupti" in line}
    assert mapped, "torch has not loaded CUPTI"
    return ctypes.CDLL(sorted(mapped)[0])


class _Blocks:
    """The memory that CUPTI fills."""

    def __init__(self) -> None:
        self.all: dict[int, Any] = {}
        self.full: list[tuple[int, int]] = []  # address, bytes
        self.asked, self.filled = _ASKED(self._asked), _FULL(self._filled)  # CUPTI keeps pointers to them

    def _asked(self, block: Any, size: Any, most: Any) -> None:
        memory = (ctypes.c_uint8 * BLOCK)()
        address = ctypes.addressof(memory)
        self.all[address] = memory
        block[0], size[0], most[0] = address, BLOCK, 0

    def _filled(self, context: Any, stream: int, block: int, size: int, filled: int) -> None:
        self.full.append((block, filled))


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """A list that holds what the device did once the block has ended, in order: name, ts and dur in microseconds."""
    cupti, blocks = _library(), _Blocks()
    events: list[dict[str, Any]] = []

    def call(name: str, *arguments: Any) -> None:
        code = getattr(cupti, name)(*arguments)
        assert code == 0, f"{name} returned {code}"

    call("cuptiActivityRegisterCallbacks", blocks.asked, blocks.filled)
    kinds = (CONCURRENT_KERNEL, MEMCPY, MEMSET)
    for kind in kinds:
        call("cuptiActivityEnable", kind)
    yield events
    torch.cuda.synchronize()
    for kind in kinds:
        call("cuptiActivityDisable", kind)
    call("cuptiActivityFlushAll", 1)
    events += sorted(_records(cupti, blocks.full), key=lambda e: e["ts"])


def _records(cupti: ctypes.CDLL, full: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    names: dict[int, str] = {}
    for block, filled in full:
        record = ctypes.c_void_p()
        while cupti.cuptiActivityGetNextRecord(
            ctypes.c_void_p(block), ctypes.c_size_t(filled), ctypes.byref(record)
        ) == 0:  # fmt: skip
            assert record.value is not None
            kind, start, end = struct.unpack("=I12xQQ", ctypes.string_at(record.value, 32))
            if kind == CONCURRENT_KERNEL:
                at = ctypes.c_void_p.from_address(record.value + NAME_AT).value
                if at not in names:
                    names[at] = ctypes.string_at(at).decode() if at else "?"
                name = names[at]
            else:
                name = NAMES.get(kind, str(kind))
            yield {"name": name, "ts": start / 1000, "dur": (end - start) / 1000}
