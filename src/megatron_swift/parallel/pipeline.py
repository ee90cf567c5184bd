"""Pipeline parallelism: a schedule is a list of operations, and one small runtime executes any of them.

Shapes come from the micro-batches, which every stage reads, so they may differ from one micro-batch to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_swift.parallel.mesh import Axis


class Op(NamedTuple):
    """Forward or backward of one micro-batch through one of this rank's chunks."""

    forward: bool
    chunk: int
    micro: int


def one_forward_one_backward(*, stages: int, rank: int, chunks: int, num_micro: int) -> list[Op]:
    """1F1B, and with several chunks per rank its interleaved form (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Interleaving takes micro-batches in runs of `stages`; a shorter last run is allowed.
    """
    total = num_micro * chunks
    if chunks == 1:
        forwards = [Op(True, 0, micro) for micro in range(num_micro)]
        warm = min(num_micro, stages - rank - 1)
    else:
        forwards = [
            Op(True, chunk, micro)
            for start in range(0, num_micro, stages)
            for chunk in range(chunks)
            for micro in range(start, min(start + stages, num_micro))
        ]
        warm = min(total, (stages - rank - 1) * 2 + (chunks - 1) * stages)
    backwards = [Op(False, chunks - 1 - op.chunk, op.micro) for op in forwards]
    ops = forwards[:warm]
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        ops += [forward, backward]
    return ops + backwards[total - warm :]


def forward_only(*, stages: int, rank: int, chunks: int, num_micro: int) -> list[Op]:
    """The forward operations alone, for evaluation."""
    return [
        op
        for op in one_forward_one_backward(stages=stages, rank=rank, chunks=chunks, num_micro=num_micro)
        if op.forward
    ]


# Ranks from a message's sender to its receiver.
_STEPS = {"forward": 1, "backward": -1}


class Links:
    """Point-to-point groups of my pipeline: one per direction and per crossing of the ring's end.

    Each carries messages one way between two neighbours only, in the order both sides expect, so that no order of sends and receives
    can deadlock, with gloo or NCCL. Sends must stay asynchronous.

    device : of the messages.  ring : whether the last rank sends forward to the first, as virtual stages do.
    """

    def __init__(self, axis: Axis, device: torch.device, *, ring: bool):
        self.axis = axis
        everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(everyone, axis.ranks)
        self.groups: dict[tuple[str, bool], dist.ProcessGroup] = {}
        for line in sorted(set(everyone)):
            for direction in _STEPS:
                for wraps in (False, True):
                    group = dist.new_group(list(line))
                    if line == axis.ranks:
                        self.groups[direction, wraps] = group
        self._meet(device, ring=ring)

    def _meet(self, device: torch.device, *, ring: bool) -> None:
        """One message over every link, boundary by boundary, so that no communicator is left to be made while a schedule runs.

        NCCL makes one with the first message of two ranks. Both hosts wait for each other then, and for what their GPUs have under way, which
        may be a message that only goes on once the other host has come further.
        """
        token = torch.zeros(1, device=device)
        size, rank = self.axis.size, self.axis.rank
        for direction, step in _STEPS.items():
            for sender in range(size):
                if not ring and not 0 <= sender + step < size:
                    continue
                if rank == sender:
                    work, _ = self.send(token, direction)
                    if work is not None:
                        work.wait()
                elif rank == (sender + step) % size:
                    self.receive(token, direction)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def send(self, tensor: Tensor, direction: str) -> tuple[dist.Work | None, Tensor]:
        """Start a send to the neighbour in `direction`; keep what is returned until it has been waited for."""
        to = self.axis.rank + _STEPS[direction]
        wraps = not 0 <= to < self.axis.size
        tensor = tensor.contiguous()
        return dist.isend(tensor, self.axis.ranks[to % self.axis.size], group=self.groups[direction, wraps]), tensor

    def receive(self, into: Tensor, direction: str) -> Tensor:
        """Receive what travels in `direction` from the neighbour it comes from."""
        source = self.axis.rank - _STEPS[direction]
        wraps = not 0 <= source < self.axis.size
        dist.recv(into, self.axis.ranks[source % self.axis.size], group=self.groups[direction, wraps])
        return into


# step(chunk, micro-batch, hidden from the previous stage or None) -> hidden states, or on the last stage the loss
Forward = Callable[[int, int, Tensor | None], Tensor]


@dataclass
class Pipeline:
    """Runs this rank's chunks. Chunk c of rank r is stage c * axis.size + r of the whole."""

    axis: Axis
    links: Links
    chunks: int
    saved: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def run(
        self,
        num_micro: int,
        forward: Forward,
        *,
        shape: Callable[[int], tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        train: bool,
        before_backward: Callable[[int, bool], None] | None = None,
    ) -> list[Tensor]:
        """All micro-batches through all stages; returns the losses, detached, in order of micro-batch (empty but on the last stage).

        shape : of the hidden states of a micro-batch between two stages.
        before_backward : called with (chunk, whether it is that chunk's last backward pass).
        """
        schedule = one_forward_one_backward if train else forward_only
        ops = schedule(stages=self.axis.size, rank=self.axis.rank, chunks=self.chunks, num_micro=num_micro)
        losses: dict[int, Tensor] = {}
        pending: list[tuple[dist.Work | None, Tensor]] = []
        left = [num_micro] * self.chunks
        for op in ops:
            stage = op.chunk * self.axis.size + self.axis.rank
            first, last = stage == 0, stage == self.axis.size * self.chunks - 1
            if op.forward:
                hidden = None
                if not first:
                    hidden = self.links.receive(torch.empty(shape(op.micro), dtype=dtype, device=device), "forward")
                    hidden.requires_grad_(train)
                out = forward(op.chunk, op.micro, hidden)
                if last:
                    losses[op.micro] = out.detach()
                else:
                    pending.append(self.links.send(out.detach(), "forward"))
                if train:
                    self.saved[op.chunk, op.micro] = hidden, out
                continue
            hidden, out = self.saved.pop((op.chunk, op.micro))
            grad = None if last else self.links.receive(torch.empty_like(out), "backward")
            left[op.chunk] -= 1
            if before_backward is not None:
                before_backward(op.chunk, left[op.chunk] == 0)
            torch.autograd.backward(out, grad)
            if not first:
                assert hidden is not None and hidden.grad is not None
                pending.append(self.links.send(hidden.grad, "backward"))
        for work, _ in pending:
            if work is not None:
                work.wait()
        return [losses[micro] for micro in sorted(losses)]
