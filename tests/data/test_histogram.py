"""The histogram of lengths, as text and as a picture."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_swift.data.histogram import Bin, bins, draw_histogram, text_histogram
from megatron_swift.utils.errors import StorageError, UsageError


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_bins_hold_every_sample_once(lengths):
    found = bins(np.array(lengths))
    assert sum(one.samples for one in found) == len(lengths)
    assert 1 <= len(found) <= 12
    assert all(before.last + 1 == after.first for before, after in itertools.pairwise(found))
    for one in found:
        assert one.samples == sum(one.first <= length <= one.last for length in lengths)
    assert str(found[0].last - found[0].first + 1).rstrip("0") in ("1", "2", "5")


def test_bins_of_nothing_and_of_one():
    assert bins(np.zeros(0, np.int64)) == []
    assert bins(np.array([7, 7])) == [Bin(7, 7, 2)]


def test_text():
    lengths = np.array([5, 8, 12, 25, 29, 28, 27])
    heading, *lines = text_histogram(lengths, max_length=26).splitlines()
    assert heading.split() == ["tokens", "samples"]
    assert [int(line.split()[1]) for line in lines] == [one.samples for one in bins(lengths)]
    assert [line.split()[0] for line in lines if "(max_length 26)" in line] == ["25-29"]
    assert text_histogram(np.zeros(0, np.int64)) == "no samples"
    longest = max(text_histogram(np.array([1] * 8 + [2])).splitlines(), key=len)
    assert longest.count("█") == 40


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "lengths.png"
    draw_histogram(path, np.array([5, 8, 12]), title="t", max_length=10)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match="cannot write"):
        draw_histogram(path / "below", np.array([5]), title="t")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match="needs matplotlib"):
        draw_histogram(tmp_path / "x.png", np.array([5]), title="t")
