"""Data sets to encoded, packed rows on disk: `prepare`. Runs before torch is imported, once per run and not per rank."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers

from megatron_swift.data.cache import (
    Damaged,
    PackedRows,
    RowWriter,
    build_once,
    default_cache_dir,
    read_checked,
    write_checked,
)
from megatron_swift.data.encode import LossScale, OverLength, Truncation, encode_many
from megatron_swift.data.interleave import StoppingStrategy, check_probabilities, interleave, sample, split
from megatron_swift.data.messages import RowError, to_conversation
from megatron_swift.data.packing import pack
from megatron_swift.data.readers import Stamp, changed
from megatron_swift.data.registry import Identity
from megatron_swift.data.report import Part, Report
from megatron_swift.data.sources import UNWANTED, Source, Table, find_source, hash_files, make_lookup
from megatron_swift.data.template import Template
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Sample
from megatron_swift.data.workers import map_in_order
from megatron_swift.utils.errors import DataError, UsageError
from megatron_swift.utils.log import get_logger

CODE_VERSION = 2  # raise it when the same input gives other rows: old caches are then not used
CHUNK = 1000  # rows encoded at a time
OUTCOME = "outcome.json"
SKIP_HINT = "use --strict false to leave such rows out and count them"
OVER_LENGTH = "longer than max_length"

Index = np.ndarray  # int64 [rows]: numbers of rows, counted through all tables


@dataclass(frozen=True)
class DataOptions:
    """What to prepare and how. The user's names; see the parameter list for their meaning.

    columns      : the data's column name -> the name we know.
    template     : a name for `get_template`, or the template.
    system       : the run's system prompt; None is the template's default, "" is none.
    truncation   : what happens to a row longer than max_length.
    strict       : True: the first malformed row is an error; False: such rows are left out and counted.
    packing      : rows are packs of up to max_length tokens; otherwise a row is one sample.
    cache_dir    : None is `default_cache_dir()`.
    start_method : how worker processes start ("fork", "spawn"), None is Python's default. Never changes the result.
    """

    dataset: tuple[str, ...]
    val_dataset: tuple[str, ...] = ()
    split_dataset_ratio: float = 0.01
    data_seed: int = 42
    dataset_shuffle: bool = True
    val_dataset_shuffle: bool = False
    interleave_prob: tuple[float, ...] | None = None
    stopping_strategy: StoppingStrategy = "first_exhausted"
    use_hf: bool = False
    hub_token: str | None = field(default=None, repr=False)
    download_mode: str = "reuse_dataset_if_exists"
    custom_dataset_info: tuple[str, ...] = ()
    custom_register_path: tuple[str, ...] = ()
    strict: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    template: str | Template = "chatml"
    system: str | None = None
    max_length: int | None = None
    truncation: Truncation = "delete"
    loss_scale: LossScale = "default"
    packing: bool = False
    dataset_num_proc: int = 1
    cache_dir: Path | None = None
    use_cache: bool = True
    start_method: Literal["fork", "spawn", "forkserver"] | None = None


class Prepared(NamedTuple):
    """Data that is ready to train on.

    train, val : the rows; val is None where there is no validation.
    report     : what became of the rows.
    val_rows   : where validation was split off, its rows as {"messages": [...]}, in order; else [].
    first      : the first training sample, to show.
    folder     : where it lies; `open_prepared(folder)` opens it in another process.
    """

    train: PackedRows
    val: PackedRows | None
    report: Report
    val_rows: list[dict[str, Any]]
    first: Sample
    folder: Path


def prepare(options: DataOptions, tokenizer: Tokenizer) -> Prepared:
    """The rows that the options ask for, from the cache or newly encoded.

    The result depends on the files' content, the options and the tokenizer, never on dataset_num_proc. DataError names
    file and line of a bad row when strict, and says what became of the rows when none is left; UsageError for options
    that cannot work.
    """
    _check_options(options)
    template = get_template(options.template) if isinstance(options.template, str) else options.template
    lookup = make_lookup(
        use_hf=options.use_hf,
        hub_token=options.hub_token,
        download_mode=options.download_mode,
        custom_dataset_info=options.custom_dataset_info,
        custom_register_path=options.custom_register_path,
    )
    sources = [find_source(value, lookup=lookup) for value in options.dataset]
    val_sources = [find_source(value, lookup=lookup, flag="--val_dataset") for value in options.val_dataset]
    if any(source.needs_identity for source in (*sources, *val_sources)):
        for flag, values in (("model_name", options.model_name), ("model_author", options.model_author)):
            if not values:
                get_logger().warning("--%s is not given: its place in the self-cognition rows stays as it is", flag)
    stamps = {path: Stamp.of(path) for source in (*sources, *val_sources) for path in source.paths}
    key = _cache_key(options, tokenizer, template, sources, val_sources)
    builder = _Builder(options, tokenizer, template, sources, val_sources, stamps)
    entry = build_once(
        options.cache_dir or default_cache_dir(),
        key,
        build=builder.build,
        check=_check_entry,
        use_cache=options.use_cache and options.download_mode == "reuse_dataset_if_exists",
    )
    return open_prepared(entry.folder)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`; Damaged where it is not whole."""
    outcome = read_checked(folder / OUTCOME)
    train = PackedRows(folder / "train")
    val = PackedRows(folder / "val") if outcome["has_val"] else None
    report = Report.from_json(outcome["report"])
    return Prepared(train, val, report, outcome["val_rows"], train.row(0)[0], folder)


def _check_entry(folder: Path) -> None:
    prepared = open_prepared(folder)
    for rows in (prepared.train, prepared.val):
        if rows is not None:
            rows.check()
            if not len(rows):
                raise Damaged(f"{rows.folder} is empty")


def _check_options(options: DataOptions) -> None:
    if not options.dataset:
        raise UsageError("--dataset is missing", do="give at least one file, folder or data set name")
    if not 0 <= options.split_dataset_ratio < 1:
        raise UsageError(f"--split_dataset_ratio {options.split_dataset_ratio} must be at least 0 and below 1")
    for source, target in options.columns.items():
        if not isinstance(target, str):
            raise UsageError(
                f"--columns: {source!r} must become a name, not {target!r}", do='for example {"q": "query"}'
            )
    if options.packing and options.max_length is None:
        raise UsageError("--packing needs --max_length", why="it is the length of a pack")
    if options.dataset_num_proc < 1:
        raise UsageError(f"--dataset_num_proc {options.dataset_num_proc} must be at least 1")
    if options.interleave_prob is not None:
        check_probabilities(options.interleave_prob, len(options.dataset))
    elif options.stopping_strategy != "first_exhausted":
        get_logger().warning("--stopping_strategy is not used: --interleave_prob is not given")


def _cache_key(
    options: DataOptions,
    tokenizer: Tokenizer,
    template: Template,
    sources: Sequence[Source],
    val_sources: Sequence[Source],
) -> str:
    """A hash of all that decides the rows."""

    def describe(source: Source) -> list[Any]:
        entry = source.registered
        place = {path: number for number, path in enumerate(source.paths)}
        parts = [(place[path], path.suffix.lower(), subset.name) for path, subset in source.parts]
        fixups = [entry.names[0], entry.fingerprint] if entry else []
        return [hash_files(source.paths), parts, fixups, source.request.limit]

    parts = {
        "code": CODE_VERSION,
        "sources": [describe(source) for source in sources],
        "val_sources": [describe(source) for source in val_sources],
        "tokenizer": [tokenizer.fingerprint(), tokenizers.__version__],
        "template": repr(template),
        "options": {
            name: getattr(options, name)
            for name in (
                *("split_dataset_ratio", "data_seed", "dataset_shuffle", "val_dataset_shuffle", "strict", "model_name"),
                *("model_author", "system", "max_length", "truncation", "loss_scale", "packing", "interleave_prob"),
                "stopping_strategy",
            )
        },
        "columns": sorted(options.columns.items()),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


class _Rows:
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


class _Fault(NamedTuple):
    """A row that cannot be used: its number, the reason to count it by, the reason in full, and how to mend it."""

    number: int
    kind: str
    text: str
    do: str

    @classmethod
    def of(cls, number: int, error: RowError) -> _Fault:
        return cls(number, error.kind, str(error), error.do)


class _Encoded(NamedTuple):
    """The samples of a chunk one after another, the number of each one's row, and the rows that gave none."""

    numbers: Index
    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None
    lengths: np.ndarray
    trained: np.ndarray
    faults: list[_Fault]


def _find_faults(rows: _Rows, numbers: Index) -> list[_Fault]:
    """The rows among `numbers` that are malformed, without encoding them."""
    faults = []
    for number in numbers.tolist():
        try:
            rows.read(number)
        except RowError as error:
            faults.append(_Fault.of(number, error))
    return faults


def _encode_chunk(rows: _Rows, encode: Callable[[list[Conversation]], list[Any]], numbers: Index) -> _Encoded:
    faults: list[_Fault] = []
    read: list[tuple[int, Conversation]] = []
    for number in numbers.tolist():
        try:
            read.append((number, rows.read(number)))
        except RowError as error:  # the row was checked, but a user's fixup may be fickle
            faults.append(_Fault.of(number, error))
    kept: list[int] = []
    samples: list[Sample] = []
    for (number, _), outcome in zip(read, encode([conversation for _, conversation in read]), strict=True):
        if isinstance(outcome, DataError):
            kind = OVER_LENGTH if isinstance(outcome, OverLength) else re.sub(r"\d+", "N", outcome.what)
            faults.append(_Fault(number, kind, outcome.what, outcome.do))
        else:
            kept += [number] * len(outcome)
            samples += outcome
    lengths = np.array([len(sample.ids) for sample in samples], np.int64)
    ids = np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in samples)])
    labels = np.concatenate([np.zeros(0, np.int32), *(sample.labels for sample in samples)])
    weights = None
    if any(sample.weights is not None for sample in samples):
        weights = np.concatenate([one.labels != IGNORE if one.weights is None else one.weights for one in samples])
    ends = np.concatenate([[0], np.cumsum(labels != IGNORE)])[np.concatenate([[0], np.cumsum(lengths)])]
    return _Encoded(np.array(kept, np.int64), ids, labels, weights, lengths, np.diff(ends), faults)


class _Builder:
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
        self.encode = partial(
            encode_many,
            template,
            tokenizer,
            max_length=options.max_length,
            truncation="delete" if options.truncation == "raise" else options.truncation,  # we know the line: we raise
            loss_scale=options.loss_scale,
            system=options.system,
        )

    def build(self, staging: Path) -> None:
        options, report = self.options, self.report
        identity = Identity(options.model_name, options.model_author)
        tables = [Table(source, identity=identity) for source in (*self.sources, *self.val_sources)]
        for file in (file for table in tables for file in table.files):
            if file.stamp != self.stamps[file.path]:  # since its hash was taken
                raise changed(file.path)
        self.rows = _Rows(tables, options.columns)
        usable = self._usable_rows()
        train, val = self._choose(usable)
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
            "val_rows": [self._as_json(number) for number in val.tolist()] if split else [],
        }
        write_checked(staging / OUTCOME, outcome)

    def _no_val(self) -> None:
        why = self.report.reasons()
        if self.val_sources:
            raise DataError("no row of --val_dataset is left to evaluate on", why=why)
        get_logger().warning("no row of the validation split is left (%s): there will be no evaluation", why)

    def _as_json(self, number: int) -> dict[str, Any]:
        turns = []
        row = self.rows.read(number)
        for message in row.messages:
            turn: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.train is not None:
                turn["loss"] = message.train
            if message.loss_scale is not None:
                turn["loss_scale"] = message.loss_scale
            turns.append(turn)
        return {"messages": turns, **({"tools": list(row.tools)} if row.tools else {})}

    def _usable_rows(self) -> list[Index]:
        """The rows of each table that are not malformed, in the files' order."""
        starts = self.rows.starts
        good = np.ones(starts[-1], np.bool_)
        for faults in self._in_order(partial(_find_faults, self.rows), np.arange(starts[-1]), "checked"):
            self._count(faults)
            good[[fault.number for fault in faults]] = False
        usable = []
        for table, start, stop in zip(self.rows.tables, starts[:-1], starts[1:], strict=True):
            value = table.source.request.value
            self.report.rows_read[value] = self.report.rows_read.get(value, 0) + int(stop - start)
            usable.append(start + np.flatnonzero(good[start:stop]))
            if not len(usable[-1]):
                why = self.report.reasons() if stop > start else "it is empty"
                files = ", ".join(str(path) for path in table.source.paths[:3])
                flag = "--val_dataset" if len(usable) > len(self.sources) else "--dataset"
                raise DataError(f"{flag} {value} has no usable row", why=why, do=f"look into {files}")
        return usable

    def _count(self, faults: list[_Fault]) -> None:
        """Count what is left out, or raise for the first of them where the options say so."""
        for fault in faults:
            text = f"{self.rows.where(fault.number)}: {fault.text}"
            if fault.kind == OVER_LENGTH:
                if self.options.truncation == "raise":
                    do = "raise --max_length, or set --truncation_strategy to delete, left, right or split"
                    raise DataError(text, do=do)
            elif self.options.strict and fault.kind != UNWANTED:
                raise DataError(text, do=f"{fault.do}; or {SKIP_HINT}" if fault.do else SKIP_HINT)
            self.report.leave_out(fault.kind, text)

    def _choose(self, usable: list[Index]) -> tuple[Index, Index]:
        """The rows to train and to evaluate on, in order. One random state goes through all sets in their order."""
        options = self.options
        state = np.random.RandomState(options.data_seed)
        train, val = [], []
        ratio = 0.0 if self.val_sources else options.split_dataset_ratio
        for source, rows in zip(self.sources, usable, strict=False):
            chosen, held_out = split(
                rows, limit=source.request.limit, ratio=ratio, state=state, shuffle=options.dataset_shuffle
            )
            train.append(chosen)
            val.append(held_out)
        for source, rows in zip(self.val_sources, usable[len(self.sources) :], strict=True):
            val.append(sample(rows, source.request.limit, state=state, shuffle=options.val_dataset_shuffle))
        if options.interleave_prob is None:
            train_rows = np.concatenate(train)
        else:  # validation rows are not drawn: each counts once
            probabilities, strategy = options.interleave_prob, options.stopping_strategy
            train_rows = interleave(train, probabilities, stopping_strategy=strategy, state=state)
        val_rows = np.concatenate(val)
        self._count_chosen(train_rows, val_rows)
        shuffle_val = options.val_dataset_shuffle if self.val_sources else options.dataset_shuffle
        train_rows = state.permutation(train_rows) if options.dataset_shuffle else train_rows
        return train_rows, state.permutation(val_rows) if shuffle_val else val_rows

    def _count_chosen(self, train: Index, val: Index) -> None:
        """How many rows of each data set were chosen, into the report."""
        edges = self.rows.starts[1:]
        for chosen, counts in ((train, self.report.rows_train), (val, self.report.rows_val)):
            found = np.bincount(np.searchsorted(edges, chosen, side="right"), minlength=len(edges))
            for table, count in zip(self.rows.tables, found.tolist(), strict=True):
                value = table.source.request.value
                counts[value] = counts.get(value, 0) + count

    def _write(self, folder: Path, wanted: Index) -> Part:
        """Encode each row of `wanted` once, pack and write them in the order of `wanted`."""
        unique = np.unique(wanted)
        numbers = [np.zeros(0, np.int64)]
        part = Part(rows_wanted=len(wanted))
        with RowWriter(folder) as writer:
            for chunk in self._in_order(partial(_encode_chunk, self.rows, self.encode), unique, "encoded"):
                self._count(chunk.faults)
                numbers.append(chunk.numbers)
                writer.add(
                    ids=chunk.ids,
                    labels=chunk.labels,
                    weights=chunk.weights,
                    lengths=chunk.lengths,
                    trained=chunk.trained,
                )
            kept = np.concatenate(numbers)  # sorted, as `unique` is
            lengths = writer.lengths[order := _expand(kept, wanted)]
            members, sizes = order, np.ones(len(order), np.int64)
            if self.options.packing and len(order):
                assert self.options.max_length is not None
                packs = pack(lengths.tolist(), self.options.max_length)
                members = order[np.concatenate([np.array(group, np.int64) for group in packs])]
                sizes = np.array([len(group) for group in packs], np.int64)
                part.efficiency = float(lengths.sum()) / (len(packs) * self.options.max_length)
            writer.finish(members=members, sizes=sizes)
        part.samples, part.rows, part.tokens = len(order), len(sizes), int(lengths.sum())
        part.trained = writer.count_trained(members)
        part.measure(lengths)
        return part

    def _in_order(self, job: Callable[[Index], Any], numbers: Index, done: str) -> Iterator[Any]:
        """job(chunk) for each chunk of `numbers`, in order, with a word now and then on how far it is."""
        chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        last = time.monotonic()
        results = map_in_order(
            job, chunks, num_proc=self.options.dataset_num_proc, start_method=self.options.start_method
        )
        for number, result in enumerate(results, 1):
            if time.monotonic() - last > 10:
                last = time.monotonic()
                get_logger().info("data: %s %d of %d rows", done, min(number * CHUNK, len(numbers)), len(numbers))
            yield result


def _expand(kept: Index, wanted: Index) -> Index:
    """The places in `kept`, sorted and with repeats, of each of `wanted` in turn: none, one, or several that follow one another."""
    stop = np.searchsorted(kept, wanted, "right")
    counts = stop - np.searchsorted(kept, wanted, "left")
    return np.repeat(stop - np.cumsum(counts), counts) + np.arange(counts.sum())
