"""Rows of several tables, read and encoded a chunk at a time. What worker processes do."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from megatron_swift.data.encode import OverLength, encode_many
from megatron_swift.data.messages import RowError, to_conversation
from megatron_swift.data.options import DataOptions
from megatron_swift.data.sources import UNWANTED, Table
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Sample
from megatron_swift.utils.errors import DataError

OVER_LENGTH = "longer than max_length"

Index = np.ndarray  # int32 or int64 [rows]: numbers of rows, counted through all tables
Encode = Callable[[Sequence[Conversation]], list[list[Sample] | DataError]]


class Rows:
    """The rows of several tables, numbered through."""

    def __init__(self, tables: Sequence[Table], columns: Mapping[str, str]) -> None:
        self.tables = tables
        self.columns = tuple(columns.items())
        self.starts = np.cumsum([0, *(len(table) for table in tables)])
        self._begin: list[int] = self.starts[:-1].tolist()

    def _find(self, number: int) -> tuple[Table, int]:
        at = bisect.bisect_right(self._begin, number) - 1
        return self.tables[at], number - self._begin[at]

    def read(self, number: int) -> Conversation:
        table, index = self._find(number)
        return to_conversation(table.read(index), columns=self.columns)

    def where(self, number: int) -> str:
        table, index = self._find(number)
        return table.where(index)


class Fault(NamedTuple):
    """A row that cannot be used: its number, the reason to count it by, the reason in full, and how to mend it."""

    number: int
    kind: str
    text: str
    do: str

    @classmethod
    def of(cls, number: int, error: RowError) -> Fault:
        return cls(number, error.kind, str(error), error.do)


class Encoded(NamedTuple):
    """The samples of a chunk one after another, the number of each one's row, and the rows that gave none."""

    numbers: Index
    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None
    lengths: np.ndarray
    trained: np.ndarray
    faults: list[Fault]


def conversation_json(row: Conversation) -> dict[str, Any]:
    """The row as {"messages": [...]}, as it can be read again."""
    turns = []
    for message in row.messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.train is not None:
            turn["loss"] = message.train
        if message.loss_scale is not None:
            turn["loss_scale"] = message.loss_scale
        turns.append(turn)
    return {"messages": turns, **({"tools": list(row.tools)} if row.tools else {})}


def find_faults(rows: Rows, numbers: Index | range) -> list[Fault]:
    """The rows among `numbers` that are malformed, without encoding them."""
    faults = []
    for number in map(int, numbers):
        try:
            rows.read(number)
        except RowError as error:
            faults.append(Fault.of(number, error))
    return faults


def encoder(options: DataOptions, template: Template, tokenizer: Tokenizer) -> Encode:
    """`encode_many` as the options say; where a row that is too long is an error it is found here and raised by who knows its line."""
    return partial(
        encode_many,
        template,
        tokenizer,
        max_length=options.max_length,
        truncation="delete" if options.truncation == "raise" else options.truncation,
        loss_scale=options.loss_scale,
        system=options.system,
    )


def encode_rows(
    rows: Iterable[tuple[int, Callable[[], Conversation]]], encode: Encode
) -> tuple[list[tuple[int, list[Sample]]], list[Fault]]:
    """The samples of each row, with its number, and the rows that give none: those that cannot be read, then the others."""
    faults: list[Fault] = []
    read: list[tuple[int, Conversation]] = []
    for number, make in rows:
        try:
            read.append((number, make()))
        except RowError as error:
            faults.append(Fault.of(number, error))
    found: list[tuple[int, list[Sample]]] = []
    for (number, _), outcome in zip(read, encode([conversation for _, conversation in read]), strict=True):
        if isinstance(outcome, DataError):
            kind = OVER_LENGTH if isinstance(outcome, OverLength) else re.sub(r"\d+", "N", outcome.what)
            faults.append(Fault(number, kind, outcome.what, outcome.do))
        else:
            found.append((number, outcome))
    return found, faults


def refusal(fault: Fault, options: DataOptions, *, skip: str) -> str | None:
    """What to do about a row that the options do not allow to be left out; None where they do. skip: how it could be."""
    if fault.kind == OVER_LENGTH:
        allowed = options.truncation != "raise"
        return None if allowed else "raise --max_length, or set --truncation_strategy to delete, left, right or split"
    if not options.strict or fault.kind == UNWANTED:
        return None
    return f"{fault.do}; or {skip}" if fault.do else skip


def encode_chunk(rows: Rows, encode: Encode, numbers: Index) -> Encoded:
    """The chunk with these rows. They were checked, but a user's fixup may be fickle."""
    found, faults = encode_rows(((number, partial(rows.read, number)) for number in numbers.tolist()), encode)
    kept = [number for number, samples in found for _ in samples]
    samples = [sample for _, samples in found for sample in samples]
    lengths = np.array([len(sample.ids) for sample in samples], np.int64)
    ids = np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in samples)])
    labels = np.concatenate([np.zeros(0, np.int32), *(sample.labels for sample in samples)])
    weights = None
    if any(sample.weights is not None for sample in samples):
        weights = np.concatenate([one.labels != IGNORE if one.weights is None else one.weights for one in samples])
    ends = np.concatenate([[0], np.cumsum(labels != IGNORE)])[np.concatenate([[0], np.cumsum(lengths)])]
    return Encoded(np.array(kept, np.int64), ids, labels, weights, lengths, np.diff(ends), faults)
