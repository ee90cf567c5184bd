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
from megatron_swift.data.registry import Identity
from megatron_swift.data.streaming import Lane, Stream, StreamOptions, open_stream
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample

AnyRows = PackedRows | LazyRows | IndexedRows


@dataclass(frozen=True, kw_only=True)
class RunData:
    """name : the fingerprint of the training rows, in its last component.

    stream   : what to train on where it is streamed, else None.  lazy: what to train and to evaluate on where it is encoded
               later, or is Megatron's indexed data.
    prepared : rows on disk: of training and validation, or of validation only where training rows are streamed.
    first    : the first training sample, to show.
    """

    name: Path
    stream: Stream | None
    lazy: Lazy | Indexed | None
    prepared: Prepared | None
    first: Sample

    @property
    def num_rows(self) -> int:
        """Training rows; 0 where nobody has counted them."""
        if self.lazy is not None:
            return len(self.lazy.train)
        return 0 if self.prepared is None or self.stream is not None else len(self.prepared.train)

    @property
    def num_val_rows(self) -> int:
        """Rows to evaluate on."""
        rows = _validation(self.prepared, self.stream) if self.lazy is None else self.lazy.val
        return len(rows) if rows is not None else 0

    @property
    def val_folder(self) -> Path | None:
        """Where the validation rows lie, of a run whose training rows are streamed."""
        return self.prepared.folder if self.stream is not None and self.prepared is not None else None

    @property
    def val_rows(self) -> Sequence[dict[str, Any]]:
        """The validation rows that were split off."""
        if self.lazy is not None:
            return self.lazy.val_rows if isinstance(self.lazy, Lazy) else []
        return self.prepared.val_rows if self.prepared is not None else []

    def report(self) -> dict[str, Any]:
        """For data_report.json."""
        prepared = self.prepared.report.as_json() if self.prepared is not None else None
        if isinstance(self.lazy, Indexed):
            return {
                "data_path": self.lazy.documents,
                "train": self.num_rows,
                "validation": self.num_val_rows,
                "drawn": self.lazy.drawn,
            }
        if self.lazy is not None:
            return {"lazy": {"rows_read": self.lazy.rows_read, "train": self.num_rows, "validation": self.num_val_rows}}
        if self.stream is None:
            assert prepared is not None
            return prepared
        return {"streaming": _facts(self.stream), "validation": prepared}

    def table(self, max_length: int | None) -> str:
        """The report for people."""
        if isinstance(self.lazy, Indexed):
            lines = [f"data: {self.num_rows} rows of {max_length} tokens, {self.num_val_rows} to evaluate on"]
            lines += [
                f"  {count:>9} rows from {documents} documents of {prefix}"
                for count, (prefix, documents) in zip(self.lazy.drawn, self.lazy.documents, strict=True)
            ]
            return "\n".join(lines)
        if self.lazy is not None:
            read, val = sum(self.lazy.rows_read.values()), self.num_val_rows
            return f"data: {read} rows found, {self.num_rows} to train on, {val} to evaluate on, encoded when they are needed"
        if self.stream is None:
            assert self.prepared is not None
            lengths = self.prepared.train.sample_tokens
            return f"{self.prepared.report.table()}\n{text_histogram(lengths, max_length=max_length)}"
        facts = _facts(self.stream)
        line = (
            f"data: {facts['files']} files, {facts['bytes'] / 1e6:.1f} MB, read while training in {facts['blocks']} blocks by "
            f"{facts['lanes']} lanes of {facts['window']} rows"
        )
        return line if self.prepared is None else f"{line}\nvalidation {self.prepared.report.table()}"


def _facts(stream: Stream) -> dict[str, Any]:
    return {
        "files": sum(len(blocks.parts) for blocks in stream.sets),
        "bytes": stream.num_bytes,
        "blocks": sum(len(blocks) for blocks in stream.sets),
        "lanes": stream.lanes,
        "window": stream.options.window,
        "fingerprint": stream.fingerprint,
    }


def prepare_data(args: TrainArguments, options: DataOptions, tokenizer: Tokenizer) -> RunData:
    """The rows that the arguments ask for. Raises as `prepare` does; of streamed rows the first ones are read."""
    if isinstance(args, PtArguments) and args.data_path:
        return _indexed_data(args, options, tokenizer)
    if args.lazy_tokenize and not (args.streaming or args.packing):
        found = open_lazy(options, tokenizer, *find_sources(options))
        first = found.train.row(0)[0]
        return RunData(name=Path(found.fingerprint), stream=None, lazy=found, prepared=None, first=first)
    if not args.streaming:
        prepared = prepare(options, tokenizer)
        return RunData(name=prepared.folder, stream=None, lazy=None, prepared=prepared, first=prepared.first)
    sources, _ = find_sources(options)
    settings = stream_options(args, options)
    stream = open_stream(sources, tokenizer, settings, lanes=args.global_batch_size)
    one_row = dataclasses.replace(settings, packing=False, shuffle=False, window=1)
    first = next(Lane(dataclasses.replace(stream, options=one_row), 0))[0]
    val = None
    if options.val_dataset:
        alone = dataclasses.replace(
            options,
            dataset=options.val_dataset,
            val_dataset=(),
            split_dataset_ratio=0.0,
            dataset_shuffle=options.val_dataset_shuffle,
            interleave_prob=None,
            stopping_strategy="first_exhausted",
        )
        val = prepare(alone, tokenizer)
    return RunData(name=Path(stream.fingerprint), stream=stream, lazy=None, prepared=val, first=first)


def _indexed_data(args: PtArguments, options: DataOptions, tokenizer: Tokenizer) -> RunData:
    assert options.max_length is not None  # args.indexed_rules saw to it
    found = open_indexed(
        parse_data_path(args.data_path),
        length=options.max_length,
        val_ratio=options.split_dataset_ratio,
        seed=options.data_seed,
        shuffle=options.dataset_shuffle,
        vocab_size=tokenizer.vocab_size,
    )
    first = found.train.row(0)[0]
    return RunData(name=Path(found.fingerprint), stream=None, lazy=found, prepared=None, first=first)


def stream_options(args: TrainArguments, options: DataOptions) -> StreamOptions:
    """The part of the options that decides how streamed rows become samples and packs."""
    assert not isinstance(options.template, str)
    return StreamOptions(
        template=options.template,
        system=options.system,
        max_length=options.max_length,
        truncation=options.truncation,
        loss_scale=options.loss_scale,
        packing=options.packing,
        strict=options.strict,
        columns=tuple(options.columns.items()),
        identity=Identity(options.model_name, options.model_author),
        seed=options.data_seed,
        shuffle=options.dataset_shuffle,
        window=args.shuffle_buffer_size,
        probabilities=options.interleave_prob,
    )


def open_rows(
    data: Path, stream: Stream | None, lazy: Lazy | Indexed | None, val_folder: Path | None
) -> tuple[AnyRows | None, AnyRows | None]:
    """On a rank: the training rows, None where they are streamed, and the validation rows, None where there are none."""
    if lazy is not None:
        return lazy.train, lazy.val
    if stream is None:
        prepared = open_prepared(data)
        return prepared.train, prepared.val
    return None, _validation(open_prepared(val_folder) if val_folder is not None else None, stream)


def _validation(prepared: Prepared | None, stream: Stream | None) -> PackedRows | None:
    if prepared is None:
        return None
    return prepared.val if stream is None else prepared.train
