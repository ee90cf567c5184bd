from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data.packing import pack


def test_golden():
    assert pack([7, 3, 5, 2, 4, 6, 1], 10) == [[0, 1], [5, 4], [2, 3, 6]]


def test_nothing_and_too_long():
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    with pytest.raises(AssertionError):
        pack([11], 10)


def test_fullest_bin_wins_and_then_the_oldest():
    assert pack([6, 6, 5, 4, 4], 10) == [[0, 3], [1, 4], [2]]
    assert pack([8, 7, 6, 3, 2], 10) == [[0, 4], [1, 3], [2]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120), st.integers(1, 60))
def test_each_index_once_within_capacity(lengths, capacity, window):
    packs = pack(lengths, capacity, window=window)
    assert sorted(index for group in packs for index in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[index] for index in group) <= capacity for group in packs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_is_best_fit_decreasing(lengths):
    """Against the rule written down naively."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = [group for group in bins if sum(lengths[at] for at in group) + lengths[index] <= 30]
        if fits:
            max(fits, key=lambda group: sum(lengths[at] for at in group)).append(index)
        else:
            bins.append([index])
    assert pack(lengths, 30) == bins


def test_a_window_leaves_no_half_empty_last_bin():
    lengths = [3] * 100
    assert len(pack(lengths, 30, window=7)) == 10


def test_heavy_load_is_fast_and_tight():
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 100_000).astype(int).clip(1, 4096).tolist()
    begin = time.process_time()
    packs = pack(lengths, 4096)
    assert time.process_time() - begin < 5
    assert sum(lengths) / (len(packs) * 4096) >= 0.98
