"""The rows of a run, however they are come by: encoded before training, or read while it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_swift.args.commands import PtArguments, TrainArguments
from megatron_swift.data.cache import PackedRows
from megatron_swift.data.histogram import text_histogram
from megatron_swift.data.indexed_rows import Indexed, IndexedRows, open_indexed, parse_data_path
from megatron_swift.data.lazy import Lazy, LazyRows, open_lazy
from megatron_swift.data.prepare import DataOptions, Prepared, find_sources, open_prepared, prepare
from megatron_swift.data.streaming import Lane, Stream, open_stream
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample

AnyRows = PackedRows | LazyRows | IndexedRows


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run is told of its rows before it starts, and where its ranks find them.

    name     : the fingerprint of the training rows, in its last component; the folder of prepared ones.
    first    : the first training sample, to show.
    num_rows : training rows; 0 where nobody has counted them.  num_val_rows: rows to evaluate on.
    report   : for data_report.json.  table: the same for people.  val_rows: the validation rows that were split off.
    stream   : what to train on where it is streamed; val_folder: then the prepared validation rows, if there are any.
    lazy     : what to train and to evaluate on where it is encoded later, or is Megatron's indexed data.
    """

    name: Path
    first: Sample
    num_rows: int
    num_val_rows: int
    report: dict[str, Any]
    table: str
    val_rows: Sequence[dict[str, Any]] = ()
    stream: Stream | None = None
    val_folder: Path | None = None
    lazy: Lazy | Indexed | None = None


def prepare_data(args: TrainArguments, options: DataOptions, tokenizer: Tokenizer) -> RunData:
    """The rows that the arguments ask for. Raises as `prepare` does; of streamed rows the first ones are read."""
    if isinstance(args, PtArguments) and args.data_path:
        return _indexed(args, options, tokenizer)
    if args.streaming:
        return _streamed(args, options, tokenizer)
    if args.lazy_tokenize and not args.packing:
        return _lazy(options, tokenizer)
    prepared = prepare(options, tokenizer)
    lengths = text_histogram(prepared.train.sample_tokens, max_length=args.max_length)
    return RunData(
        name=prepared.folder,
        first=prepared.first,
        num_rows=len(prepared.train),
        num_val_rows=len(prepared.val) if prepared.val is not None else 0,
        report=prepared.report.as_json(),
        table=f"{prepared.report.table()}\n{lengths}",
        val_rows=prepared.val_rows,
    )


def _lazy(options: DataOptions, tokenizer: Tokenizer) -> RunData:
    found = open_lazy(options, tokenizer, *find_sources(options))
    read, train, val = sum(found.rows_read.values()), len(found.train), _count(found.val)
    return RunData(
        name=Path(found.fingerprint),
        first=found.train.row(0)[0],
        num_rows=train,
        num_val_rows=val,
        report={"lazy": {"rows_read": found.rows_read, "train": train, "validation": val}},
        table=f"data: {read} rows found, {train} to train on, {val} to evaluate on, encoded when they are needed",
        val_rows=found.val_rows,
        lazy=found,
    )


def _indexed(args: PtArguments, options: DataOptions, tokenizer: Tokenizer) -> RunData:
    assert options.max_length is not None  # args.indexed_rules saw to it
    found = open_indexed(
        parse_data_path(args.data_path),
        length=options.max_length,
        val_ratio=options.split_dataset_ratio,
        seed=options.data_seed,
        shuffle=options.dataset_shuffle,
        vocab_size=tokenizer.vocab_size,
    )
    train, val = len(found.train), _count(found.val)
    lines = [f"data: {train} rows of {args.max_length} tokens, {val} to evaluate on"]
    lines += [
        f"  {count:>9} rows from {documents} documents of {prefix}"
        for count, (prefix, documents) in zip(found.drawn, found.documents, strict=True)
    ]
    return RunData(
        name=Path(found.fingerprint),
        first=found.train.row(0)[0],
        num_rows=train,
        num_val_rows=val,
        report={"data_path": found.documents, "train": train, "validation": val, "drawn": found.drawn},
        table="\n".join(lines),
        lazy=found,
    )


def _count(rows: AnyRows | None) -> int:
    return len(rows) if rows is not None else 0


def _streamed(args: TrainArguments, options: DataOptions, tokenizer: Tokenizer) -> RunData:
    sources, _ = find_sources(options, streaming=True)
    lanes, window = args.global_batch_size, args.shuffle_buffer_size
    stream = open_stream(sources, tokenizer, options, window=window, lanes=lanes)
    one_row = dataclasses.replace(options, packing=False, dataset_shuffle=False)
    first = next(Lane(dataclasses.replace(stream, options=one_row, window=1), 0))[0]
    val = _validation_rows(options, tokenizer) if options.val_dataset else None
    facts: dict[str, Any] = {
        "files": sum(len(blocks.parts) for blocks in stream.sets),
        "bytes": stream.num_bytes,
        "blocks": sum(len(blocks) for blocks in stream.sets),
        "lanes": lanes,
        "window": window,
        "fingerprint": stream.fingerprint,
    }
    line = (
        f"data: {facts['files']} files, {facts['bytes'] / 1e6:.1f} MB, read while training in {facts['blocks']} blocks by "
        f"{lanes} lanes of {window} rows"
    )
    return RunData(
        name=Path(stream.fingerprint),
        first=first,
        num_rows=0,
        num_val_rows=len(val.train) if val is not None else 0,
        report={"streaming": facts, "validation": val.report.as_json() if val is not None else None},
        table=line if val is None else f"{line}\nvalidation {val.report.table()}",
        val_rows=val.val_rows if val is not None else (),
        stream=stream,
        val_folder=val.folder if val is not None else None,
    )


def _validation_rows(options: DataOptions, tokenizer: Tokenizer) -> Prepared:
    """The rows of --val_dataset as the training rows of a preparation of their own."""
    alone = dataclasses.replace(
        options,
        dataset=options.val_dataset,
        val_dataset=(),
        split_dataset_ratio=0.0,
        dataset_shuffle=options.val_dataset_shuffle,
        interleave_prob=None,
        stopping_strategy="first_exhausted",
    )
    return prepare(alone, tokenizer)


def open_rows(
    data: Path, stream: Stream | None, lazy: Lazy | Indexed | None, val_folder: Path | None
) -> tuple[AnyRows | None, AnyRows | None]:
    """On a rank: the training rows, None where they are streamed, and the validation rows, None where there are none."""
    if lazy is not None:
        return lazy.train, lazy.val
    if stream is not None:
        return None, open_prepared(val_folder).train if val_folder is not None else None
    prepared = open_prepared(data)
    return prepared.train, prepared.val
