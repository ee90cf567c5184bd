"""The ranks of a run: process group, device, and one axis per parallelism.

Ranks are numbered as Megatron numbers them, tensor parallel fastest: rank = tp + TP * (cp + CP * (dp + DP * pp)).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_swift.utils.log import get_logger

AXES = ("pp", "dp", "cp", "tp")  # slowest first
EXPERT_AXES = ("pp", "edp", "ep", "etp")  # the same ranks, seen by the experts of a pipeline stage
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True)
class Sizes:
    """How many ranks share tensors (tp), layers (pp) and sequences (cp); what is left of the world are data-parallel ranks.

    ep  : ranks over which the experts are spread; None for a model without experts, whose axes are not made then.
    etp : ranks that share an expert's tensors; None: as many as tp.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int | None = None
    etp: int | None = None


@dataclass(frozen=True)
class Axis:
    """My place on one axis. ranks: the global ranks along it, me among them. group is None where the axis has one rank."""

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks along the axis."""
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """Who I am. In a run of one process there is no process group at all.

    shard : the ranks that hold the same parameters and see other tokens, dp x cp: over them gradients are summed and state is sharded.
    ends  : the first and the last rank of my pipeline, of which I am one (size 1 for the others): both may hold tied embeddings.
    ep, etp, edp : of a pipeline stage's ranks, those that hold other experts, other parts of my experts, and the same of them.
    experts : ep x etp, all that a token's experts are spread over.
    row, stage : the ranks that share a micro-batch's tokens, cp x tp, and all of a pipeline stage. For models with experts only.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    tp: Axis = Axis()
    cp: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()
    shard: Axis = Axis()
    ends: Axis = Axis()
    ep: Axis = Axis()
    etp: Axis = Axis()
    edp: Axis = Axis()
    experts: Axis = Axis()
    row: Axis = Axis()
    stage: Axis = Axis()

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: those that see different samples."""
        return self.dp.size

    @property
    def dp_rank(self) -> int:
        """My place among the data-parallel ranks."""
        return self.dp.rank

    @property
    def speaks_for_batch(self) -> bool:
        """Whether I am the one that counts a data-parallel rank's batch: tp, cp and pp ranks hold the same one."""
        return self.tp.rank == self.cp.rank == self.pp.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over all ranks, in float64, by one all-reduce. A rank that must not count passes zeros."""
        if self.world_size == 1:  # by way of the device, the host would wait for all that is queued there
            return [float(value) for value in values]
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small object, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def choose_backend(requested: str) -> str:
    """`nccl` where there are GPUs and it was asked for, `gloo` otherwise."""
    return "nccl" if requested == "nccl" and torch.cuda.is_available() else "gloo"


def start(*, backend: str, timeout_minutes: float, sizes: Sizes = Sizes()) -> Mesh:
    """Join the process group that torchrun's environment describes; without one, a mesh of one process."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = choose_backend(backend)
    if sizes.pp > 1:
        _ask_for_queues()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(0, 1, device, backend)
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    assert world % (sizes.tp * sizes.pp * sizes.cp) == 0, (world, sizes)
    grid = np.arange(world).reshape(sizes.pp, -1, sizes.cp, sizes.tp)
    axes = {name: _axis(grid, (name,), rank) for name in AXES}
    ends = _ends(grid, rank) if sizes.pp > 1 else Axis()
    if sizes.ep is not None:
        axes |= _expert_axes(grid, sizes, rank)
    return Mesh(rank, world, device, backend, **axes, shard=_axis(grid, ("dp", "cp"), rank), ends=ends)


def _ask_for_queues() -> None:
    """Have the GPU keep apart what is independent, before its context is made.

    A message waits on the device for its receiver. In one hardware queue with it (Megatron's CUDA_DEVICE_MAX_CONNECTIONS=1) waits all that
    was issued later, the message that the receiver waits for among it; the usual 8 queues may put two streams into one.
    """
    asked = os.environ.get(_QUEUES)
    os.environ[_QUEUES] = "32"
    if asked not in (None, "32"):
        get_logger().warning(
            "%s=%s is raised to 32: pipeline stages could wait for each other for ever", _QUEUES, asked
        )


def _expert_axes(grid: np.ndarray, sizes: Sizes, rank: int) -> dict[str, Axis]:
    etp = sizes.tp if sizes.etp is None else sizes.etp
    assert sizes.ep is not None and grid.size % (sizes.pp * sizes.ep * etp) == 0, (grid.size, sizes)
    second = grid.reshape(sizes.pp, -1, sizes.ep, etp)
    axes = {name: _axis(second, (name,), rank, EXPERT_AXES) for name in ("edp", "ep", "etp")}
    axes["experts"] = _axis(second, ("ep", "etp"), rank, EXPERT_AXES)
    return axes | {"row": _axis(grid, ("cp", "tp"), rank), "stage": _axis(grid, ("dp", "cp", "tp"), rank)}


def _ends(grid: np.ndarray, rank: int) -> Axis:
    pairs = [[int(line[0]), int(line[-1])] for line in grid.reshape(grid.shape[0], -1).T]
    middle = [[int(r)] for line in grid.reshape(grid.shape[0], -1).T for r in line[1:-1]]
    return _line_of(pairs + middle, rank)


def _axis(grid: np.ndarray, names: tuple[str, ...], rank: int, order: tuple[str, ...] = AXES) -> Axis:
    """My axis along `names` of the grid's axes; every rank makes every group, as torch wants it."""
    last = [order.index(name) for name in names]
    others = [i for i in range(grid.ndim) if i not in last]
    size = int(np.prod([grid.shape[i] for i in last]))
    lines = grid.transpose(*others, *last).reshape(-1, size).tolist()
    return _line_of(lines, rank)


def _line_of(lines: list[list[int]], rank: int) -> Axis:
    mine = next(line for line in lines if rank in line)
    groups = {
        tuple(line): dist.new_group(line) for line in lines if len(line) > 1
    }  # every rank makes all of them, in one order
    return Axis(mine.index(rank), tuple(mine), groups.get(tuple(mine)))


def part_of(axis: Axis, size: int) -> Axis:
    """Consecutive runs of `size` ranks of an axis as axes of their own (ranks that replicate a key/value head). Every rank calls it."""
    if size == axis.size or size == 1:
        return axis if size > 1 else Axis(0, (axis.ranks[axis.rank],))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, axis.ranks)
    lines = sorted({line[i : i + size] for line in everyone for i in range(0, len(line), size)})
    return _line_of([list(line) for line in lines], axis.ranks[axis.rank])


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
