"""The rows of data sets as questions to answer: the final reply is taken off and kept as the label."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_swift.data.interleave import sample
from megatron_swift.data.messages import MESSAGES_COLUMNS, TRAINABLE, RowError, to_conversation
from megatron_swift.data.registry import Identity, Row
from megatron_swift.data.sources import UNWANTED, Lookup, Table, find_source
from megatron_swift.data.types import Message
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

_NO_REPLY = ("the last turn is a question", "no assistant turn", "no column to learn from", "empty response")
_STAND_IN = "-"  # a reply that makes a row without one readable; it is taken off again


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its last reply. labels: the reply of the data set, None where it has none."""

    messages: tuple[Message, ...]
    labels: str | None
    where: str
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Which rows, under the names of the parameters."""

    datasets: tuple[str, ...]
    columns: Mapping[str, str]
    identity: Identity
    lookup: Lookup = field(default_factory=Lookup)
    strict: bool = True
    shuffle: bool = False
    data_seed: int = 42
    limit: int | None = None


def read_questions(options: QuestionOptions) -> list[Question]:
    """All questions, in the files' order (or shuffled), at most `limit`.

    A row that cannot be used is a DataError naming file and line when strict, otherwise left out and counted in the log.
    DataError, too, when none is left.
    """
    state = np.random.RandomState(options.data_seed)
    columns = tuple((str(source), str(target)) for source, target in options.columns.items())
    places: list[tuple[Table, int]] = []
    for value in options.datasets:
        source = find_source(value, lookup=options.lookup)
        table = Table(source, identity=options.identity)
        if not len(table):
            raise DataError(f"--val_dataset {value} has no row")
        rows = sample(np.arange(len(table)), source.request.limit, state=state, shuffle=options.shuffle)
        places += [(table, int(index)) for index in rows]
    if options.shuffle:
        places = [places[index] for index in state.permutation(len(places))]
    questions, left_out = [], LeftOut()
    for table, index in places:
        try:
            questions.append(_question(table.read(index), columns, table.where(index)))
        except RowError as error:
            if options.strict and error.kind != UNWANTED:
                do = f"{error.do}; or use --strict false to leave such rows out"
                raise DataError(f"{table.where(index)}: {error}", do=do) from None
            left_out.add(f"{table.where(index)}: {error}")
        if options.limit is not None and len(questions) == options.limit:
            break
    left_out.report()
    if not questions:
        raise DataError("no row is left to answer", why=left_out.first)
    return questions


class LeftOut:
    """Counts rows that are not answered and remembers the first."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, reason: str) -> None:
        """Count a row; reason: file, line and what is wrong."""
        self.count += 1
        self.first = self.first or reason

    def report(self) -> None:
        """Say how many there were, if any."""
        if self.count:
            get_logger().warning("%d rows are left out, the first: %s", self.count, self.first)


def _question(row: Row, columns: tuple[tuple[str, str], ...], where: str) -> Question:
    try:
        conversation, stand_in = to_conversation(row, columns=columns), False
    except RowError as error:
        if error.kind not in _NO_REPLY:
            raise
        conversation, stand_in = to_conversation(_with_reply(row, columns), columns=columns), True
    messages = conversation.messages
    replies = list(itertools.takewhile(lambda message: message.role in TRAINABLE, reversed(messages)))
    asked = tuple(messages[: len(messages) - len(replies)])
    if not asked or asked[-1].role == "system":
        raise RowError("no question", "the row holds nothing to answer")
    labels = "".join(message.content for message in reversed(replies))
    return Question(asked, None if stand_in else labels or None, where, conversation.tools)


def _with_reply(row: Row, columns: Sequence[tuple[str, str]]) -> Row:
    """The row with a reply for `to_conversation` to find."""
    names = {source.lower(): target.lower() for source, target in columns}
    reply: dict[str, Any] = {"role": "assistant", "content": _STAND_IN}
    for name, value in row.items():
        if names.get(name.lower(), name.lower()) in MESSAGES_COLUMNS and isinstance(value, list):
            return {**row, name: [*value, reply]}
    return {**row, "response": _STAND_IN}
