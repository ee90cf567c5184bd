"""`megatron data show`: what training would see of a data set, without a model's weights and without torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_swift.args.commands import DataShowArguments, TrainArguments
from megatron_swift.args.inherit import inherit
from megatron_swift.commands.chat_template import asked_template, chosen_template, user_families, why_template
from megatron_swift.commands.setup import data_options
from megatron_swift.data.cache import PackedRows
from megatron_swift.data.histogram import draw_histogram, text_histogram
from megatron_swift.data.prepare import Prepared, prepare
from megatron_swift.data.show import render_sample, sample_json
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample
from megatron_swift.models.families import describe
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.hub import local_model
from megatron_swift.utils.log import get_logger

# Settings that say nothing here, for a warning when they are given.
NO_EFFECT = ("torch_dtype", "response_prefix", "streaming", "shuffle_buffer_size")


def show(args: DataShowArguments, env: Mapping[str, str] = os.environ) -> None:
    """Print samples, the data report and the histogram of lengths; with --json one object a sample, the rest on stderr.

    Raises the SwiftError of whatever is wrong.
    """
    inherited = inherit(args)
    inherited.announce()
    args = inherited.args
    if args.model is None or not args.dataset:
        raise UsageError("megatron data show needs --dataset and --model", do="the model's folder needs no weights")
    for name in NO_EFFECT:
        if name in args.given:
            get_logger().warning("--%s has no effect in megatron data show", name)
    folder = local_model(args.model, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    tokenizer = Tokenizer.load(folder)
    template, reason, longest = data_template(args, folder, tokenizer)
    options = data_options(args, template, longest=longest)
    prepared = prepare(options, tokenizer)
    out = sys.stderr if args.json else sys.stdout
    colour = out.isatty() and "NO_COLOR" not in env
    for number, sample in enumerate(_samples(prepared.train, args.num_samples), 1):
        if args.json:
            print(json.dumps(sample_json(sample, tokenizer), ensure_ascii=False))
        else:
            print(f"--- sample {number}\n{render_sample(sample, tokenizer, colour=colour)}")
    print(f"--- template {template.name} ({reason})", file=out)
    print(prepared.report.table(), file=out)
    _lengths(args, prepared, options.max_length, folder.name)


def data_template(
    args: DataShowArguments | TrainArguments, folder: Path, tokenizer: Tokenizer
) -> tuple[Template, str, int | None]:
    """The template, why it was taken, and the model's longest text, None where no config.json says."""
    name = asked_template(args)
    if not (folder / "config.json").is_file() and name is not None:
        return chosen_template(args, name, tokenizer), "as told by the arguments", None
    described = describe(
        folder,
        model_type=args.model_type,
        template=name,
        chat_template=tokenizer.chat_template,
        extra=user_families(args),
    )
    template = chosen_template(args, described.template, tokenizer)
    return template, why_template(args, described.reason), described.config.max_position_embeddings


def _samples(rows: PackedRows, count: int) -> Iterator[Sample]:
    """The first `count` samples of the rows."""
    for index in range(len(rows)):
        for sample in rows.row(index):
            if count == 0:
                return
            count -= 1
            yield sample


def _lengths(args: DataShowArguments, prepared: Prepared, max_length: int | None, model: str) -> None:
    parts = [prepared.train] if prepared.val is None else [prepared.train, prepared.val]
    lengths = np.concatenate([rows.sample_tokens for rows in parts])
    print(text_histogram(lengths, max_length=max_length), file=sys.stderr if args.json else sys.stdout)
    if args.histogram_png is None:
        return
    path = Path(args.histogram_png).expanduser()
    title = f"{' '.join(args.dataset)} with {model}"
    draw_histogram(path, lengths, title=title if len(title) < 80 else f"{title[:77]}...", max_length=max_length)
    get_logger().info("the histogram is in %s", path)
