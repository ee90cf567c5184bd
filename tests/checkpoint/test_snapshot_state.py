"""The optimizer's state in a folder of its own: Megatron sees the model only, we see both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from megatron_swift.checkpoint.dcp import DcpFolder, Piece, save_pieces
from megatron_swift.checkpoint.manifest import sum_file
from megatron_swift.checkpoint.ranks import all_ranks, single
from megatron_swift.checkpoint.snapshot import Snapshot
from megatron_swift.testing import run_ranks

MODEL, STATE = "decoder.w", "optimizer.state.exp_avg.decoder.w"


def values(key):
    return torch.arange(12.0).reshape(4, 3) + len(key)


def piece(key, start, rows):
    part = values(key)[start : start + rows]
    return Piece(key, lambda: part, part.dtype, tuple(part.shape), (start, 0), (4, 3))


def whole(folder, key):
    return DcpFolder(folder).read(key, (0, 0), (4, 3))


def _write(rank, folder):
    """Rank 0 holds the weights, rank 1 the state."""
    dist.init_process_group("gloo")
    Snapshot([piece(STATE if rank else MODEL, 0, 4)], {}).write(folder, all_ranks())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_state_lies_apart(tmp_path, ranks):
    if ranks == 1:
        entries = Snapshot([piece(MODEL, 0, 4), piece(STATE, 0, 2), piece(STATE, 2, 2)], {}).write(tmp_path, single())
        files = {str(p.relative_to(tmp_path)): sum_file(p) for p in tmp_path.rglob("*") if p.is_file()}
        assert entries == files and "optimizer/.metadata" in files
    else:
        run_ranks(_write, 2, tmp_path)
    assert set(FileSystemReader(tmp_path).read_metadata().state_dict_metadata) == {MODEL}
    assert set(FileSystemReader(tmp_path / "optimizer").read_metadata().state_dict_metadata) == {STATE}
    assert all(torch.equal(whole(tmp_path, key), values(key)) for key in (MODEL, STATE))


def test_no_state_no_folder(tmp_path):
    Snapshot([piece(MODEL, 0, 4)], {}).write(tmp_path, single())
    assert not (tmp_path / "optimizer").exists()


def test_state_beside_the_weights_is_read(tmp_path):
    """As older versions wrote it."""
    save_pieces(tmp_path, [piece(MODEL, 0, 4), piece(STATE, 0, 4)], distributed=False)
    assert all(torch.equal(whole(tmp_path, key), values(key)) for key in (MODEL, STATE))


def test_the_inner_folder_does_not_speak_for_the_model(tmp_path):
    Snapshot([piece(MODEL, 0, 4), piece(STATE, 0, 4)], {}).write(tmp_path, single())
    save_pieces(tmp_path / "optimizer", [piece("decoder.other", 0, 4)], distributed=False)
    assert set(DcpFolder(tmp_path).tensors) == {MODEL}
