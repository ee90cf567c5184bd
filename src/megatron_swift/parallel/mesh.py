"""The ranks of a run: process group, device, and the data-parallel axis."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """Who I am. `dp` is None in a run of one process, which then has no process group at all."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    dp: DeviceMesh | None

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.dp.size() if self.dp is not None else 1

    @property
    def dp_rank(self) -> int:
        """My place among the data-parallel ranks."""
        return self.dp.get_local_rank() if self.dp is not None else 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over all data-parallel ranks, in float64, by one all-reduce."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(tensor)
        return tensor.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel ranks, in place."""
        if self.dp is not None:
            dist.all_reduce(tensor, group=self.dp.get_group())
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small object, on every rank."""
        if self.dp is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def choose_backend(requested: str) -> str:
    """`nccl` where there are GPUs and it was asked for, `gloo` otherwise."""
    return "nccl" if requested == "nccl" and torch.cuda.is_available() else "gloo"


def start(*, backend: str, timeout_minutes: float) -> Mesh:
    """Join the process group that torchrun's environment describes; without one, a mesh of one process."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = choose_backend(backend)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(0, 1, device, backend, None)
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    return Mesh(rank, world, device, backend, init_device_mesh(device.type, (world,), mesh_dim_names=("dp",))["dp"])


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
