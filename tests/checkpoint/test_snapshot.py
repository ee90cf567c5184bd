"""A snapshot's copy keeps the values of its moment, in memory that is used again."""

from __future__ import annotations

import torch

from megatron_swift.checkpoint.dcp import DcpFolder, Piece
from megatron_swift.checkpoint.manifest import sum_file
from megatron_swift.checkpoint.ranks import single
from megatron_swift.checkpoint.snapshot import Snapshot


def snapshot_of(tensor: torch.Tensor) -> Snapshot:
    halves = [
        Piece("w", lambda half=half: tensor[half : half + 2], tensor.dtype, (2, 3), (half, 0), (4, 3))
        for half in (0, 2)
    ]
    return Snapshot(halves, {"state.json": b"{}"})


def test_written_by_reference_or_as_copied(tmp_path):
    tensor, buffers = torch.zeros(4, 3), {}
    live, copied = snapshot_of(tensor), snapshot_of(tensor).copied(buffers)
    tensor += 1
    for name, snapshot, expected in (("live", live, 1.0), ("copied", copied, 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        entries = snapshot.write(folder, single())
        assert torch.equal(DcpFolder(folder).read("w", (0, 0), (4, 3)), torch.full((4, 3), expected))
        assert entries == {path.name: sum_file(path) for path in folder.iterdir()}
        assert (folder / "state.json").read_bytes() == b"{}"


def test_memory_is_used_again():
    tensor, buffers = torch.zeros(4, 3), {}
    first = snapshot_of(tensor).copied(buffers)
    places = [piece.read().data_ptr() for piece in first.pieces]
    tensor += 5
    second = snapshot_of(tensor).copied(buffers)
    assert [piece.read().data_ptr() for piece in second.pieces] == places and len(buffers) == 2
    assert all(bool((piece.read() == 5).all()) for piece in second.pieces)
