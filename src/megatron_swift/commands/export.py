"""`swift export` and `megatron export`: a Hugging Face folder to a Megatron checkpoint, and back.

To Hugging Face a few rows are in memory at a time; to Megatron 16 MiB of a matrix per writing thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_swift.args.commands import ExportArguments
from megatron_swift.args.dump import to_json
from megatron_swift.args.inherit import inherit
from megatron_swift.args.rules import TRACKER, check_export, check_output_dir
from megatron_swift.checkpoint.companions import CONFIG, FOLDER, copy_companions
from megatron_swift.commands.chat_template import user_families
from megatron_swift.commands.setup import find_model
from megatron_swift.data.encode import encode_prompt
from megatron_swift.data.plugins import load_plugins
from megatron_swift.data.templates import load_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Message
from megatron_swift.models.families import NATIVE, Described, describe
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.files import write_json
from megatron_swift.utils.log import get_logger

if TYPE_CHECKING:  # torch is imported late, so that --help and a wrong flag are answered at once
    import torch
    from torch import Tensor

    from megatron_swift.checkpoint.dcp import Piece
    from megatron_swift.checkpoint.layout import TensorSpec
    from megatron_swift.checkpoint.manifest import Entry
    from megatron_swift.checkpoint.ranks import Group
    from megatron_swift.checkpoint.weights import WeightSource

ARGS = "args.json"
QUESTION = "who are you?"  # as in Megatron-SWIFT
PIECE_BYTES = 1 << 24  # of a matrix, written at a time; Megatron reads a tensor from any number of boxes
PART_BYTES = 1 << 17  # read at a time into a piece that is about to be written
TIMEOUT_MINUTES = 600  # until the slowest rank has written its share


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """What the ranks need to know. Plain values only; handed to them as a file.

    load : the Megatron folder to convert, None for the weights in model_dir. ids : tokens for --test_convert_precision, or none.
    """

    args: ExportArguments
    described: Described
    model_dir: Path
    load: Path | None
    out: Path
    dtype: str
    ids: tuple[int, ...]


def run(args: ExportArguments) -> None:
    """Convert as the arguments say, in this process. Raises the SwiftError of whatever is wrong."""
    plan = prepare_export(args)
    from megatron_swift.checkpoint.ranks import single

    convert(plan, group=single())


def run_rank(plan: ExportPlan) -> None:
    """`run` of one rank of those that torchrun has started, once the plan is made."""
    from megatron_swift.checkpoint.ranks import all_ranks
    from megatron_swift.parallel import mesh

    mesh.start(backend="gloo", timeout_minutes=TIMEOUT_MINUTES)
    try:
        convert(plan, group=all_ranks(timeout_minutes=TIMEOUT_MINUTES))
    finally:
        mesh.stop()


def prepare_export(args: ExportArguments) -> ExportPlan:
    """Everything that can be found wrong before a weight is read; no torch. A missing model is downloaded."""
    inherited = inherit(args)
    inherited.announce()
    args = inherited.args
    check_export(args)
    load = Path(args.mcore_model) if args.to_hf and args.mcore_model else None
    model_dir = find_model(args.model, load, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    tokenizer = Tokenizer.load(model_dir)
    described = describe(
        model_dir,
        model_type=args.model_type,
        template=args.template,
        chat_template=tokenizer.chat_template,
        extra=user_families(args),
    )
    if args.to_hf and described.family is NATIVE:
        get_logger().warning(
            "transformers has no such architecture: the folder is for this product (docs/pretraining.md)"
        )
    out = output_dir(args, load or model_dir)
    check_output_dir(str(out), exist_ok=args.exist_ok)
    ids: tuple[int, ...] = ()
    if args.test_convert_precision:
        ids = tuple(prompt_ids(args, described.template, tokenizer))
    return ExportPlan(args, described, model_dir, load, out, args.torch_dtype or described.config.dtype, ids)


def convert(plan: ExportPlan, *, group: Group) -> None:
    """Write what was planned; every rank of the group calls it. A half-written folder is never left under its name."""
    from megatron_swift.commands.replace_folder import replace_folder

    began = time.time()
    write, marker = (_write_mcore, TRACKER) if plan.args.to_mcore else (_write_hf, CONFIG)
    replace_folder(plan.out, lambda staging: write(plan, staging, group), marker=marker, group=group)
    if group.rank == 0:
        print(f"wrote {plan.out} in {time.time() - began:.1f} s", flush=True)


def output_dir(args: ExportArguments, source: Path) -> Path:
    """--output_dir; else beside a source that has an args.json, or in the current folder, with -mcore or -hf added."""
    if args.output_dir is not None:
        return Path(args.output_dir).expanduser()
    suffix = "-mcore" if args.to_mcore else "-hf"
    if (source / ARGS).is_file():
        return source.with_name(source.name + suffix)
    name = (args.model or str(source)).rstrip("/").rsplit("/", 1)[-1]
    return Path(f"{name}{suffix}")


def prompt_ids(args: ExportArguments, template: str, tokenizer: Tokenizer) -> list[int]:
    """The question of --test_convert_precision as the model's template puts it."""
    plugins = load_plugins([*args.custom_register_path, *args.external_plugins])
    known = load_template(template, tokenizer, registered={one.name: one for one in plugins.templates})
    return encode_prompt(known, tokenizer, [Message(role="user", content=QUESTION)])


def _write_mcore(plan: ExportPlan, staging: Path, group: Group) -> None:
    from megatron_swift.checkpoint.dcp import save_pieces
    from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
    from megatron_swift.checkpoint.layout import tensor_specs
    from megatron_swift.checkpoint.manifest import write_file
    from megatron_swift.checkpoint.megatron_common import COMMON, common_file, common_values, extra_states
    from megatron_swift.checkpoint.megatron_weights import MegatronWeights
    from megatron_swift.checkpoint.publish import iteration_folder, publish
    from megatron_swift.checkpoint.torch_file import write_torch
    from megatron_swift.checkpoint.verify import first_whole
    from megatron_swift.checkpoint.weights import TORCH_DTYPES

    cfg, dtype = plan.described.config, TORCH_DTYPES[plan.dtype]
    source, specs = HuggingFaceWeights(plan.model_dir, cfg), tensor_specs(cfg)
    size = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize
    threads = plan.args.thread_count or max(math.ceil(size / 1e10), 2)
    ranks = len(group.gather(None))
    pieces = _pieces(source, list(specs.values()), plan.dtype, num_layers=cfg.num_layers)

    # Iteration 1, as the original writes it.
    def write_all(folder: Path) -> dict[str, Entry]:
        first = group.rank == 0
        if plan.args.ckpt_format == "torch":
            content = common_values(cfg, iteration=1, consumed_samples=0, parallel_size=1)
            write_torch(folder, _share(pieces, group.rank, ranks), group, content)
            return {}
        entries = save_pieces(
            folder,
            _share(pieces, group.rank, ranks),
            distributed=group.process_group is not None,
            process_group=group.process_group,
            threads=max(math.ceil(threads / ranks), 1),
            objects=extra_states(cfg) if first else {},
            one_by_one=True,
        )
        if first:
            entries[COMMON] = write_file(folder / COMMON, common_file(cfg, iteration=1, consumed_samples=0))
        return entries

    publish(staging, 1, write_all, group=group)
    folder = first_whole([iteration_folder(staging, 1)], group)  # read again, by checksums

    def complete() -> None:
        written = MegatronWeights(folder, specs, num_layers=cfg.num_layers)
        copy_companions(plan.model_dir, staging / FOLDER, config=True)
        _write_args(staging, plan)
        _check_precision(plan, source, written)

    group.together(plan.out, lambda: complete() if group.rank == 0 else None)


def _pieces(source: WeightSource, specs: Sequence[TensorSpec], dtype: str, *, num_layers: int) -> list[Piece]:
    """Every parameter as pieces that are read when they are written: rows of a matrix, of experts of one expert's.

    A piece's values are valid until the same thread reads another one.
    """
    from megatron_swift.checkpoint.dcp import Piece
    from megatron_swift.checkpoint.weights import TORCH_DTYPES

    kept = TORCH_DTYPES[dtype]
    widths = {spec.name: max(math.prod(spec.shape[1:]) * kept.itemsize, 1) for spec in specs}
    rows = {spec.name: spec.shape[0] // max(spec.experts, 1) for spec in specs}
    steps = {name: min(max(PIECE_BYTES // width, 1), rows[name]) for name, width in widths.items()}
    buffer = _Buffer(max(steps[name] * width for name, width in widths.items()))

    def piece(spec: TensorSpec, start: int, stop: int) -> Piece:
        ((_, offset, size),) = spec.megatron_boxes(start, stop)

        def read() -> Tensor:
            out = buffer.empty((stop - start, *spec.shape[1:]), kept)
            step = max(PART_BYTES // widths[spec.name], 1)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                out[first - start : last - start] = source.read(spec, first, last)
            return out.view(size)

        return Piece(spec.megatron_key, read, kept, size, offset, spec.megatron_shape(num_layers))

    found = []
    for spec in specs:
        for first in range(0, spec.shape[0], rows[spec.name]):
            last, step = first + rows[spec.name], steps[spec.name]
            found += [piece(spec, start, min(start + step, last)) for start in range(first, last, step)]
    return found


class _Buffer(threading.local):
    """Room for the piece that a thread writes now, in pages of its own, one piece after the other.

    Memory that is asked for and freed for each would pile up: torch.save leaves a class behind that refers to itself and to what was saved,
    until Python happens to look for cycles (measured: seven matrices of 6 MB with two threads), and malloc keeps blocks below 32 MB.
    """

    def __init__(self, size: int):
        self.size = size  # once and for all: pages that are given up are held as long as the values in them
        self.pages: mmap.mmap | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that is valid until the next call in this thread; its storage has its size, or torch would copy it."""
        import torch

        if self.pages is None:
            self.pages = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(self.pages, dtype=dtype, count=math.prod(shape)).view(shape)


def _share(pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """The pieces that a rank writes: a run of neighbours, as many values to each as to the others."""
    ends = list(itertools.accumulate(math.prod(piece.size) for piece in pieces))
    total = ends[-1]
    return [piece for piece, end in zip(pieces, ends, strict=True) if (end * ranks - 1) // total == rank]


def _write_hf(plan: ExportPlan, staging: Path, group: Group) -> None:
    from megatron_swift.checkpoint.huggingface import (
        HuggingFaceWeights,
        keeps_experts_stacked,
        parse_size,
        write_hugging_face,
    )

    cfg = plan.described.config
    source = open_megatron(plan, group)
    write_hugging_face(
        source,
        cfg,
        staging,
        like=plan.model_dir,
        dtype=plan.dtype,
        max_shard_size=parse_size(plan.args.max_shard_size),
        stacked_experts=keeps_experts_stacked(plan.model_dir),
        group=group,
        where=plan.out,
    )

    def complete() -> None:
        _write_args(staging, plan)
        _check_precision(plan, source, HuggingFaceWeights(staging, cfg))

    group.together(plan.out, lambda: complete() if group.rank == 0 else None)


def open_megatron(plan: ExportPlan, group: Group) -> WeightSource:
    """The checkpoint that the folder's tracker names, looked through before it is used."""
    from megatron_swift.checkpoint.layout import tensor_specs
    from megatron_swift.checkpoint.megatron_weights import MegatronWeights
    from megatron_swift.checkpoint.publish import latest
    from megatron_swift.checkpoint.verify import first_whole

    assert plan.load is not None
    folder = latest(plan.load)
    if folder is None:
        raise CheckpointError(
            f"--mcore_model {plan.load} holds no checkpoint", do="give a folder that holds iter_* folders"
        )
    folder = first_whole([folder], group)  # an older one than the user expects would be exported in silence
    cfg = plan.described.config
    return MegatronWeights(folder, tensor_specs(cfg), num_layers=cfg.num_layers)


def _check_precision(plan: ExportPlan, source: WeightSource, converted: WeightSource) -> None:
    if not plan.ids:
        return
    from megatron_swift.commands.export_check import compare

    found = compare(source, converted, plan.described.config, plan.ids)
    print(found.table(), flush=True)
    found.check()


def _write_args(staging: Path, plan: ExportPlan) -> None:
    """args.json: what `swift infer` and `megatron sft` inherit from this folder, the system prompt among it."""
    args, described = plan.args, plan.described
    known = args.model if plan.model_dir.name == FOLDER else str(plan.model_dir.absolute())
    resolved = dataclasses.replace(args, model=known, template=described.template, model_type=described.model_type)
    write_json(staging / ARGS, to_json(resolved) | {"torch_dtype": plan.dtype})
