"""What one rank puts into a checkpoint: tensors that are read when they are written, and small files; in either format that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_swift.checkpoint.dcp import OPTIMIZER, OPTIMIZER_KEYS, Piece, save_pieces
from megatron_swift.checkpoint.manifest import Entry, write_file
from megatron_swift.checkpoint.megatron_common import COMMON
from megatron_swift.checkpoint.ranks import Group
from megatron_swift.checkpoint.torch_file import write_torch
from megatron_swift.utils.files import fsync_folder

TORCH_DIST = "torch_dist"
Buffers = dict[tuple[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Snapshot:
    """pieces: this rank's boxes. files: this rank's small files by name. objects: what it stores by key besides tensors.

    content     : what a file of ckpt_format torch holds besides the model, on rank 0.
    file_format : "torch_dist" or "torch"; the optimizer's state is written in the former anyway.
    """

    pieces: Sequence[Piece]
    files: Mapping[str, bytes]
    objects: Mapping[str, bytes] = field(default_factory=dict)
    content: Mapping[str, Any] | None = None
    file_format: str = TORCH_DIST

    def write(self, folder: Path, group: Group) -> dict[str, Entry]:
        """Write all into a folder; returns the checksums. Every rank calls it, and what fails in a piece is raised on all.

        The optimizer's state gets a folder of its own in it, so that Megatron finds its model and nothing else beside `common.pt`.
        """
        model = [piece for piece in self.pieces if not piece.key.startswith(OPTIMIZER_KEYS)]
        state = [piece for piece in self.pieces if piece.key.startswith(OPTIMIZER_KEYS)]
        any_state = any(group.gather(bool(state)))
        # The pieces first: their ranks meet in collectives, which one rank with a full disk must not miss.
        files, entries = dict(self.files), {}
        if self.file_format == TORCH_DIST:
            entries = _save(folder, model, group, self.objects)
        else:
            write_torch(folder, model, group, self.content)
            files.pop(COMMON, None)
        if any_state:
            inner = folder / OPTIMIZER
            entries |= {f"{OPTIMIZER}/{name}": entry for name, entry in _save(inner, state, group, {}).items()}
            fsync_folder(inner)
        return entries | {name: write_file(folder / name, data) for name, data in files.items()}

    def copied(self, buffers: Buffers) -> Snapshot:
        """The same with the tensors' values as they are now, in host memory.

        buffers : where the copies lie; given again, they are overwritten, so that no memory is asked for a second time.
        """
        copies = [_copied(piece, buffers) for piece in self.pieces]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory return before they are done
        return replace(self, pieces=copies)


def _save(folder: Path, pieces: Sequence[Piece], group: Group, objects: Mapping[str, bytes]) -> dict[str, Entry]:
    distributed = group.process_group is not None
    return save_pieces(folder, pieces, distributed=distributed, process_group=group.process_group, objects=objects)


def _copied(piece: Piece, buffers: Buffers) -> Piece:
    values, key = piece.read().detach(), (piece.key, piece.offset)
    if key not in buffers:
        buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    copy = buffers[key].copy_(values, non_blocking=values.is_cuda)
    return replace(piece, read=lambda: copy)
