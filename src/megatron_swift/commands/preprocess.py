"""`megatron preprocess`: the preparation of a training run and nothing else, without a model's weights and without torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_swift.args.commands import PreprocessArguments, PtArguments, TrainArguments
from megatron_swift.args.inherit import inherit
from megatron_swift.args.spec import params_of
from megatron_swift.commands.data import data_template
from megatron_swift.commands.setup import data_options
from megatron_swift.data.cache import PackedRows
from megatron_swift.data.indexed import IndexedWriter, files_of
from megatron_swift.data.prepare import DataOptions, prepare
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.files import storage_errors
from megatron_swift.utils.hub import local_model
from megatron_swift.utils.log import get_logger

GROUP = 1000  # documents written at a time


def run(args: PreprocessArguments) -> None:
    """Prepare the rows and say where they are. Raises the SwiftError of whatever is wrong."""
    inherited = inherit(with_defaults(args))
    inherited.announce()
    args = inherited.args
    if args.model is None or not args.dataset:
        raise UsageError("megatron preprocess needs --dataset and --model", do="the model's folder needs no weights")
    if args.streaming or (args.lazy_tokenize and not args.packing):
        raise UsageError("nothing is prepared with --streaming or --lazy_tokenize", do="leave it out")
    folder = local_model(args.model, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    tokenizer = Tokenizer.load(folder)
    template, reason, longest = data_template(args, folder, tokenizer)
    print(f"template {template.name} ({reason})")
    options = data_options(args, template, longest=longest)
    if args.output_prefix is not None:
        write_indexed(options, tokenizer, args.output_prefix)
        return
    prepared = prepare(options, tokenizer)
    print(prepared.report.table())
    print(f"the rows are in {prepared.folder}")


def with_defaults(args: PreprocessArguments) -> PreprocessArguments:
    """The arguments with the defaults of the command that they prepare for."""
    if args.prepare_for == "sft":
        return args
    known = params_of(TrainArguments)
    theirs = {name: p.default for name, p in params_of(PtArguments).items() if name in known}
    changes = {name: value for name, value in theirs.items() if name not in args.given and value != known[name].default}
    return dataclasses.replace(args, **changes)


def write_indexed(options: DataOptions, tokenizer: Tokenizer, prefix: str) -> None:
    """The rows as documents of an indexed data set, whole and in the files' order."""
    if options.loss_scale != "all":
        get_logger().warning("which tokens are trained is not stored in %s.bin: all are, in training from it", prefix)
    whole = dataclasses.replace(
        options, max_length=None, packing=False, truncation="delete", split_dataset_ratio=0.0, dataset_shuffle=False
    )
    prepared = prepare(whole, tokenizer)
    print(prepared.report.table())
    path = Path(prefix).expanduser()
    with storage_errors(path.parent), IndexedWriter(path, vocab_size=tokenizer.vocab_size) as writer:
        for ids, lengths in _groups(prepared.train):
            writer.add(ids, lengths)
        count = writer.finish()
    index, tokens = files_of(path)
    print(f"{count} documents are in {tokens} and {index}: megatron pt --data_path {shlex.quote(str(path))}")


def _groups(rows: PackedRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of some documents and how many each has."""
    for start in range(0, len(rows), GROUP):
        ids = [sample.ids for index in range(start, min(start + GROUP, len(rows))) for sample in rows.row(index)]
        yield np.concatenate(ids), np.array([len(one) for one in ids], np.int64)
