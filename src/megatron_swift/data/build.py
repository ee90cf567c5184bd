"""Filling a cache entry: all rows are checked, chosen, encoded, packed and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_swift.data.cache import RowWriter, file_checksum, write_checked
from megatron_swift.data.choice import choose
from megatron_swift.data.chunks import (
    Fault,
    Index,
    Rows,
    conversation_json,
    encode_chunk,
    encoder,
    find_faults,
    refusal,
)
from megatron_swift.data.options import DataOptions
from megatron_swift.data.packing import pack_arrays
from megatron_swift.data.progress import Progress
from megatron_swift.data.readers import Stamp, changed
from megatron_swift.data.registry import Identity
from megatron_swift.data.report import Part, Report
from megatron_swift.data.sources import Source, Table
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.workers import map_in_order
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

CHUNK = 1000  # rows encoded at a time
BLOCK = 1 << 16  # rows of an index computed with at a time: what takes memory for every row is kept few
OUTCOME = "outcome.json"
VAL_ROWS = "val_rows.jsonl"
SKIP_HINT = "use --strict false to leave such rows out and count them"


class Builder:
    """Fills a cache entry: check all rows, choose, encode, pack, write."""

    def __init__(
        self,
        options: DataOptions,
        tokenizer: Tokenizer,
        template: Template,
        sources: Sequence[Source],
        val_sources: Sequence[Source],
        stamps: Mapping[Path, Stamp],
    ) -> None:
        self.options, self.sources, self.val_sources, self.stamps = options, sources, val_sources, stamps
        self.report = Report()
        self.encode = encoder(options, template, tokenizer)

    def build(self, staging: Path) -> None:
        options, report = self.options, self.report
        identity = Identity(options.model_name, options.model_author)
        tables = [Table(source, identity=identity) for source in (*self.sources, *self.val_sources)]
        for file in (file for table in tables for file in table.files):
            if file.stamp != self.stamps[file.path]:  # since its hash was taken
                raise changed(file.path)
        self.rows = Rows(tables, options.columns)
        usable = self._usable_rows()
        train, val = choose(options, self.sources, self.val_sources, usable)
        del usable
        self._count_chosen(train, val)
        report.train = self._write(staging / "train", train)
        if not report.train.samples:
            raise DataError("no row is left to train on", why=report.reasons() or "the data sets have no rows")
        has_val = len(val) > 0
        if has_val:
            report.val = self._write(staging / "val", val)
            if not report.val.samples:
                self._no_val()
                has_val, report.val = False, None
        split = has_val and not self.val_sources
        outcome = {
            "report": report.as_json(),
            "has_val": has_val,
            "val_rows": self._write_val_rows(staging / VAL_ROWS, val) if split else None,
        }
        write_checked(staging / OUTCOME, outcome)

    def _write_val_rows(self, path: Path, val: Index) -> int:
        """The rows as {"messages": [...]}, one a line; the file's checksum."""
        with path.open("w", encoding="utf-8") as file:
            for number in val:
                row = conversation_json(self.rows.read(int(number)))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return file_checksum(path)

    def _no_val(self) -> None:
        why = self.report.reasons()
        if self.val_sources:
            raise DataError("no row of --val_dataset is left to evaluate on", why=why)
        get_logger().warning("no row of the validation split is left (%s): there will be no evaluation", why)

    def _usable_rows(self) -> list[Index]:
        """The rows of each table that are not malformed, in the files' order."""
        starts = self.rows.starts
        good = np.ones(starts[-1], np.bool_)
        dtype = np.int32 if starts[-1] < 1 << 31 else np.int64
        for faults in self._in_order(partial(find_faults, self.rows), range(starts[-1]), "checked"):
            self._count(faults)
            good[[fault.number for fault in faults]] = False
        usable = []
        for table, start, stop in zip(self.rows.tables, starts[:-1], starts[1:], strict=True):
            value = table.source.request.value
            self.report.rows_read[value] = self.report.rows_read.get(value, 0) + int(stop - start)
            usable.append((start + np.flatnonzero(good[start:stop])).astype(dtype))
            if not len(usable[-1]):
                why = self.report.reasons() if stop > start else "it is empty"
                files = ", ".join(str(path) for path in table.source.paths[:3])
                flag = "--val_dataset" if len(usable) > len(self.sources) else "--dataset"
                raise DataError(f"{flag} {value} has no usable row", why=why, do=f"look into {files}")
        return usable

    def _count(self, faults: list[Fault]) -> None:
        """Count what is left out, or raise for the first of them where the options say so."""
        for fault in faults:
            text = f"{self.rows.where(fault.number)}: {fault.text}"
            do = refusal(fault, self.options, skip=SKIP_HINT)
            if do is not None:
                raise DataError(text, do=do)
            self.report.leave_out(fault.kind, text)

    def _count_chosen(self, train: Index, val: Index) -> None:
        """How many rows of each data set were chosen, into the report."""
        edges = self.rows.starts[1:]
        for chosen, counts in ((train, self.report.rows_train), (val, self.report.rows_val)):
            found = np.zeros(len(edges), np.int64)
            for at in range(0, len(chosen), BLOCK):
                tables = np.searchsorted(edges, chosen[at : at + BLOCK], side="right")
                found += np.bincount(tables, minlength=len(edges))
            for table, count in zip(self.rows.tables, found.tolist(), strict=True):
                value = table.source.request.value
                counts[value] = counts.get(value, 0) + count

    def _write(self, folder: Path, wanted: Index) -> Part:
        """Encode each row of `wanted` once, pack and write them in the order of `wanted`."""
        unique = np.unique(wanted)
        numbers = [np.zeros(0, wanted.dtype)]
        part = Part(rows_wanted=len(wanted))
        with RowWriter(folder) as writer:
            for chunk in self._in_order(partial(encode_chunk, self.rows, self.encode), unique, "encoded"):
                self._count(chunk.faults)
                numbers.append(chunk.numbers.astype(wanted.dtype))
                writer.add(
                    ids=chunk.ids,
                    labels=chunk.labels,
                    weights=chunk.weights,
                    lengths=chunk.lengths,
                    trained=chunk.trained,
                )
            order = _expand(np.concatenate(numbers), wanted)  # the numbers are sorted, as `unique` is
            del unique, numbers
            lengths = writer.lengths[order]
            members, sizes = order, np.ones(len(order), np.int32)
            if self.options.packing and len(order):
                assert self.options.max_length is not None
                places, sizes = pack_arrays(lengths, self.options.max_length)
                members = order[places]
                part.efficiency = int(lengths.sum(dtype=np.int64)) / (len(sizes) * self.options.max_length)
            part.trained = writer.count_trained(members)
            writer.finish(members=members, sizes=sizes)
        part.samples, part.rows, part.tokens = len(order), len(sizes), int(lengths.sum(dtype=np.int64))
        part.measure(lengths)
        return part

    def _in_order(self, job: Callable[[Any], Any], numbers: Index | range, done: str) -> Iterator[Any]:
        """job(chunk) for each chunk of `numbers`, in order, saying how far it is."""
        chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        progress = Progress(done, len(numbers))
        results = map_in_order(
            job, chunks, num_proc=self.options.dataset_num_proc, start_method=self.options.start_method
        )
        try:
            for number, result in enumerate(results, 1):
                yield result
                progress.update(min(number * CHUNK, len(numbers)))
        finally:
            progress.close()
        progress.finish()


def _expand(kept: Index, wanted: Index) -> Index:
    """The places in `kept`, sorted and with repeats, of each of `wanted` in turn: none, one, or several that follow one another."""
    parts = [np.zeros(0, wanted.dtype)]
    for at in range(0, len(wanted), BLOCK):
        block = wanted[at : at + BLOCK]
        stop = np.searchsorted(kept, block, "right")
        counts = stop - np.searchsorted(kept, block, "left")
        parts.append((np.repeat(stop - np.cumsum(counts), counts) + np.arange(counts.sum())).astype(wanted.dtype))
    return np.concatenate(parts)
