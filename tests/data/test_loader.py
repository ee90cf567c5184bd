from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_swift.data.loader import TrainLoader, collate, eval_batches
from megatron_swift.data.order import Order
from megatron_swift.data.types import IGNORE, Batch, Sample


def make_sample(ids: list[int], *, untrained: int = 1) -> Sample:
    labels = [IGNORE] * untrained + ids[untrained:]
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


class ListRows:
    """Row i is one sample of 2 + i % 3 tokens, all of them i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> list[Sample]:
        return [make_sample([index] * (2 + index % 3))]


def make_loader(count: int = 10, *, seed: int = 3, shuffle: bool = True, **values: object) -> TrainLoader:
    defaults = {
        "first_step": 0,
        "num_steps": 6,
        "dp_rank": 0,
        "dp_size": 1,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "num_workers": 0,
        "prefetch_factor": 2,
        "persistent_workers": False,
        "pad_to_multiple": 4,
        "pad_id": 0,
    }
    return TrainLoader(ListRows(count), Order(count, seed=seed, shuffle=shuffle), **{**defaults, **values})


def as_lists(steps: object) -> list:
    return [[(*(a.tolist() for a in b[:3]), b.lengths, b.rows) for b in batches] for batches in steps]


def test_weights_are_shifted_as_labels_are():
    plain = make_sample([1, 2, 3], untrained=1)
    weighted = make_sample([4, 5, 6, 7], untrained=2)._replace(weights=np.array([0, 0, 2, 0.5], np.float32))
    batch = collate([plain, weighted], pad_to_multiple=8, pad_id=0, rows=(0,))
    assert batch.labels.tolist() == [2, 3, IGNORE, IGNORE, 6, 7, IGNORE, IGNORE]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 0, 0, 2, 0.5, 0, 0]
    assert batch.weights.dtype == np.float32
    assert collate([plain], pad_to_multiple=8, pad_id=0, rows=(0,)).weights is None


def test_collate():
    samples = [make_sample([1, 2, 3, 4, 5]), make_sample([6, 7, 8], untrained=0)]
    batch = collate(samples, pad_to_multiple=4, pad_id=9, rows=(0, 5))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.labels.tolist() == [2, 3, 4, 5, IGNORE, 7, 8, IGNORE]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.lengths == (5, 3)
    assert batch.rows == (0, 5)
    assert batch.num_trained == 6
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int64)}


def test_collate_pads_with_a_segment_of_its_own():
    batch = collate([make_sample([1, 2, 3])], pad_to_multiple=8, pad_id=9, rows=())
    assert batch.tokens.tolist() == [1, 2, 3, 9, 9, 9, 9, 9]
    assert batch.labels.tolist() == [2, 3, IGNORE] + [IGNORE] * 5
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.lengths == (3, 5)


def test_first_label_is_not_lost_nor_moved_to_another_sample():
    """A fully trained sample predicts its second token first; its own first token is nobody's target."""
    batch = collate(
        [make_sample([1], untrained=0), make_sample([2, 3], untrained=0)], pad_to_multiple=1, pad_id=0, rows=()
    )
    assert batch.labels.tolist() == [IGNORE, 3, IGNORE]


def test_steps():
    loader = make_loader(10, shuffle=False)
    rows = [[batch.rows for batch in batches] for batches in loader]
    assert len(loader) == len(rows) == 6
    assert rows[:3] == [[(0, 1), (2, 3)], [(4, 5), (6, 7)], [(8, 9), (0, 1)]]


def test_resume_continues_the_sequence():
    whole = as_lists(make_loader())
    assert as_lists(make_loader(first_step=4, num_steps=2)) == whole[4:]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_a_step_holds_the_same_rows_in_every_layout(dp_size, micro_batch_size):
    reference = [batches[0].rows for batches in make_loader(micro_batch_size=4)]
    layout = {"dp_size": dp_size, "micro_batch_size": micro_batch_size}
    ranks = [list(make_loader(dp_rank=rank, **layout)) for rank in range(dp_size)]
    for step, expected in enumerate(reference):
        micros = range(4 // (dp_size * micro_batch_size))
        assert tuple(row for micro in micros for rank in ranks for row in rank[step][micro].rows) == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(persistent):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = make_loader(num_workers=2, persistent_workers=persistent)
    expected = as_lists(make_loader())
    assert as_lists(loader) == expected
    assert as_lists(loader) == expected
    batch = next(iter(loader))[0]
    assert isinstance(batch, Batch)
    assert isinstance(batch.tokens, np.ndarray)
    assert torch.equal(torch.get_rng_state(), state)  # dropout must not depend on the number of workers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_survive_a_signal_to_the_group(number):
    before = set(multiprocessing.active_children())
    steps = iter(make_loader(num_workers=2, num_steps=20, prefetch_factor=1))
    first = [next(steps), next(steps)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    subprocess.run(["kill", f"-{int(number)}", *(str(worker.pid) for worker in workers)], check=True)
    assert as_lists([*first, *steps]) == as_lists(make_loader(num_steps=20))


def test_a_trainer_that_ends_in_the_middle_takes_its_workers_along():
    """Python ends what is left over with SIGTERM and waits for it: a worker that ignored it would hold its trainer for ever."""
    held = []

    def leave() -> None:
        held.append(iter(make_loader(num_workers=2, num_steps=20, prefetch_factor=1)))
        next(held[0])

    trainer = multiprocessing.get_context("fork").Process(target=leave)
    trainer.start()
    trainer.join(60)
    code = trainer.exitcode
    trainer.kill()
    assert code == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_of_a_killed_trainer_end():
    """However full their queue is."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def train() -> None:
        steps = iter(make_loader(num_workers=2, num_steps=2000, prefetch_factor=200))
        next(steps)
        sender.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(60)

    trainer = context.Process(target=train)
    trainer.start()
    workers = receiver.recv()
    time.sleep(1)  # they fill what they can
    assert len(workers) == 2 and all(map(alive, workers))
    trainer.kill()
    trainer.join()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def evaluate(count: int, **values: object) -> list:
    defaults = {
        "num_batches": -1,
        "dp_rank": 0,
        "dp_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "pad_to_multiple": 4,
        "pad_id": 7,
    }
    return list(eval_batches(ListRows(count), **{**defaults, **values}))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_evaluation_covers_every_row_once(count, dp_size, micro_batch_size):
    layout = {"dp_size": dp_size, "micro_batch_size": micro_batch_size}
    ranks = [evaluate(count, dp_rank=rank, **layout) for rank in range(dp_size)]
    shapes = {tuple(len(batches) for batches in rank) for rank in ranks}
    assert shapes == {(4 // (dp_size * micro_batch_size),) * -(-count // 4)}
    rows = [row for rank in ranks for batches in rank for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(count))
    trained = sum(batch.num_trained for rank in ranks for batches in rank for batch in batches)
    assert trained == sum(1 + row % 3 for row in range(count))


def test_a_rank_without_rows_gets_an_untrained_token():
    batch = evaluate(1)[0][1]
    assert batch.rows == ()
    assert batch.num_trained == 0
    assert batch.lengths == (1, 3)
    assert batch.tokens.tolist() == [7] * 4


def test_evaluation_goes_round():
    rows = [[batch.rows for batch in batches] for batches in evaluate(6, num_batches=2)]
    assert rows == [[(0,), (1,), (2,), (3,)], [(4,), (5,), (0,), (1,)]]
    assert len(evaluate(6, num_batches=1)) == 1
