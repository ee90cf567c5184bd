"""Drawing rows from several data sets in turn. (`sample` and `split` are tested through test_prepare.py.)"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data import interleave as module
from megatron_swift.data.interleave import check_probabilities, interleave
from megatron_swift.utils.errors import UsageError


def draw(sizes: list[int], probabilities: list[float], strategy: str, *, seed: int = 0) -> list[list[int]]:
    """The rows of each set in the order in which they were drawn; set i has the rows 100 i, 100 i + 1, ..."""
    sets = [np.arange(size) + 100 * number for number, size in enumerate(sizes)]
    rows = interleave(sets, probabilities, stopping_strategy=strategy, state=np.random.RandomState(seed))
    return [rows[rows // 100 == number].tolist() for number in range(len(sets))]


def test_first_exhausted():
    for seed in range(20):
        first, second = draw([5, 90], [0.5, 0.5], "first_exhausted", seed=seed)
        assert first == [0, 1, 2, 3, 4]  # it ran out: it stops with its last row
        assert second == [100 + number for number in range(len(second))]
        assert len(second) < 90


def test_all_exhausted():
    for seed in range(20):
        first, second = draw([5, 90], [0.5, 0.5], "all_exhausted", seed=seed)
        assert second == [100 + number for number in range(90)]
        assert first == [number % 5 for number in range(len(first))]
        assert len(first) > 50


def test_probabilities_are_kept():
    first, second = draw([90] * 2, [0.9, 0.1], "all_exhausted")
    assert 0.87 < len(first) / (len(first) + len(second)) < 0.93


def test_the_draws_depend_on_the_seed_alone(monkeypatch):
    sets = [np.arange(50), np.arange(100, 160), np.arange(200, 205)]

    def rows(seed: int) -> list[int]:
        state = np.random.RandomState(seed)
        return interleave(sets, [0.2, 0.3, 0.5], stopping_strategy="all_exhausted", state=state).tolist()

    reference = rows(1)
    assert rows(1) == reference != rows(2)
    monkeypatch.setattr(module, "DRAWN", 7)  # how many draws are made at a time changes nothing
    assert rows(1) == reference


def test_golden_draws():
    """They do not change from one version of numpy to another: RandomState is frozen."""
    rows = interleave(
        [np.arange(4), np.arange(10, 14)],
        [0.5, 0.5],
        stopping_strategy="all_exhausted",
        state=np.random.RandomState(42),
    )
    uniform = np.random.RandomState(42).random_sample(len(rows))
    assert [row >= 10 for row in rows.tolist()] == (uniform >= 0.5).tolist()
    assert rows.tolist() == [0, 10, 11, 12, 1, 2, 3, 13]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 1)), min_size=1, max_size=5), st.integers(0, 9))
def test_what_is_drawn(sets, seed):
    """first_exhausted repeats no row and leaves no set over-drawn; all_exhausted leaves no row out."""
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    probabilities = [weight / sum(weights) for weight in weights]
    check_probabilities(probabilities, len(sizes))
    once = draw(sizes, probabilities, "first_exhausted", seed=seed)
    assert all(rows == [100 * n + i for i in range(len(rows))] for n, rows in enumerate(once))
    assert sum(len(rows) == size for rows, size in zip(once, sizes, strict=True)) == 1
    every = draw(sizes, probabilities, "all_exhausted", seed=seed)
    for number, (rows, size) in enumerate(zip(every, sizes, strict=True)):
        assert rows == [100 * number + i % size for i in range(len(rows))]
        assert len(rows) >= size
    assert [rows[: len(first)] for rows, first in zip(every, once, strict=True)] == once


@pytest.mark.parametrize(
    ("probabilities", "why"),
    [([0.5], "1 probabilities for 2 data sets"), ([1.0, 0.0], "is not above 0"), ([0.5, 0.6], "the sum is 1.1")],
)
def test_probabilities_that_cannot_be(probabilities, why):
    with pytest.raises(UsageError, match=why) as caught:
        check_probabilities(probabilities, 2)
    assert caught.value.what.startswith("--interleave_prob ")
    assert caught.value.do
