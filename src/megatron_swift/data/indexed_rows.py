"""Rows of one length cut through the documents of indexed data sets, several of them blended by weight.

A row has `length` tokens and begins with the last token of the row before it, as in Megatron's GPTDataset of sequence_length
length - 1: every token of a document but its first is predicted once. Documents are shuffled anew in each pass over a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_swift.data.indexed import IndexedFile, files_of
from megatron_swift.data.order import permutation
from megatron_swift.data.stamps import ends_hash, hash_values
from megatron_swift.data.types import Sample
from megatron_swift.utils.errors import DataError, UsageError
from megatron_swift.utils.log import get_logger

INDEXED_VERSION = 1  # raise it when the same input gives other rows


class Blend(NamedTuple):
    """What --data_path asks for: prefixes and their weights, which sum to 1."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]


def parse_data_path(values: Sequence[str]) -> Blend:
    """`PREFIX`, or weights before prefixes as Megatron's users type them: `0.3 A 0.7 B`. Without weights, several count by their length."""
    if len(values) == 1:
        return Blend((values[0],), (1.0,))
    numbers = [_number(value) for value in values]
    said = f"--data_path {' '.join(values)}"
    if all(number is None for number in numbers):
        return Blend(tuple(values), ())
    if len(values) % 2 or any((number is None) != bool(at % 2) for at, number in enumerate(numbers)):
        raise UsageError(f"{said}: weights and prefixes must take turns", do="write for example 0.3 first 0.7 second")
    weights = [number for number in numbers[::2] if number is not None]
    if min(weights) <= 0:
        raise UsageError(f"{said}: a weight is not above 0", do="leave a data set out that is not wanted")
    return Blend(tuple(values[1::2]), tuple(weight / sum(weights) for weight in weights))


def _number(text: str) -> float | None:
    """A path that exists is a path, even if it reads like a number."""
    if Path(f"{text}.idx").exists():
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


class Cut:
    """The rows of one data set: documents [first, last) of it, `passes` times, each time in another order."""

    def __init__(
        self, file: IndexedFile, *, first: int, last: int, length: int, passes: int, seed: int, shuffle: bool
    ) -> None:
        self.file, self.length = file, length
        count = last - first
        orders = [permutation(count, seed, number) if shuffle else np.arange(count) for number in range(max(passes, 1))]
        self.order = (first + np.concatenate(orders)).astype(np.int32 if last < 1 << 31 else np.int64)
        self.ends = np.cumsum(file.lengths[self.order], dtype=np.int64)

    def __len__(self) -> int:
        """Whole rows; what is left at the end is less than a row."""
        return max((int(self.ends[-1]) - 1) // (self.length - 1), 0) if len(self.ends) else 0

    def pieces(self, row: int) -> list[np.ndarray]:
        """The parts of documents that the row holds, int32 each."""
        at = row * (self.length - 1)
        end = at + self.length
        place = int(np.searchsorted(self.ends, at, "right"))
        found = []
        while at < end:
            document = int(self.order[place])
            start = int(self.ends[place]) - int(self.file.lengths[document])
            piece = self.file.read(document, at - start, end - start)
            if len(piece):
                found.append(piece)
            at, place = at + len(piece), place + 1
        return found


class Plan(NamedTuple):
    """All that decides the rows, in plain values.

    length : tokens of a row.  part: from which to which share of each data set's documents.  vocab_size: for the check of tokens.
    """

    blend: Blend
    length: int
    part: tuple[float, float]
    seed: int
    shuffle: bool
    vocab_size: int


class IndexedRows:
    """Rows that a loader can read, all of whose tokens are trained. Sent to another process as their plan.

    A pass has as many rows as all data sets hold together. With weights, a data set that has fewer rows than its share is gone
    over again, its documents in another order, and one that has more gives only its share.
    """

    def __init__(self, plan: Plan) -> None:
        """DataError for a data set that cannot be read or holds less than a row."""
        self.plan = plan
        length, seed = plan.length, plan.seed
        files = [IndexedFile(prefix) for prefix in plan.blend.prefixes]
        bounds = [(int(plan.part[0] * len(file)), int(plan.part[1] * len(file))) for file in files]
        tokens = [
            int(file.lengths[first:last].sum(dtype=np.int64)) for file, (first, last) in zip(files, bounds, strict=True)
        ]
        once = [max((count - 1) // (length - 1), 0) for count in tokens]
        for file, count, rows in zip(files, tokens, once, strict=True):
            if not rows:
                what = f"{file.prefix}: {count} tokens are less than one row of {length}"
                raise DataError(what, do="lower --max_length, or leave this data set out of --data_path")
        weights = plan.blend.weights or tuple(rows / sum(once) for rows in once)
        self.which = blend_order(weights, sum(once))
        drawn = np.bincount(self.which, minlength=len(files)).tolist()
        passes = [-(-(rows * (length - 1) + 1) // count) for rows, count in zip(drawn, tokens, strict=True)]
        self.cuts = [
            Cut(file, first=first, last=last, length=length, passes=count, seed=seed + at, shuffle=plan.shuffle)
            for at, (file, (first, last), count) in enumerate(zip(files, bounds, passes, strict=True))
        ]
        self.index = np.zeros(len(self.which), np.int32)
        for at, rows in enumerate(drawn):
            self.index[self.which == at] = np.arange(rows)

    def __reduce__(self) -> tuple:
        return (IndexedRows, (self.plan,))

    def __len__(self) -> int:
        return len(self.which)

    def row(self, index: int) -> list[Sample]:
        """The parts of documents in row `index`, each a sample of its own: attention and positions begin anew in each."""
        cut = self.cuts[int(self.which[index])]
        pieces = cut.pieces(int(self.index[index]))
        most, least = max(int(piece.max()) for piece in pieces), min(int(piece.min()) for piece in pieces)
        if most >= self.plan.vocab_size or least < 0:
            raise DataError(
                f"{cut.file.prefix}.bin holds token {least if least < 0 else most}; the tokenizer has {self.plan.vocab_size}",
                why="it was made with another tokenizer",
                do="make the data set again with this model's tokenizer",
            )
        return [Sample(piece, piece) for piece in pieces]


def blend_order(weights: Sequence[float], count: int) -> np.ndarray:
    """For each of `count` rows the data set that it is from, int16: always the one that is furthest behind its share.

    As Megatron's build_blending_indices.
    """
    which = np.zeros(count, np.int16)
    if len(weights) == 1:
        return which
    drawn = [0] * len(weights)
    for number in range(count):
        so_far = max(number, 1)
        best, most = 0, weights[0] * so_far - drawn[0]
        for at in range(1, len(weights)):
            behind = weights[at] * so_far - drawn[at]
            if behind > most:
                best, most = at, behind
        which[number] = best
        drawn[best] += 1
    return which


@dataclass(frozen=True)
class Indexed:
    """What --data_path gives. fingerprint: of the data and of all that decides the rows. documents: prefix and documents of each data set."""

    train: IndexedRows
    val: IndexedRows | None
    fingerprint: str
    documents: tuple[tuple[str, int], ...]

    @property
    def drawn(self) -> list[int]:
        """Training rows of each data set."""
        return np.bincount(self.train.which, minlength=len(self.train.cuts)).tolist()


def open_indexed(blend: Blend, *, length: int, val_ratio: float, seed: int, shuffle: bool, vocab_size: int) -> Indexed:
    """Training rows from the first documents of each data set and validation rows from the last ones, as Megatron's --split cuts them.

    Where some data set's last documents are less than a row, nothing is evaluated, and all documents are trained on.
    """
    first = round(1 - val_ratio, 9)
    if val_ratio > 0 and any(_num_rows(IndexedFile(prefix), first, length) < 1 for prefix in blend.prefixes):
        get_logger().warning(
            "the last %g of some data set's documents are less than a row of %d tokens: nothing is evaluated",
            val_ratio,
            length,
        )
        val_ratio, first = 0.0, 1.0
    plan = Plan(blend, length, (0.0, first), seed, shuffle, vocab_size)
    train = IndexedRows(plan)
    val = IndexedRows(plan._replace(part=(first, 1.0), shuffle=False)) if val_ratio > 0 else None
    files = [cut.file for cut in train.cuts]
    seen = [[file.dtype.str, len(file), *(ends_hash(path) for path in files_of(file.prefix))] for file in files]
    parts = [INDEXED_VERSION, seen, blend.weights, length, val_ratio, seed, shuffle]
    return Indexed(train, val, f"indexed-{hash_values(parts)}", tuple((file.prefix, len(file)) for file in files))


def _num_rows(file: IndexedFile, share: float, length: int) -> int:
    """Rows in the documents from this share of them on."""
    return (int(file.lengths[int(share * len(file)) :].sum(dtype=np.int64)) - 1) // (length - 1)
