"""Best-fit decreasing bin packing of sequence lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

WINDOW = 8192


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, *, window: int = WINDOW) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`, each index once; O(n log n).

    The lengths are taken in windows. Within one: longest first (equal ones by index), each into the fullest bin that
    has room (equal ones: the oldest), else into a new bin; bins in the order of their creation. The last bin of a
    window is held back and its items are packed again with the next window's. The result is a function of the
    arguments alone. Each length must be 1 to `capacity`: sequences are never split.
    """
    return [group for bins in _windows(lengths, capacity, window) for group in bins]


def pack_arrays(lengths: np.ndarray, capacity: int, *, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """`pack`, as the groups one after another and the size of each. Takes no memory for a list of every row."""
    dtype = np.int32 if len(lengths) < 1 << 31 else np.int64
    members, sizes = [np.zeros(0, dtype)], [np.zeros(0, np.int32)]
    for bins in _windows(lengths, capacity, window):
        members.append(np.fromiter((index for group in bins for index in group), dtype))
        sizes.append(np.fromiter(map(len, bins), np.int32, len(bins)))
    return np.concatenate(members), np.concatenate(sizes)


def _windows(lengths: Sequence[int] | np.ndarray, capacity: int, window: int) -> Iterator[list[list[int]]]:
    """The bins of one window after another."""
    assert window > 0, window
    held: list[int] = []
    for start in range(0, len(lengths), window):
        stop = min(start + window, len(lengths))
        indices = [*held, *range(start, stop)]
        bins = _best_fit(indices, [int(lengths[index]) for index in indices], capacity)
        held = bins.pop() if stop < len(lengths) else []
        yield bins


def _best_fit(indices: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """lengths : of each of the indices."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for place in sorted(range(len(indices)), key=lambda place: -lengths[place]):
        index, length = indices[place], lengths[place]
        assert 0 < length <= capacity, (index, length, capacity)
        at = bisect_left(room, (length, -1))
        if at < len(room):
            free, number = room.pop(at)
            bins[number].append(index)
        else:
            free, number = capacity, len(bins)
            bins.append([index])
        if free > length:
            insort(room, (free - length, number))
    return bins
