"""Best-fit decreasing bin packing of sequence lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

WINDOW = 8192


def pack(lengths: Sequence[int], capacity: int, *, window: int = WINDOW) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`, each index once; O(n log n).

    The lengths are taken in windows. Within one: longest first (equal ones by index), each into the fullest bin that
    has room (equal ones: the oldest), else into a new bin; bins in the order of their creation. The last bin of a
    window is held back and its items are packed again with the next window's. The result is a function of the
    arguments alone. Each length must be 1 to `capacity`: sequences are never split.
    """
    assert window > 0, window
    packs: list[list[int]] = []
    held: list[int] = []
    for start in range(0, len(lengths), window):
        stop = min(start + window, len(lengths))
        bins = _best_fit([*held, *range(start, stop)], lengths, capacity)
        held = bins.pop() if stop < len(lengths) else []
        packs += bins
    return packs


def _best_fit(indices: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for index in sorted(indices, key=lambda index: -lengths[index]):
        length = lengths[index]
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
