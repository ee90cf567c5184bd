"""What became of the rows: counts per reason with examples, tokens, lengths and how full the packs are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

EXAMPLES = 3
PERCENTILES = (0, 50, 90, 99, 100)


@dataclass
class Reason:
    """Rows left out for one reason: how many, and the first few as `file:line: reason`."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Part:
    """One of the two sets, train or validation.

    rows_wanted : rows that the split and #N chose, repetitions counted.
    samples     : of these, encoded and kept.
    rows        : training rows: packs, or the samples themselves without packing.
    tokens      : tokens of all rows; trained: those that carry loss.
    lengths     : percentile of the sample length in tokens, by percent ("50" is the median).
    efficiency  : tokens / (rows * capacity) when packing, else None.
    """

    rows_wanted: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    efficiency: float | None = None

    def measure(self, lengths: np.ndarray) -> None:
        """Fill `lengths` from the tokens of each sample."""
        values = np.percentile(lengths, PERCENTILES, method="nearest") if len(lengths) else []
        self.lengths = {str(percent): int(value) for percent, value in zip(PERCENTILES, values, strict=False)}


@dataclass
class Report:
    """The data report, per data set as the user wrote it, per reason, and of what training and validation got.

    rows_read           : rows in the files.
    rows_train, rows_val : rows chosen from them by split, #N and interleave_prob, repetitions counted.
    left_out            : rows that are malformed or, once chosen, cannot be encoded.
    """

    rows_read: dict[str, int] = field(default_factory=dict)
    rows_train: dict[str, int] = field(default_factory=dict)
    rows_val: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, Reason] = field(default_factory=dict)
    train: Part = field(default_factory=Part)
    val: Part | None = None

    def leave_out(self, kind: str, example: str, *, count: int = 1) -> None:
        """Count `count` more rows left out for `kind`."""
        reason = self.left_out.setdefault(kind, Reason())
        reason.count += count
        if len(reason.examples) < EXAMPLES:
            reason.examples.append(example)

    @property
    def num_left_out(self) -> int:
        """Rows left out for any reason."""
        return sum(reason.count for reason in self.left_out.values())

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        """The report that `as_json` gave."""
        return cls(
            rows_read=value["rows_read"],
            rows_train=value["rows_train"],
            rows_val=value["rows_val"],
            left_out={kind: Reason(**reason) for kind, reason in value["left_out"].items()},
            train=Part(**value["train"]),
            val=Part(**value["val"]) if value["val"] else None,
        )

    def reasons(self) -> str:
        """The counts per reason in one line, most frequent first."""
        ordered = sorted(self.left_out.items(), key=lambda item: -item[1].count)
        return ", ".join(f"{kind}: {reason.count}" for kind, reason in ordered)

    def table(self) -> str:
        """The report as a text for people: the data sets, what was left out and why, and the lengths of what is used."""
        total = sum(self.rows_read.values())
        lines = [f"data: {total} rows read, {self.num_left_out} left out"]
        if len(self.rows_read) > 1:
            lines.append(f"  {'rows':>9} {'train':>9} {'val':>9}  data set")
            for value, count in self.rows_read.items():
                train, val = self.rows_train.get(value, 0), self.rows_val.get(value, 0)
                lines.append(f"  {count:>9} {train:>9} {val:>9}  {_printable(value)}")
        if self.left_out:
            lines.append(f"  {'left out':>9} {'share':>9}  reason")
        for kind, reason in sorted(self.left_out.items(), key=lambda item: -item[1].count):
            share = f"{100 * reason.count / max(total, 1):.2f} %"
            lines.append(f"  {reason.count:>9} {share:>9}  {kind}, such as {_printable(reason.examples[0])}")
        for name, part in (("train", self.train), ("val", self.val)):
            if part is None:
                continue
            trained = 100 * part.trained / part.tokens if part.tokens else 0.0
            packs = f" in {part.rows} packs ({100 * part.efficiency:.1f} % full)" if part.efficiency is not None else ""
            lines.append(f"  {name:<5} {part.samples} samples{packs}, {part.tokens} tokens, {trained:.1f} % trained")
            if part.lengths:
                spread = part.lengths
                lines.append(
                    f"        length: shortest {spread['0']}, median {spread['50']}, 90 % {spread['90']}, "
                    f"99 % {spread['99']}, longest {spread['100']}"
                )
        return "\n".join(lines)


def _printable(text: str) -> str:
    """The text in one line that cannot steer a terminal, shortened to 300 characters."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if len(shown) <= 300 else f"{shown[:297]}..."
