"""Which rows of the data sets are trained on and evaluated on: sampling, splitting, and drawing from several sets in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_swift.utils.errors import UsageError

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]
Index = np.ndarray  # int64 [rows]: numbers of rows
DRAWN = 1 << 16  # draws made at a time


def sample(rows: Index, count: int | None, *, state: np.random.RandomState, shuffle: bool) -> Index:
    """`count` of the rows: whole copies, then a random choice of the rest (the first ones when not `shuffle`).

    None gives the rows as they are.
    """
    if count is None:
        return rows
    copies, rest = divmod(count, len(rows))
    some = state.permutation(rows)[:rest] if shuffle else rows[:rest]
    return np.concatenate([*[rows] * copies, some])


def split(
    rows: Index, *, limit: int | None, ratio: float, state: np.random.RandomState, shuffle: bool
) -> tuple[Index, Index]:
    """(train, validation) rows of a data set of which `limit` rows are wanted, None for all.

    Validation gets max(int(min(len, limit) * ratio), 1) rows, none where ratio is 0 or only one row is wanted; training
    gets the other `limit` - that, from the rows that are left, some repeatedly if there are too few.
    """
    wanted = min(len(rows), limit or len(rows))
    num_val = min(max(int(wanted * ratio), 1), wanted - 1) if ratio > 0 else 0
    if num_val == 0:
        return sample(rows, limit, state=state, shuffle=shuffle), rows[:0]
    mixed = state.permutation(rows) if shuffle else np.roll(rows, num_val)  # in order: validation is at the end
    left = None if limit is None else limit - num_val
    return sample(mixed[num_val:], left, state=state, shuffle=shuffle), mixed[:num_val]


def check_probabilities(probabilities: Sequence[float], num_sets: int) -> None:
    """UsageError unless there is one probability above 0 for each data set and they sum to 1."""
    said = f"--interleave_prob {' '.join(f'{one:g}' for one in probabilities)}"
    if len(probabilities) != num_sets:
        raise UsageError(
            f"{said}: {len(probabilities)} probabilities for {num_sets} data sets", do="give one for each --dataset"
        )
    if min(probabilities) <= 0:
        raise UsageError(f"{said}: a probability is not above 0", do="leave a data set out that is not wanted")
    if abs(sum(probabilities) - 1) > 1e-6:
        raise UsageError(f"{said}: the sum is {sum(probabilities):g}, not 1", do="scale them to a sum of 1")


def interleave(
    sets: Sequence[Index],
    probabilities: Sequence[float],
    *,
    stopping_strategy: StoppingStrategy,
    state: np.random.RandomState,
) -> Index:
    """The rows of the sets drawn in turn: each draw picks a set by its probability and takes the set's next row.

    It stops as soon as the first set has given its last row ("first_exhausted": no row comes twice), or the last set has
    ("all_exhausted": a set that ran out begins again). The sets must not be empty.
    """
    assert all(len(rows) for rows in sets)
    edges = np.cumsum(np.array(probabilities) / sum(probabilities))[:-1]
    draws = np.zeros(0, np.int64)
    ends = [-1] * len(sets)  # the draw that takes a set's last row, -1 where it has not come
    while not _done(ends, stopping_strategy):
        more = np.searchsorted(edges, state.random_sample(DRAWN), side="right")
        draws = np.concatenate([draws, more])
        for number, rows in enumerate(sets):
            if ends[number] < 0:
                places = np.flatnonzero(draws == number)
                ends[number] = int(places[len(rows) - 1]) if len(places) >= len(rows) else -1
    reached = [end for end in ends if end >= 0]
    draws = draws[: (min(reached) if stopping_strategy == "first_exhausted" else max(reached)) + 1]
    result = np.empty(len(draws), np.int64)
    for number, rows in enumerate(sets):
        places = np.flatnonzero(draws == number)
        result[places] = rows[np.arange(len(places)) % len(rows)]
    return result


def _done(ends: Sequence[int], stopping_strategy: StoppingStrategy) -> bool:
    found = [end >= 0 for end in ends]
    return any(found) if stopping_strategy == "first_exhausted" else all(found)
