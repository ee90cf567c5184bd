"""The checksum is the sum that its page describes, however the bytes come, and sees what happens to disks."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.checkpoint.checksum import WordSum

G = 0x9E3779B97F4A7C15


def checksum(*parts: bytes) -> int:
    total = WordSum()
    for part in parts:
        total.update(memoryview(part))
    return total.value()


def by_hand(data: bytes) -> int:
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(word * (2 * (i // 512) * G + 1 + 2 * (i % 512) * G) for i, word in enumerate(words)) % 2**64


@given(st.integers(0, 20_000), st.lists(st.integers(0, 20_000), max_size=6), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_the_formula_however_the_bytes_come(length, cuts, seed):
    data = random.Random(seed).randbytes(length)
    edges = [0, *sorted(min(cut, length) for cut in cuts), length]
    parts = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert checksum(*parts) == by_hand(data)


def test_asked_in_between_it_goes_on():
    data = random.Random(1).randbytes(9000)
    total = WordSum()
    total.update(memoryview(data[:5001]))
    assert total.value() == by_hand(data[:5001])
    total.update(memoryview(data[5001:]))
    assert total.value() == by_hand(data)


@given(st.integers(0, 12_287), st.integers(1, 255), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_no_changed_byte_goes_unnoticed(place, flip, seed):
    data = bytearray(random.Random(seed).randbytes(12_288))
    before = checksum(bytes(data))
    data[place] ^= flip
    assert checksum(bytes(data)) != before


def test_what_happens_to_disks_is_noticed():
    data = random.Random(2).randbytes(1 << 16)
    pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    words = [data[i : i + 8] for i in range(0, len(data), 8)]
    good = checksum(data)
    for a, b in ((0, 1), (3, 9), (0, 15)):
        swapped = list(pages)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        assert checksum(b"".join(swapped)) != good  # pages in each other's place
        lost = list(pages)
        lost[b] = bytes(4096)
        assert checksum(b"".join(lost)) != good  # a page never written
        stale = list(pages)
        stale[b] = pages[a]
        assert checksum(b"".join(stale)) != good  # another page's content
    for a, b in ((0, 1), (5, 511), (0, 512)):
        swapped = list(words)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        assert checksum(b"".join(swapped)) != good
    assert checksum(data[8:] + data[:8]) != good
