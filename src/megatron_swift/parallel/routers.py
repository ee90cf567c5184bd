"""What routers must know of a micro-batch that is cut over ranks, and what they report after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_swift.data.types import Batch
from megatron_swift.kernels.to_device import to_device
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.routing import LayerRecord, Routing
from megatron_swift.parallel.context import zigzag
from megatron_swift.parallel.mesh import Mesh


def routings(batches: Sequence[Batch], mesh: Mesh, *, sequence_parallel: bool, scale: Tensor | None) -> list[Routing]:
    """One Routing per micro-batch of a step, in order. scale: of the routers' losses, None where nothing is trained."""
    found: list[Routing] = []
    for batch in batches:
        found.append(_routing(batch, mesh, sequence_parallel, scale, tuple(found)))
    return found


def _routing(
    batch: Batch, mesh: Mesh, sequence_parallel: bool, scale: Tensor | None, earlier: tuple[Routing, ...]
) -> Routing:
    lengths = np.asarray(batch.lengths)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    real = batch.real if batch.real is not None else batch.lengths
    is_real = batch.positions < np.asarray(real)[segment]
    mine = np.arange(len(segment))
    if mesh.cp.size > 1:
        mine = zigzag(batch.lengths, cp=mesh.cp.size, rank=mesh.cp.rank).numpy()
    if sequence_parallel:
        mine = mine.reshape(mesh.tp.size, -1)[mesh.tp.rank]
    kept = np.flatnonzero(is_real[mine])
    place = mine[kept]

    def put(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), mesh.device)

    return Routing(
        index=None if len(kept) == len(mine) else put(kept),
        place=put(place),
        sequence=put(segment[place]),
        lengths=put(np.asarray([n for n in real if n])),
        count=int(sum(real)),
        scale=scale,
        earlier=earlier,
    )


@dataclass(frozen=True)
class LayerReport:
    """A sparse layer over the global batch. load: [E] tokens sent to each expert, with how many `dropped` in all.

    balance, z : mean over micro-batches of the balancing loss (1 for an even load) and of the z-loss, without their weights.
    entropy    : mean over tokens of the entropy of the router's probabilities, in nats.
    """

    number: int
    load: np.ndarray
    dropped: int
    balance: float
    z: float
    entropy: float

    @property
    def busiest(self) -> float:
        """The largest load over the even one."""
        return float(self.load.max() / max(self.load.mean(), 1e-9))


class RouterTotals:
    """Sums over the micro-batches of a step, on the device until they are asked for."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        assert cfg.moe is not None
        self.moe, self.mesh = cfg.moe, mesh
        # By layer: load of each expert, dropped, balance, z, entropy. The last row: micro-batches.
        self.sums = torch.zeros(cfg.num_layers + 1, self.moe.num_experts + 4, dtype=torch.float64, device=mesh.device)

    def add(self, routed: Sequence[Routing]) -> None:
        """Take up what the layers of this rank recorded."""
        for routing in routed:
            for number, record in routing.records.items():
                self.sums[number] += _as_row(record)
        if self.mesh.speaks_for_batch:
            self.sums[-1, 0] += len(routed)

    def take(self) -> Tensor:
        """The sums over all ranks, on the device, and start anew. One all-reduce; every rank must call it."""
        whole, self.sums = self.mesh.sum_(self.sums), torch.zeros_like(self.sums)
        return whole

    def reports(self, taken: np.ndarray) -> tuple[LayerReport, ...]:
        """Of all layers, from what `take` gave."""
        sums = taken.reshape(self.sums.shape)
        rows, experts = max(sums[-1, 0], 1.0), self.moe.num_experts
        reports = []
        for number in np.flatnonzero(self.moe.sparse_layers):
            load, (dropped, balance, z, entropy) = sums[number, :experts], sums[number, experts:]
            tokens = max(load.sum() / self.moe.topk, 1.0)
            reports.append(LayerReport(int(number), load, int(dropped), balance / rows, z / rows, entropy / tokens))
        return tuple(reports)


def _as_row(record: LayerRecord) -> Tensor:
    rest = torch.stack([record.dropped, record.balance, record.z, record.entropy])
    return torch.cat([record.load, rest]).double()
