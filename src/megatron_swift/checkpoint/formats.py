"""Which format a checkpoint's folder has is found out from what is in it, whatever `ckpt_format` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_swift.checkpoint.dcp import DcpFolder
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.checkpoint.stored import StoredTensors
from megatron_swift.checkpoint.torch_folder import TorchFolder, rank_files
from megatron_swift.checkpoint.zarr_folder import ZarrFolder, is_zarr


def open_tensors(folder: Path, specs: Mapping[str, TensorSpec], *, num_layers: int) -> StoredTensors:
    """The tensors of a torch_dist, torch or zarr checkpoint, under torch_dist's keys and in its shapes.

    Raises CheckpointError where it is none of them.
    """
    if rank_files(folder):
        return TorchFolder(folder, specs, num_layers=num_layers)
    if is_zarr(folder):
        return ZarrFolder(folder)
    return DcpFolder(folder)
