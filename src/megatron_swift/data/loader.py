"""Rows to the micro-batches of one rank. The only module of `data` that imports torch; no other one imports it."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from megatron_swift.data.order import Order, micro_batch_positions, num_micro_batches
from megatron_swift.data.streaming import Lane, Place, Stream
from megatron_swift.data.types import IGNORE, Batch, Sample
from megatron_swift.utils.errors import SwiftError

ORPHANED = 2.0  # seconds until a worker notices that its trainer is dead


class Rows(Protocol):
    """Rows of samples, such as PackedRows."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> list[Sample]: ...


def collate(
    samples: Sequence[Sample], *, pad_to_multiple: int, pad_id: int, rows: tuple[int, ...], segment_multiple: int = 1
) -> Batch:
    """The samples as one packed row of T tokens, T the next multiple of `pad_to_multiple`.

    Labels are shifted within each sample, whose last position predicts nothing. Padding has token pad_id, label IGNORE and positions
    that count on: at the end of each sample up to the next multiple of `segment_multiple` (context parallelism cuts each segment),
    where causal attention keeps it out of sight, and as a last segment of its own.
    """
    padded = [-(-len(sample.ids) // segment_multiple) * segment_multiple for sample in samples]
    used = sum(padded)
    padding = -used % pad_to_multiple
    assert padding % segment_multiple == 0, (pad_to_multiple, segment_multiple)
    tokens = np.full(used + padding, pad_id, np.int64)
    labels = np.full(used + padding, IGNORE, np.int64)
    positions = np.empty(used + padding, np.int64)
    weighted = any(sample.weights is not None for sample in samples)
    weights = np.zeros(used + padding, np.float32) if weighted else None
    start = 0
    for sample, length in zip(samples, padded, strict=True):
        stop = start + len(sample.ids)
        tokens[start:stop] = sample.ids
        labels[start : stop - 1] = sample.labels[1:]
        if weights is not None:
            weights[start : stop - 1] = 1.0 if sample.weights is None else sample.weights[1:]
        positions[start : start + length] = np.arange(length)
        start += length
    positions[used:] = np.arange(padding)
    if weights is not None:
        weights[labels == IGNORE] = 0.0
    lengths = (*padded, padding) if padding else tuple(padded)
    real = tuple(len(sample.ids) for sample in samples)
    whole = used + padding == sum(real)
    real_of = None if whole else (*real, 0) if padding else real
    return Batch(tokens, labels, positions, lengths, rows, weights, used + padding - sum(real), real_of)


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread over data-parallel ranks and how a micro-batch is padded."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    global_batch_size: int
    pad_to_multiple: int
    pad_id: int
    segment_multiple: int = 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on each rank."""
        return num_micro_batches(
            dp_size=self.dp_size, micro_batch_size=self.micro_batch_size, global_batch_size=self.global_batch_size
        )

    def positions(self, step: int, micro: int) -> range:
        """The positions of this rank's micro-batch."""
        return micro_batch_positions(
            step,
            micro,
            self.dp_rank,
            dp_size=self.dp_size,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )

    def batch(self, rows: Rows, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers as one micro-batch; without numbers, one token that is not trained."""
        samples = [sample for number in numbers for sample in rows.row(number)]
        if not samples:
            samples = [Sample(np.array([self.pad_id], np.int32), np.array([IGNORE], np.int32))]
        return self.collated(samples, tuple(numbers))

    def collated(self, samples: Sequence[Sample], rows: tuple[int, ...]) -> Batch:
        """The samples as one micro-batch."""
        return collate(
            samples,
            pad_to_multiple=self.pad_to_multiple,
            pad_id=self.pad_id,
            rows=rows,
            segment_multiple=self.segment_multiple,
        )


class _Steps(Dataset):
    """Step number -> the micro-batches of that step on this rank."""

    def __init__(self, rows: Rows, order: Order, layout: Layout) -> None:
        self.rows, self.order, self.layout = rows, order, layout

    def __getitem__(self, step: int) -> list[Batch] | SwiftError:
        layout = self.layout
        try:
            return [
                layout.batch(self.rows, self.order.rows(layout.positions(step, micro)))
                for micro in range(layout.num_micro_batches)
            ]
        except SwiftError as error:  # raised where it arrives: torch would make one text of it and its traceback
            return error


def _as_they_are(value: Any) -> Any:
    return value


def _start_worker(trainer: int, worker: int) -> None:
    """A signal to the process group is the trainer's to handle; workers end when it closes their queue, dies or says so.

    trainer : its process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # elsewhere torch's own handler ends the worker, whoever sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the threads to come, too
        threading.Thread(target=_end_with_trainer, args=(trainer,), daemon=True).start()
    torch.set_num_threads(1)


def _end_with_trainer(trainer: int) -> None:
    """End at a SIGTERM from the trainer, or once it is dead.

    With SIGTERM multiprocessing ends at exit what is left over, and then waits for it. Of a dead trainer torch's worker takes notice, too, but
    then waits at its own exit for somebody to empty its queue.
    """
    while os.getppid() == trainer:
        said = signal.sigtimedwait({signal.SIGTERM}, ORPHANED)
        if said is not None and said.si_pid == trainer:
            break
    os._exit(0)


def _with_workers(dataset: Dataset, num_workers: int, prefetch_factor: int, **options: Any) -> DataLoader:
    # As many as the user asked for: torch advises every rank for itself, by the machine's cores.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_they_are,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # else every iteration draws from torch's global random state
        **options,
    )


class TrainLoader:
    """Iterating yields, for each step, the list of this rank's micro-batches as numpy Batches.

    What a step holds depends on (rows, order, step, layout) only: not on the number of workers, and a run resumed with
    `first_step` continues the sequence. Over all ranks, a step holds the same rows in every layout.

    first_step, num_steps : global batches to skip (0 at the start of training) and to yield.
    num_workers           : processes that read ahead, each `prefetch_factor` steps; 0 reads in this process.
    persistent_workers    : keep the workers for a second iteration over this loader.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        *,
        first_step: int,
        num_steps: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        prefetch_factor: int,
        persistent_workers: bool,
        pad_to_multiple: int,
        pad_id: int,
        segment_multiple: int = 1,
    ) -> None:
        layout = Layout(
            dp_rank, dp_size, micro_batch_size, global_batch_size, pad_to_multiple, pad_id, segment_multiple
        )
        self._steps = _Steps(rows, order, layout)
        self._numbers = range(first_step, first_step + num_steps)
        self._loader: DataLoader | None = None
        if num_workers > 0:
            self._loader = _with_workers(
                self._steps,
                num_workers,
                prefetch_factor,
                sampler=self._numbers,
                persistent_workers=persistent_workers,
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = map(self._steps.__getitem__, self._numbers) if self._loader is None else self._loader
        for batches in steps:
            if isinstance(batches, SwiftError):
                raise batches
            yield batches


def eval_batches(
    rows: Rows,
    *,
    num_batches: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    pad_to_multiple: int,
    pad_id: int,
    segment_multiple: int = 1,
) -> Iterator[list[Batch]]:
    """For each global batch, this rank's micro-batches: equally many on every rank, rows in their own order.

    num_batches : global batches; more than the rows fill goes round again, a row counting as often as it comes.
                  -1: every row exactly once; where the last global batch has no row left, a micro-batch is one token
                  (padded) that is not trained and belongs to no row.
    """
    layout = Layout(dp_rank, dp_size, micro_batch_size, global_batch_size, pad_to_multiple, pad_id, segment_multiple)
    total = len(rows)
    assert total > 0, "no rows to evaluate on"
    once = num_batches == -1
    for step in range(-(-total // global_batch_size) if once else num_batches):
        batches = []
        for micro in range(layout.num_micro_batches):
            positions = layout.positions(step, micro)
            numbers = [at if once else at % total for at in positions if at < total or not once]
            batches.append(layout.batch(rows, numbers))
        yield batches


class _Micros(IterableDataset):
    """A rank's micro-batches from a stream, one after another, each with the places of its lanes behind it.

    Worker w of W makes the micro-batches w, w + W, … of every step, so its lanes are its own; W divides their number.
    """

    def __init__(self, stream: Stream, places: Mapping[int, Place], layout: Layout, num_steps: int) -> None:
        self.stream, self.places, self.layout, self.num_steps = stream, places, layout, num_steps

    def __iter__(self) -> Iterator[tuple[Batch, dict[int, Place]] | SwiftError]:
        try:
            yield from self._made()
        except SwiftError as error:
            yield error

    def _made(self) -> Iterator[tuple[Batch, dict[int, Place]]]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        layout = self.layout
        numbers = [layout.positions(0, micro) for micro in range(first, layout.num_micro_batches, every)]
        lanes = {lane: Lane(self.stream, lane, self.places.get(lane)) for part in numbers for lane in part}
        for _ in range(self.num_steps):
            for part in numbers:
                samples = [sample for lane in part for sample in next(lanes[lane])]
                yield layout.collated(samples, tuple(part)), {lane: lanes[lane].place for lane in part}


class StreamLoader:
    """As TrainLoader, from a stream. Which rows a step holds does not depend on layout or workers.

    places : for each of this rank's lanes where it stands after the last step that was yielded; at first, where to begin.
             A lane that is missing begins at its beginning.
    """

    def __init__(
        self,
        stream: Stream,
        layout: Layout,
        *,
        places: Mapping[int, Place],
        num_steps: int,
        num_workers: int,
        prefetch_factor: int,
    ) -> None:
        assert layout.global_batch_size == stream.lanes, (layout.global_batch_size, stream.lanes)
        micros = layout.num_micro_batches
        mine = [lane for micro in range(micros) for lane in layout.positions(0, micro)]
        self.places: dict[int, Place] = {lane: places[lane] for lane in mine if lane in places}
        self._micros = _Micros(stream, dict(self.places), layout, num_steps)
        workers = max((n for n in range(1, min(num_workers, micros) + 1) if micros % n == 0), default=0)
        self._loader: DataLoader | None = None
        if workers:
            self._loader = _with_workers(self._micros, workers, prefetch_factor)

    def __iter__(self) -> Iterator[list[Batch]]:
        micros = iter(self._micros if self._loader is None else self._loader)
        for _ in range(self._micros.num_steps):
            batches = []
            for _ in range(self._micros.layout.num_micro_batches):
                made = next(micros)
                if isinstance(made, SwiftError):
                    raise made
                batch, places = made
                self.places |= places
                batches.append(batch)
            yield batches
