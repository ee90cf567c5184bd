"""torch.distributed.checkpoint folders in Megatron-Core's `torch_dist` layout, written and read as boxes of global tensors.

A rank hands over the boxes it holds; no DTensor and no flattening stand between them and the disk. Reading needs no process group, and
runs nothing that is in a folder (safe_pickle).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_swift.checkpoint.chunks import read_rows
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.checkpoint.manifest import Entry, SummedFiles, write_file
from megatron_swift.checkpoint.safe_pickle import read_metadata
from megatron_swift.checkpoint.stored import Chunk, Stored, StoredTensors
from megatron_swift.utils.errors import CheckpointError, StorageError

OPTIMIZER = (
    "optimizer"  # the folder, in a checkpoint, with a torch_dist folder of the state that Megatron has no names for
)
COPY_AHEAD = 10_000_000  # bytes; torch's own
OPTIMIZER_KEYS = f"{OPTIMIZER}."
_CHAINED = re.compile(r"^chained_\d+\.(?=optimizer\.)")
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor: `read()` gives its values, of `size`, which lie at `offset` in a tensor of `shape`.

    All three have the same number of dims. A piece is read when it is written, so that a conversion never holds a whole model.
    """

    key: str
    read: Callable[[], Tensor]
    dtype: torch.dtype
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def pieces_of(
    spec: TensorSpec,
    rows: Tensor,
    start: int,
    *,
    num_layers: int,
    columns: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> list[Piece]:
    """The pieces that hold rows from `start` (of `columns`) of a parameter; a layer's lie in its stacked tensor.

    dtype : what they are cast to when they are written, so that no second copy of the model is made; None keeps theirs.
    """
    kept, key, shape = dtype or rows.dtype, prefix + spec.megatron_key, spec.megatron_shape(num_layers)

    def reader(part: Tensor, size: tuple[int, ...]) -> Callable[[], Tensor]:
        return lambda: part.to(kept).reshape(size)

    return [
        Piece(key, reader(rows[first - start : last - start], size), kept, size, offset, shape)
        for (first, last), offset, size in spec.megatron_boxes(start, start + len(rows), columns)
    ]


class _SavePieces(DefaultSavePlanner):
    """Plans exactly the pieces it is given. Each box must come from one rank only."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        # Not the parent's: it flattens the state and would drop a rank's empty part.
        self.state_dict, self.is_coordinator, self.mappings = state_dict, is_coordinator, {}

    def create_local_plan(self) -> SavePlan:
        self.pieces = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in self.state_dict["pieces"]}
        items = [
            WriteItem(
                index=MetadataIndex(p.key, torch.Size(p.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.size)),
                    properties=TensorProperties(dtype=p.dtype),
                    size=torch.Size(p.shape),
                ),
            )
            for p in self.state_dict["pieces"]
        ]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.state_dict["objects"]]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.state_dict["objects"][write_item.index.fqn])
        # The global plan adds a hint to the index; equality of MetadataIndex ignores it.
        return self.pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)].read().detach().contiguous()


def save_pieces(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    distributed: bool,
    process_group: dist.ProcessGroup | None = None,
    threads: int = 1,
    objects: Mapping[str, bytes] | None = None,
    one_by_one: bool = False,
) -> dict[str, Entry]:
    """Write the pieces of all ranks into `folder`, which exists; returns the checksums of the files that this rank wrote.

    objects : things that are no tensors, by key, as torch.save made them; each from one rank.
    one_by_one : a thread reads no piece before its last one is written, also where torch would copy ahead for a GPU.
    With `distributed` every rank of the group (None: the default one) must call it. threads: files per rank.
    What fails on one rank is raised on all of them.
    """
    writer = FileSystemWriter(
        folder,
        single_file_per_rank=True,
        sync_files=True,
        thread_count=threads,
        per_thread_copy_ahead=0 if one_by_one else COPY_AHEAD,
    )
    writer.fs = files = SummedFiles()
    kept = [p for p in pieces if math.prod(p.size)]
    planner = _SavePieces()
    try:
        with warnings.catch_warnings(), without_zip_checksums():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is what no_dist asks for
            dcp.save(
                {"pieces": kept, "objects": objects or {}},
                storage_writer=writer,
                planner=planner,
                process_group=process_group,
                no_dist=not distributed,
            )
    except CheckpointException as error:  # a BaseException, which nobody above expects
        raise _cause(error, folder) from None
    if files.failure is not None:  # in a thread: torch has gone on without its file
        raise disk_full(folder) if is_disk_full(files.failure) else files.failure
    if planner.is_coordinator:
        files.entries["metadata.json"] = write_file(folder / "metadata.json", json.dumps(METADATA_JSON).encode())
    return files.entries


@contextlib.contextmanager
def without_zip_checksums() -> Iterator[None]:
    """torch.save leaves its own CRCs out, which torch.load does not look at: the manifest has better ones, of all bytes.

    Measured: 0.17 s per GB and core, half of what our checksums cost.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _cause(error: CheckpointException, folder: Path) -> BaseException:
    """What the first rank that failed had raised."""
    first = min(error.failures.items())[1][0]
    return disk_full(folder) if is_disk_full(first) else first


def is_disk_full(error: BaseException) -> bool:
    """Whether that is what torch.save's error means; it is all that it says."""
    return "unexpected pos" in str(error)


def disk_full(folder: Path) -> StorageError:
    """The error of a file that could not be written to its end."""
    free = shutil.disk_usage(folder).free / 1e9
    return StorageError(
        f"cannot write to {folder}: a file could not be written to its end",
        why=f"the disk or a quota is full ({free:.1f} GB free)",
        do="free space or choose another folder",
    )


class DcpFolder(StoredTensors):
    """A DCP folder, read with no process group, with the optimizer's state that lies in a folder of its own in it."""

    def __init__(self, folder: Path):
        super().__init__(folder, *_described(folder))
        self.tensors |= optimizer_tensors(folder)


def optimizer_tensors(folder: Path) -> dict[str, Stored]:
    """The optimizer's state that lies in a folder of its own in a checkpoint, if there is one."""
    inner = folder / OPTIMIZER
    found = _described(inner)[0] if (inner / ".metadata").is_file() else {}
    return {key: stored for key, stored in found.items() if key.startswith(OPTIMIZER_KEYS)}


def _described(folder: Path) -> tuple[dict[str, Stored], dict[str, tuple[int, ...]]]:
    """The tensors of a folder, and those of them that are cut into grids."""
    try:
        metadata = read_metadata(folder / ".metadata")
        tensors = _stored_tensors(metadata, folder)
        return tensors, _cut_tensors(metadata, tensors)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a torch_dist checkpoint: it has no .metadata",
            do="give a folder that holds iter_* folders",
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(
            f"{folder / '.metadata'} cannot be read: {error!r}", do="the file is damaged; use another checkpoint"
        ) from None


def _name(key: Any) -> str:
    """Megatron-Core 0.11 numbers the optimizers of a mixture of experts, which hold different parameters."""
    return _CHAINED.sub("", str(key))


def _stored_tensors(metadata: Any, folder: Path) -> dict[str, Stored]:
    """The tensors of a `.metadata` as plain values. Raises nearly anything where it is damaged or forged."""
    found = {}
    places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
    for key, value in metadata.state_dict_metadata.items():
        name = _name(key)
        if type(value).__name__ != TensorStorageMetadata.__name__:
            continue
        shape, dtype, chunks = _ints(value.size), value.properties.dtype, []
        for chunk in value.chunks:
            info = places[key, chunk.offsets]
            offset, size = _ints(chunk.offsets), _ints(chunk.sizes)
            start, length = _ints((info.offset, info.length))
            if len(offset) != len(shape) or len(size) != len(shape) or not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key} contradicts itself")
            record = _Record(name, folder, str(info.relative_path), start, length, dtype, size)
            chunks.append(Chunk(offset, size, record.read))
        found[name] = Stored(shape, dtype, tuple(chunks))
    return found


def _cut_tensors(metadata: Any, tensors: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Megatron-Core 0.11 notes the real shape of what it cut beside the metadata, under this name."""
    notes = getattr(metadata, "mcore_data", None)
    found = {}
    for key, note in (notes if isinstance(notes, dict) else {}).items():
        real, name = note.get("nd_reformulated_orig_global_shape") if isinstance(note, dict) else None, _name(key)
        if real is not None and name in tensors:
            shape, grid = _ints(real), tensors[name].shape[:-1]
            if len(grid) != len(shape) or any(n < 1 or size % n for size, n in zip(shape, grid, strict=True)):
                raise ValueError(f"{key} contradicts itself")
            found[name] = shape
    return found


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


@dataclass(frozen=True)
class _Record:
    """A box of tensor `key` that lies in bytes [start, start + length) of a file."""

    key: str
    folder: Path
    file: str
    start: int
    length: int
    dtype: torch.dtype
    size: tuple[int, ...]

    def read(self, rows: tuple[int, int], out: Tensor | None) -> Tensor:
        """Some rows, along the first dim that is longer than 1; in `out`, if it is given."""
        if Path(self.file).name != self.file or self.file in ("", ".."):
            raise CheckpointError(
                f"{self.folder / '.metadata'} sends {self.key} to {self.file!r}, outside the folder",
                do="do not use this folder",
            )
        path = self.folder / self.file
        try:
            with open(path, "rb", buffering=0) as file:
                return read_rows(file, self.start, self.length, dtype=self.dtype, size=self.size, rows=rows, out=out)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but .metadata names it", do="use another checkpoint") from None
        except Exception as error:  # torch.load of damaged bytes raises nearly anything
            raise CheckpointError(f"{path} is damaged at {self.key}: {error}", do="use another checkpoint") from None
