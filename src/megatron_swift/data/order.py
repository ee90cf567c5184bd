"""The order in which rows are trained on: a pure function of the seed and of one growing position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def permutation(count: int, *seeds: int) -> np.ndarray:
    """The numbers below `count` in an order that depends on the seeds alone, int64 [count].

    Built from a bit generator's raw output, which numpy promises to keep, and not from Generator.permutation, which it does not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count), kind="stable")


class Order:
    """Which row stands at which position of endless training; position p belongs to epoch p // num_rows.

    The order of an epoch depends on (seed, epoch) alone, so a resumed run needs one integer and no state.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        assert num_rows > 0, "an order of no rows"
        assert seed >= 0, seed
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def row(self, position: int) -> int:
        """The row at `position`, counted from 0 over all epochs."""
        epoch, index = divmod(position, self.num_rows)
        return int(self._epoch(epoch)[index]) if self.shuffle else index

    def rows(self, positions: Iterable[int]) -> list[int]:
        """`row` of each position."""
        return [self.row(position) for position in positions]

    def _epoch(self, epoch: int) -> np.ndarray:
        """The permutation of `epoch`, int64 [num_rows]; two are kept, because a batch may reach over an epoch's end."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = permutation(self.num_rows, self.seed, epoch)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}


def micro_batch_positions(
    step: int, micro: int, dp_rank: int, *, dp_size: int, micro_batch_size: int, global_batch_size: int
) -> range:
    """The positions of one micro-batch. A global batch holds the same positions in every layout.

    step : counts global batches from 0. micro : counts this rank's micro-batches within the step from 0.
    """
    start = step * global_batch_size + (micro * dp_size + dp_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


def num_micro_batches(*, dp_size: int, micro_batch_size: int, global_batch_size: int) -> int:
    """Micro-batches per step on each rank. The sizes must divide; arguments are checked long before this."""
    micros = global_batch_size // (dp_size * micro_batch_size)
    assert micros * dp_size * micro_batch_size == global_batch_size > 0, (global_batch_size, dp_size, micro_batch_size)
    return micros
