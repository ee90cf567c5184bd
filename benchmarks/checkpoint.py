"""Saving and loading a sharded state through our protocol beside plain torch.distributed.checkpoint, on the same ranks in one run.

    python benchmarks/checkpoint.py [--gigabytes 1] [--ranks 2] [--rounds 10] [--folder DIR]

Both write and read the same tensors to and from the same disk. Whoever is second in a round finds a disk that is still busy (measured: up to
twice as slow), so they take turns in going first, the number of rounds is even, and the ratio is that of the sums over all rounds. Ours adds
checksums, the manifest, the renaming and the tracker to a save, and the verification of every byte to a load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron_swift.checkpoint.background import Background
from megatron_swift.checkpoint.dcp import DcpFolder, Piece
from megatron_swift.checkpoint.publish import latest, publish
from megatron_swift.checkpoint.ranks import Group, all_ranks
from megatron_swift.checkpoint.snapshot import Buffers, Snapshot
from megatron_swift.checkpoint.verify import first_whole
from megatron_swift.testing import run_ranks

COLUMNS, TENSOR_ROWS = 2048, 4096  # 32 MB a tensor, as the matrices of a model of a few billion parameters
Figures = dict[str, list[float]]


class State:
    """float32 tensors of which every rank holds its share of rows."""

    def __init__(self, rank: int, ranks: int, gigabytes: float):
        number = max(round(gigabytes * 1e9 / (TENSOR_ROWS * COLUMNS * 4)), 1)
        self.rows, self.start = TENSOR_ROWS // ranks, rank * (TENSOR_ROWS // ranks)
        self.whole = (self.rows * ranks, COLUMNS)
        generator = torch.Generator().manual_seed(rank)
        self.tensors = {
            f"decoder.layers.{i}.weight": torch.randn(self.rows, COLUMNS, generator=generator) for i in range(number)
        }
        self.bytes = number * TENSOR_ROWS * COLUMNS * 4

    def snapshot(self) -> Snapshot:
        """For our writer."""
        return Snapshot([self._piece(name, tensor) for name, tensor in self.tensors.items()], {})

    def _piece(self, name: str, tensor: torch.Tensor) -> Piece:
        return Piece(name, lambda: tensor, tensor.dtype, tuple(tensor.shape), (self.start, 0), self.whole)

    def distributed(self, mesh: dist.DeviceMesh) -> dict[str, DTensor]:
        """For torch's."""
        return {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in self.tensors.items()}


def _timed(group: Group, action: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    group.gather(None)
    began = time.perf_counter()
    action()
    return max(group.gather(time.perf_counter() - began))


def _save(folder: Path, group: Group, state: State) -> None:
    publish(folder, 1, lambda staging: state.snapshot().write(staging, group), group=group)


def _forget(place: Path) -> None:
    """Take all files out of the page cache (they are synced), so that the next read comes from the disk."""
    for path in place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(folder: Path, group: Group, state: State) -> None:
    """As a resuming run does: verify, then read this rank's boxes."""
    checkpoint = latest(folder)
    assert checkpoint is not None
    files = DcpFolder(first_whole([checkpoint], group))
    for name, tensor in state.tensors.items():
        files.fill(tensor, name, (state.start, 0))


def _beside(folder: Path, group: Group, state: State, buffers: Buffers) -> tuple[float, float]:
    """Seconds that a training loop would stand still, and until the checkpoint is published."""
    group.gather(None)
    began = time.perf_counter()
    copy, background = state.snapshot().copied(buffers), Background()
    background.start(lambda: publish(folder, 1, lambda staging: copy.write(staging, group), group=group) and None)
    stood = time.perf_counter() - began
    failure = background.join()
    if failure is not None:
        raise failure
    return max(group.gather(stood)), max(group.gather(time.perf_counter() - began))


def measure(rank: int, ranks: int, gigabytes: float, rounds: int, place: Path) -> Figures:
    """All figures of all rounds, on rank 0's behalf."""
    dist.init_process_group("gloo")
    mesh, group, state = init_device_mesh("cpu", (ranks,)), all_ranks(), State(rank, ranks, gigabytes)
    buffers: Buffers = {}
    found: Figures = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for number in range(rounds + 1):
        theirs, ours, beside = (place / f"{kind}{number}" for kind in ("theirs", "ours", "beside"))
        for folder in (ours, beside):
            folder.mkdir(exist_ok=True)
        expected = {name: tensor.clone() for name, tensor in state.tensors.items()}
        pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            (
                "save",
                partial(dcp.save, state.distributed(mesh), checkpoint_id=theirs),
                partial(_save, ours, group, state),
            ),
            (
                "load",
                partial(dcp.load, state.distributed(mesh), checkpoint_id=theirs),
                partial(_load, ours, group, state),
            ),
        ]
        pairs.append(("load from disk", *pairs[1][1:]))
        for name, torchs, mine in pairs:
            both = [(f"{name}, torch", torchs), (f"{name}, ours", mine)]
            for full, action in both if number % 2 else both[::-1]:
                if "disk" in full and rank == 0:
                    _forget(place)
                note(full, _timed(group, action))
        stood, whole = _beside(beside, group, state, buffers)
        note("async, training stands still", stood)
        note("async, until it is published", whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.tensors.items())
        group.gather(None)
        if rank == 0:
            for folder in (theirs, ours, beside):
                shutil.rmtree(folder)
    return {name: seconds[1:] for name, seconds in found.items()}  # the first round warms up


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.rounds % 2:
        parser.error("--rounds must be even, so that each goes first equally often")
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        results = run_ranks(measure, args.ranks, args.ranks, args.gigabytes, args.rounds, Path(place), timeout=1800)
    medians = {name: statistics.median(seconds) for name, seconds in results[0].items()}
    print(f"{args.gigabytes} GB of float32 on {args.ranks} ranks, median of {args.rounds} (all rounds)")
    for name, seconds in results[0].items():
        print(f"{name:30s} {medians[name]:6.2f} s   ({', '.join(f'{s:.2f}' for s in seconds)})")
    for kind in ("save", "load", "load from disk"):
        ours, torchs = results[0][f"{kind}, ours"], results[0][f"{kind}, torch"]
        places = [(sum(ours[i::2]) / sum(torchs[1 - i :: 2])) for i in (1, 0)]
        print(
            f"{kind}: ours / torch = {sum(ours) / sum(torchs):.2f}   (both first {places[0]:.2f}, both second {places[1]:.2f})"
        )


if __name__ == "__main__":
    main()
