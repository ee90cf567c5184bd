"""`swift export`: a Hugging Face folder to a Megatron checkpoint, and back. One process, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_swift.args.commands import ExportArguments
from megatron_swift.args.dump import to_json
from megatron_swift.args.inherit import inherit
from megatron_swift.args.rules import check_export, check_output_dir
from megatron_swift.checkpoint.companions import FOLDER, copy_companions
from megatron_swift.commands.setup import find_model
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.models.families import Described, describe
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.files import fsync_folder, storage_errors, write_json
from megatron_swift.utils.log import get_logger

ARGS = "args.json"


def run(args: ExportArguments) -> None:
    """Convert as the arguments say. Raises the SwiftError of whatever is wrong; a half-written folder is never left under its name."""
    inherited = inherit(args)
    if inherited.values:
        get_logger().info("from %s: %s", inherited.source, ", ".join(f"{k}={v!r}" for k, v in inherited.values.items()))
    args = inherited.args
    check_export(args)
    load = Path(args.mcore_model) if args.to_hf and args.mcore_model else None
    model_dir = find_model(args.model, load, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    chat_template = Tokenizer.load(model_dir).chat_template
    described = describe(model_dir, model_type=args.model_type, template=args.template, chat_template=chat_template)
    out = output_dir(args, load or model_dir)
    check_output_dir(str(out), exist_ok=args.exist_ok)
    began = time.time()
    write = _to_mcore(args, described, model_dir) if args.to_mcore else _to_hf(args, described, model_dir, load)
    replace_folder(out, write)
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


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its final name and rename it; what stood there before is only then removed."""
    final = final.absolute()
    token = secrets.token_hex(4)
    staging, old = final.with_name(f".{final.name}.tmp-{token}"), final.with_name(f".trash-{final.name}-{token}")
    with storage_errors(final):
        staging.mkdir(parents=True)
        try:
            write(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if final.exists():
            os.rename(final, old)
        os.rename(staging, final)
        fsync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def _to_mcore(args: ExportArguments, described: Described, model_dir: Path) -> Callable[[Path], None]:
    from megatron_swift.checkpoint.dcp import Piece, lazy_piece, save_pieces
    from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
    from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
    from megatron_swift.checkpoint.publish import publish, single
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
        # Iteration 1, as the original writes it.
        publish(
            staging,
            1,
            lambda folder: save_pieces(folder, pieces, distributed=False, threads=args.thread_count or 1),
            group=single(),
        )
        copy_companions(model_dir, staging / FOLDER, config=True)
        _write_args(staging, args, described, model_dir, dtype)

    return write


def _to_hf(args: ExportArguments, described: Described, model_dir: Path, load: Path | None) -> Callable[[Path], None]:
    from megatron_swift.checkpoint.dcp import MegatronWeights
    from megatron_swift.checkpoint.huggingface import parse_size, write_hugging_face
    from megatron_swift.checkpoint.layout import tensor_specs
    from megatron_swift.checkpoint.publish import MANIFEST, latest, verify

    assert load is not None
    folder = latest(load)
    if folder is None:
        raise CheckpointError(f"--mcore_model {load} holds no checkpoint", do="give a folder that holds iter_* folders")
    if (folder / MANIFEST).is_file():
        verify(folder)
    cfg = described.config
    dtype = args.torch_dtype or cfg.dtype
    source = MegatronWeights(folder, tensor_specs(cfg), num_layers=cfg.num_layers)

    def write(staging: Path) -> None:
        write_hugging_face(
            source, cfg, staging, like=model_dir, dtype=dtype, max_shard_size=parse_size(args.max_shard_size)
        )
        _write_args(staging, args, described, model_dir, dtype)

    return write


def _write_args(staging: Path, args: ExportArguments, described: Described, model_dir: Path, dtype: str) -> None:
    """args.json: what `swift infer` and `megatron sft` inherit from this folder, the system prompt among it."""
    known = args.model if model_dir.name == FOLDER else str(model_dir.absolute())
    resolved = dataclasses.replace(args, model=known, template=described.template, model_type=described.model_type)
    write_json(staging / ARGS, to_json(resolved) | {"torch_dtype": dtype})
