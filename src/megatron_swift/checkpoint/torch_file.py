"""`ckpt_format torch`, written: one file that holds the whole model, as Megatron-LM has it without model parallelism.

Rank 0 makes the file with its tensors left out, then puts in what the ranks hand over, a piece of each at a time: nobody ever holds a model.
The keys are those of Transformer Engine's GPTModel.state_dict(), with the experts one by one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_swift.checkpoint.archive import Placed, read_archive
from megatron_swift.checkpoint.dcp import Piece, disk_full, is_disk_full, without_zip_checksums
from megatron_swift.checkpoint.ranks import Group
from megatron_swift.checkpoint.torch_folder import FILE

FOLDER = "mp_rank_00"
_STACKED = re.compile(r"^decoder\.layers\.(?!\d)")
_EXPERTS = ".mlp.experts.experts."
# A module of these has an (empty) extra state in a state_dict, which loading with strict=True asks for.
_EXTRA = re.compile(r"^(.*\.linear_(?:qkv|proj|fc1|fc2)|output_layer)\.weight$")


class _Box(NamedTuple):
    """A box of a tensor of the file: `part` picks its values out of a piece."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    part: tuple[int, ...]


class _Described(NamedTuple):
    """A piece without its values."""

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def write_torch(folder: Path, pieces: Sequence[Piece], group: Group, content: Mapping[str, Any] | None) -> None:
    """Write the pieces of all ranks into a file below `folder`, which exists. Every rank of the group calls it.

    content : what the file holds besides the model; only rank 0's counts.
    What fails on rank 0 or in a piece is raised on all ranks, once they are through.
    """
    mine = [_Described(p.key, p.dtype, p.size, p.offset, p.shape) for p in pieces]
    everyone: list[list[_Described]] = group.gather(mine)
    file, failure = None, None
    if group.rank == 0:
        try:
            file = _TorchFile(folder / FOLDER / FILE, [p for found in everyone for p in found], content or {})
        except Exception as error:  # the other ranks are about to hand over what they have
            failure = error
    for number in range(max(map(len, everyone))):
        values = _values(pieces[number]) if number < len(pieces) else None
        for rank, handed in enumerate(_hand_over(values, group)):
            failure = failure or (handed if isinstance(handed, Exception) else None)
            if file is not None and failure is None and isinstance(handed, Tensor):
                try:
                    file.put(everyone[rank][number], handed)
                except Exception as error:
                    failure = error
    if file is not None:
        file.close()
    failed = next((f for f in group.gather(failure) if f is not None), None)
    if failed is not None:
        raise failed


def _values(piece: Piece) -> Tensor | Exception:
    """A piece's values on the CPU, or why there are none, for rank 0 to raise."""
    try:
        return piece.read().detach().cpu().contiguous()
    except Exception as error:
        return error


def _hand_over(values: Tensor | Exception | None, group: Group) -> list[Any]:
    """On rank 0 every rank's, in order; elsewhere nothing."""
    if group.process_group is None:
        return [values]
    size = dist.get_world_size(group.process_group)
    found: list[Any] | None = [None] * size if group.rank == 0 else None
    dist.gather_object(values, found, dst=0, group=group.process_group)
    return found or []


class _TorchFile:
    """The file while it is filled."""

    def __init__(self, path: Path, pieces: Sequence[_Described], content: Mapping[str, Any]):
        path.parent.mkdir()
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for piece in pieces:
            tensors |= {box.name: (box.shape, piece.dtype) for box in _boxes(piece)}
        with FakeTensorMode():
            model: dict[str, Any] = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in tensors.items()}
        model |= {f"{match[1]}._extra_state": None for name in tensors if (match := _EXTRA.match(name))}
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True), without_zip_checksums():
                torch.save({**content, "model": model}, path)
        except RuntimeError as error:
            raise disk_full(path.parent) if is_disk_full(error) else error from None
        self.places: dict[str, Placed] = read_archive(path, placed=True)["model"]
        self.file = os.open(path, os.O_WRONLY)

    def put(self, piece: _Described, values: Tensor) -> None:
        """Write a piece's values where they belong."""
        for box in _boxes(piece):
            place = self.places[box.name]
            part = values.reshape(piece.size)[box.part].reshape(box.size)
            # Rows of all columns lie together; of some columns each lies apart.
            together = box.size[1:] == box.shape[1:]
            for number, rows in enumerate([part] if together else part):
                at = box.offset[0] + number
                first = at * box.shape[1] + box.offset[1] if len(box.shape) > 1 else at
                self._write(rows, place.start + first * place.dtype.itemsize)

    def _write(self, values: Tensor, start: int) -> None:
        view = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(view):
            done = os.pwrite(self.file, view, start)
            view, start = view[done:], start + done

    def close(self) -> None:
        """Through to the disk: rank 0 sums the file when all is done."""
        os.close(self.file)


def _boxes(piece: _Described) -> Iterator[_Box]:
    """The tensors of the file that a piece is part of, a layer's and an expert's each."""
    key, stack = piece.key, 0
    if _STACKED.match(key):
        assert piece.size[0] == 1, piece
        key, stack = f"decoder.layers.{piece.offset[0]}.{key.removeprefix('decoder.layers.')}", 1
    if _EXPERTS not in key:
        part = (0,) * stack
        yield _Box(key, piece.shape[stack:], piece.offset[stack:], piece.size[stack:], part)
        return
    rest = stack + 1
    for number in range(piece.size[stack]):
        name = key.replace(_EXPERTS, f".mlp.experts.local_experts.{piece.offset[stack] + number}.")
        part = (*(0,) * stack, number)
        yield _Box(name, piece.shape[rest:], piece.offset[rest:], piece.size[rest:], part)
