"""`swift export`: a Hugging Face folder to a Megatron checkpoint, and back. One process, one tensor per thread in memory."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_swift.args.commands import ExportArguments
from megatron_swift.args.dump import to_json
from megatron_swift.args.inherit import inherit
from megatron_swift.args.rules import TRACKER, check_export, check_output_dir
from megatron_swift.checkpoint.companions import CONFIG, FOLDER, copy_companions
from megatron_swift.commands.chat_template import user_families
from megatron_swift.commands.setup import find_model
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.models.families import Described, describe
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.files import fsync_folder, storage_errors, write_json

ARGS = "args.json"


def run(args: ExportArguments) -> None:
    """Convert as the arguments say. Raises the SwiftError of whatever is wrong; a half-written folder is never left under its name."""
    inherited = inherit(args)
    inherited.announce()
    args = inherited.args
    check_export(args)
    load = Path(args.mcore_model) if args.to_hf and args.mcore_model else None
    model_dir = find_model(args.model, load, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    chat_template = Tokenizer.load(model_dir).chat_template
    described = describe(
        model_dir,
        model_type=args.model_type,
        template=args.template,
        chat_template=chat_template,
        extra=user_families(args),
    )
    out = output_dir(args, load or model_dir)
    check_output_dir(str(out), exist_ok=args.exist_ok)
    began = time.time()
    write = _to_mcore(args, described, model_dir) if args.to_mcore else _to_hf(args, described, model_dir, load)
    replace_folder(out, write, marker=TRACKER if args.to_mcore else CONFIG)
    print(f"wrote {out} in {time.time() - began:.1f} s", flush=True)


def output_dir(args: ExportArguments, source: Path) -> Path:
    """--output_dir; else beside a source that has an args.json, or in the current folder, with -mcore or -hf added."""
    if args.output_dir is not None:
        return Path(args.output_dir).expanduser()
    suffix = "-mcore" if args.to_mcore else "-hf"
    if (source / ARGS).is_file():
        return source.with_name(source.name + suffix)
    name = (args.model or str(source)).rstrip("/").rsplit("/", 1)[-1]
    return Path(f"{name}{suffix}")


def replace_folder(final: Path, write: Callable[[Path], None], *, marker: str) -> None:
    """Write a folder that appears under its name in one rename.

    Where it exists, the new entries take the place of those of the same name and of old weights; whatever else is there stays.
    marker : the file without which the folder is none of its kind; there it is taken away first and put last.
    """
    final = final.absolute()
    name = f".{final.name}.tmp-{secrets.token_hex(4)}"
    exists = final.is_dir()
    staging = final / name if exists else final.with_name(name)  # inside: the folder may be a mount of its own
    with storage_errors(final):
        staging.mkdir(parents=True)
        try:
            write(staging)
            if exists:
                _merge(staging, final, marker)
            else:
                os.rename(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        fsync_folder(final.parent)


def _merge(staging: Path, final: Path, marker: str) -> None:
    (final / marker).unlink(missing_ok=True)
    stale = ("model*.safetensors", "model.safetensors.index.json") if marker == CONFIG else ()
    for path in [path for pattern in stale for path in final.glob(pattern)]:
        path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == marker):
        target = final / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
    fsync_folder(final)


def _to_mcore(args: ExportArguments, described: Described, model_dir: Path) -> Callable[[Path], None]:
    from megatron_swift.checkpoint.dcp import Piece, lazy_piece, save_pieces
    from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
    from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
    from megatron_swift.checkpoint.manifest import Entry, write_file
    from megatron_swift.checkpoint.megatron_common import COMMON, common_file, extra_states
    from megatron_swift.checkpoint.publish import publish
    from megatron_swift.checkpoint.ranks import single
    from megatron_swift.checkpoint.weights import TORCH_DTYPES

    cfg = described.config
    dtype = args.torch_dtype or cfg.dtype
    source, specs = HuggingFaceWeights(model_dir, cfg), tensor_specs(cfg)

    def write(staging: Path) -> None:
        def piece(spec: TensorSpec) -> Piece:
            return lazy_piece(
                spec, lambda: source.read(spec).to(TORCH_DTYPES[dtype]), TORCH_DTYPES[dtype], num_layers=cfg.num_layers
            )

        pieces = [piece(spec) for spec in specs.values()]
        size = sum(math.prod(spec.shape) for spec in specs.values()) * TORCH_DTYPES[dtype].itemsize
        threads = args.thread_count or max(math.ceil(size / 1e10), 2)

        # Iteration 1, as the original writes it.
        def write_all(folder: Path) -> dict[str, Entry]:
            common = write_file(folder / COMMON, common_file(cfg, iteration=1, consumed_samples=0))
            objects = extra_states(cfg)
            entries = save_pieces(folder, pieces, distributed=False, threads=threads, objects=objects)
            return entries | {COMMON: common}

        publish(staging, 1, write_all, group=single())
        copy_companions(model_dir, staging / FOLDER, config=True)
        _write_args(staging, args, described, model_dir, dtype)

    return write


def _to_hf(args: ExportArguments, described: Described, model_dir: Path, load: Path | None) -> Callable[[Path], None]:
    from megatron_swift.checkpoint.dcp import MegatronWeights
    from megatron_swift.checkpoint.huggingface import keeps_experts_stacked, parse_size, write_hugging_face
    from megatron_swift.checkpoint.layout import tensor_specs
    from megatron_swift.checkpoint.publish import latest
    from megatron_swift.checkpoint.ranks import single
    from megatron_swift.checkpoint.verify import first_whole

    assert load is not None
    folder = latest(load)
    if folder is None:
        raise CheckpointError(f"--mcore_model {load} holds no checkpoint", do="give a folder that holds iter_* folders")
    folder = first_whole([folder], single())  # an older one than the user expects would be exported in silence
    cfg = described.config
    dtype = args.torch_dtype or cfg.dtype
    source = MegatronWeights(folder, tensor_specs(cfg), num_layers=cfg.num_layers)

    def write(staging: Path) -> None:
        write_hugging_face(
            source,
            cfg,
            staging,
            like=model_dir,
            dtype=dtype,
            max_shard_size=parse_size(args.max_shard_size),
            stacked_experts=keeps_experts_stacked(model_dir),
        )
        _write_args(staging, args, described, model_dir, dtype)

    return write


def _write_args(staging: Path, args: ExportArguments, described: Described, model_dir: Path, dtype: str) -> None:
    """args.json: what `swift infer` and `megatron sft` inherit from this folder, the system prompt among it."""
    known = args.model if model_dir.name == FOLDER else str(model_dir.absolute())
    resolved = dataclasses.replace(args, model=known, template=described.template, model_type=described.model_type)
    write_json(staging / ARGS, to_json(resolved) | {"torch_dtype": dtype})
