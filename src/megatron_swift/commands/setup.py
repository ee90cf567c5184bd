"""Everything about a training run that is known before a rank starts: checked once, in one process, without torch.

The data is read, encoded and packed here too, so that no rank ever waits for another one's tokenizer.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from megatron_swift.args.commands import DataShowArguments, TrainArguments
from megatron_swift.args.fp8_rules import check_fp8
from megatron_swift.args.inherit import inherit
from megatron_swift.args.moe_rules import Experts, check_experts
from megatron_swift.args.resume_rules import find_auto
from megatron_swift.args.rules import (
    Shape,
    check_layout,
    check_lengths,
    check_schedule,
    check_train,
    data_parallel_size,
    has_checkpoint,
)
from megatron_swift.args.transformer_engine import check_transformer_engine
from megatron_swift.checkpoint.companions import FOLDER
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.commands.chat_template import chosen_template, why_template
from megatron_swift.commands.model_setup import settle_model
from megatron_swift.commands.run_data import RunData, prepare_data
from megatron_swift.commands.run_folder import make_run_dir, write_run_files
from megatron_swift.data.encode import LossScale
from megatron_swift.data.indexed_rows import Indexed
from megatron_swift.data.lazy import Lazy
from megatron_swift.data.prepare import DataOptions
from megatron_swift.data.show import render_sample
from megatron_swift.data.streaming import Stream
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.models.config import ModelConfig
from megatron_swift.utils.compilers import why_no_compiler
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.gpus import visible_gpus
from megatron_swift.utils.hub import local_model
from megatron_swift.utils.log import get_logger


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """What the ranks need to know. Plain values only; handed to them as a file.

    model_dir : the folder with config.json and tokenizer.  dtype : "float32", "bfloat16" or "float16", of weights and compute.
    data      : the prepared data's folder; of streamed rows only its last component counts, their fingerprint.
    stream    : the rows to train on, where they are streamed; lazy: rows to encode when needed; val_data: then the prepared validation rows' folder.
    load : the Megatron folder to start from, None for the weights in model_dir.  scratch: or for new ones.
    older     : with --load auto, the runs before that one, should none of its checkpoints be whole; None without it.
    run_dir   : where the run writes; None on nodes other than the first, which are told by rank 0.
    """

    args: TrainArguments
    model_dir: Path
    model: ModelConfig
    template: str
    dtype: str
    data: Path
    stream: Stream | None
    lazy: Lazy | Indexed | None
    val_data: Path | None
    num_rows: int
    num_val_rows: int
    pad_id: int
    train_iters: int
    dp_size: int
    load: Path | None
    scratch: bool
    older: tuple[Path, ...] | None
    run_dir: Path | None


def world_size(env: Mapping[str, str]) -> int:
    """NPROC_PER_NODE x NNODES; 1 without them."""
    return int(env.get("NPROC_PER_NODE") or 1) * int(env.get("NNODES") or 1)


def prepare_run(args: TrainArguments, env: Mapping[str, str]) -> RunSetup:
    """Check the arguments, read the model's configuration, prepare the data, make the run's folder and print the banner.

    Raises the SwiftError of whatever is wrong; nothing has been started then.
    """
    args, older = find_auto(args)
    inherited = inherit(args)
    inherited.announce()
    args = inherited.args
    check_train(args, world_size=world_size(env), env=env)
    check_transformer_engine(args, gpus=visible_gpus(env))
    check_compiler(args, env)
    load = Path(args.load) if args.load is not None and has_checkpoint(Path(args.load)) else None
    model_dir = find_model(args.model, load, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    tokenizer = Tokenizer.load(model_dir)
    found = settle_model(args, model_dir, load, tokenizer, gpus=visible_gpus(env))
    described, model = found.described, found.config
    template = chosen_template(args, described.template, tokenizer)
    dp_size = _check_shape(args, model, world_size=world_size(env))
    check_vocabulary(model_dir, tokenizer, model)
    data = prepare_data(args, data_options(args, template, longest=model.max_position_embeddings), tokenizer)
    iters = train_iters(args, data.num_rows)
    check_schedule(args, train_iters=iters)
    _warn_of_unused(args, data)
    name = (args.model or str(model_dir)).rstrip("/").rsplit("/", 1)[-1]
    first_node = int(env.get("NODE_RANK") or 0) == 0
    run_dir = make_run_dir(args.save or f"megatron_output/{name}", add_version=args.add_version) if first_node else None
    setup = RunSetup(
        args=args,
        model_dir=model_dir,
        model=model,
        template=described.template,
        dtype=choose_dtype(args, model),
        data=data.name,
        stream=data.stream,
        lazy=data.lazy,
        val_data=data.val_folder,
        num_rows=data.num_rows,
        num_val_rows=data.num_val_rows,
        pad_id=tokenizer.pad_token_id or 0,
        train_iters=iters,
        dp_size=dp_size,
        load=load,
        scratch=found.scratch,
        older=older,
        run_dir=run_dir,
    )
    if run_dir is not None:
        write_run_files(
            run_dir,
            args,
            data,
            model_dir=model_dir,
            config=found.written,
            settled={"template": setup.template, "torch_dtype": setup.dtype},
        )
    _print_banner(setup, why_template(args, described.reason), data, tokenizer)
    return setup


def check_compiler(args: TrainArguments, env: Mapping[str, str]) -> None:
    """Raise UsageError for --torch_compile true where this machine lacks what it needs; with auto the ranks say so and go on."""
    if args.torch_compile != "true":
        return
    if args.fp8_format is not None:
        raise UsageError(
            f"--torch_compile true excludes --fp8_format {args.fp8_format}",
            why="products in 8 bits come with norms and activations of their own",
            do="leave one of the two out",
        )
    if missing := why_no_compiler(gpu=visible_gpus(env) > 0, env=env):
        raise UsageError("--torch_compile true cannot be used here", why=missing, do="or leave --torch_compile out")


def _check_shape(args: TrainArguments, model: ModelConfig, *, world_size: int) -> int:
    """Data-parallel ranks. Raises UsageError where the model does not fit the lengths or the ranks."""
    check_lengths(args, max_position_embeddings=model.max_position_embeddings)
    dp_size = data_parallel_size(args, world_size=world_size)
    check_experts(args, _experts(model), world_size=world_size)
    check_layout(args, _shape(model), num_micro_batches=args.global_batch_size // (args.micro_batch_size * dp_size))
    check_fp8(args, sizes=linear_sizes(model, args.tensor_model_parallel_size), dtype=choose_dtype(args, model))
    return dp_size


def check_vocabulary(folder: Path, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise UsageError for a token that has no row in the embedding."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, the model's vocabulary {model.vocab_size}",
            do="use the tokenizer that belongs to the model",
        )


def _shape(model: ModelConfig) -> Shape:
    moe, inner = model.moe, model.ffn_hidden_size
    if moe is not None:  # only what is there must divide: a model without dense layers still names their width
        inner = math.gcd(inner if not all(moe.sparse_layers) else 0, moe.shared_size)
    return Shape(
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=inner,
    )


def linear_sizes(model: ModelConfig, tp: int) -> dict[str, int]:
    """The features on either side of the linear layers of attention, dense MLPs and shared experts on one of tp ranks, by what makes them."""
    heads, groups, moe = model.num_attention_heads // tp, max(model.num_query_groups // tp, 1), model.moe
    sizes = {
        "hidden_size": model.hidden_size,
        "heads x kv_channels": heads * model.kv_channels,
        "rows of linear_qkv": (heads + 2 * groups) * model.kv_channels,
    }
    if moe is None or not all(moe.sparse_layers):
        sizes["ffn_hidden_size"] = model.ffn_hidden_size // tp
    if moe is not None and moe.shared_size:
        sizes["moe_shared_expert_intermediate_size"] = moe.shared_size // tp
    return sizes


def _experts(model: ModelConfig) -> Experts | None:
    moe = model.moe
    if moe is None:
        return None
    return Experts(
        number=moe.num_experts,
        topk=moe.topk,
        ffn_hidden_size=moe.ffn_hidden_size,
        shared_size=moe.shared_size,
        pre_softmax=moe.pre_softmax,
        everywhere=all(moe.sparse_layers),
    )


def find_model(model: str | None, load: Path | None, *, use_hf: bool, revision: str | None, token: str | None) -> Path:
    """The folder with config.json and tokenizer: `model`, or what a Megatron folder carries when that is gone."""
    carried = load / FOLDER if load is not None else None
    if carried is not None and carried.is_dir() and (model is None or not Path(model).expanduser().is_dir()):
        return carried
    assert model is not None  # args.rules saw to it
    return local_model(model, use_hf=use_hf, revision=revision, token=token)


def choose_dtype(args: TrainArguments, model: ModelConfig) -> str:
    """--fp16 or --bf16, else --torch_dtype, else config.json's; float32 stays float32."""
    if args.fp16:
        return "float16"
    if args.bf16:
        return "bfloat16"
    chosen = args.torch_dtype or model.dtype
    declined = {"float16": args.fp16 is False, "bfloat16": args.bf16 is False}
    return "float32" if declined.get(chosen) else chosen


def system_text(system: str | None) -> str | None:
    """--system as text: a .txt file's content, or the text with \\n as line breaks."""
    if system is None:
        return None
    if system.endswith(".txt"):
        try:
            return Path(system).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UsageError(
                f"--system {system} cannot be read: {error.strerror}", do="give a text, or the path of a text file"
            ) from None
    return system.replace("\\n", "\n")


def data_options(args: TrainArguments | DataShowArguments, template: Template, *, longest: int | None) -> DataOptions:
    """The data part of the arguments. longest: max_length where it is not given."""
    return DataOptions(
        dataset=tuple(args.dataset),
        val_dataset=tuple(args.val_dataset),
        split_dataset_ratio=args.split_dataset_ratio,
        data_seed=args.data_seed if args.data_seed is not None else args.seed,
        dataset_shuffle=args.dataset_shuffle,
        val_dataset_shuffle=args.val_dataset_shuffle,
        interleave_prob=tuple(args.interleave_prob) if args.interleave_prob is not None else None,
        stopping_strategy=args.stopping_strategy,
        use_hf=args.use_hf,
        hub_token=args.hub_token,
        download_mode=args.download_mode,
        custom_dataset_info=tuple(args.custom_dataset_info),
        custom_register_path=(*args.custom_register_path, *args.external_plugins),
        strict=args.strict,
        columns=args.columns or {},
        model_name=tuple(args.model_name),
        model_author=tuple(args.model_author),
        template=template,
        system=system_text(args.system),
        max_length=args.max_length or longest,
        truncation=args.truncation_strategy or "delete",
        loss_scale=cast(LossScale, args.loss_scale),  # the other choices are refused by the parser
        packing=isinstance(args, TrainArguments) and args.packing,
        dataset_num_proc=args.dataset_num_proc,
        use_cache=args.load_from_cache_file,
    )


def train_iters(args: TrainArguments, num_rows: int) -> int:
    """--train_iters, or the whole global batches in --max_epochs passes (at least one)."""
    if args.train_iters is not None:
        iters = args.train_iters
    else:
        assert args.max_epochs is not None
        iters = max(num_rows * args.max_epochs // args.global_batch_size, 1)
    if args.dataloader_type == "single" and iters * args.global_batch_size > num_rows:
        raise UsageError(
            f"--dataloader_type single passes over the data once: {num_rows} rows are {num_rows // args.global_batch_size} "
            f"iterations of --global_batch_size {args.global_batch_size}, not {iters}",
            do="lower --train_iters, or use --dataloader_type cyclic",
        )
    return iters


def _warn_of_unused(args: TrainArguments, data: RunData) -> None:
    if args.response_prefix is not None and "response_prefix" in args.given:
        get_logger().warning("--response_prefix is not used in training: it is for `swift infer`, through args.json")
    if not data.num_val_rows and args.eval_iters != 0 and args.given & {"eval_iters", "eval_interval"}:
        get_logger().warning(
            "there are no validation rows, so nothing is evaluated: give --val_dataset or --split_dataset_ratio"
        )


def _print_banner(setup: RunSetup, reason: str, data: RunData, tokenizer: Tokenizer) -> None:
    """The facts of the run, one a line, the data report and one sample with its trained tokens marked."""
    args, model = setup.args, setup.model
    dp, gbs, mbs = setup.dp_size, args.global_batch_size, args.micro_batch_size
    decay = args.lr_decay_iters or setup.train_iters
    lines = {
        "model": f"{setup.model_dir}  {model.num_layers} layers, hidden {model.hidden_size}, {num_parameters(model) / 1e6:.1f} M parameters",
        "weights": f"{_weights_line(setup)}  in {setup.dtype}"
        + (", float32 masters" if setup.dtype != "float32" else ""),
        **({"experts": _experts_line(model)} if model.moe is not None else {}),
        "template": f"{setup.template} ({reason})",
        "batch": f"micro {mbs} x data parallel {dp} x accumulation {gbs // mbs // dp} = global {gbs}",
        "schedule": f"{setup.train_iters} iterations"
        + (
            f" = {setup.train_iters * gbs / setup.num_rows:.2f} passes over {setup.num_rows} rows"
            if setup.num_rows
            else ""
        ),
        "learning rate": f"{args.lr_decay_style}: 0 -> {args.lr:g} in {args.lr_warmup_iters}, to {args.min_lr:g} at {decay}"
        if args.lr_warmup_iters
        else f"{args.lr_decay_style}: {args.lr:g} to {args.min_lr:g} at {decay}",
        "evaluation": _evaluation_line(setup),
        "output": f"{setup.run_dir}",
    }
    for name, text in lines.items():
        print(f"{name:14s} {text}")
    print(data.table)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("first sample, trained tokens " + ("in green:" if colour else "in ⟦ ⟧:"))
    print(render_sample(data.first, tokenizer, colour=colour), flush=True)


def _weights_line(setup: RunSetup) -> str:
    if setup.scratch:
        return f"new: normal, standard deviation {setup.args.init_method_std:g}, seed {setup.args.seed}"
    return str(setup.load or setup.model_dir)


def _evaluation_line(setup: RunSetup) -> str:
    args = setup.args
    if not setup.num_val_rows or args.eval_iters == 0:
        return "none"
    extent = "all rows once" if args.eval_iters == -1 else f"{args.eval_iters} global batches"
    return f"every {args.eval_interval or args.save_interval} iterations, {extent}, of {setup.num_val_rows} rows"


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the model, from its table of tensors."""
    return sum(math.prod(spec.shape) for spec in tensor_specs(model).values())


def _experts_line(model: ModelConfig) -> str:
    moe = model.moe
    assert moe is not None
    layers = "all layers" if all(moe.sparse_layers) else f"{sum(moe.sparse_layers)} of {model.num_layers} layers"
    shared = f", one of {moe.shared_size} shared by all tokens" if moe.shared_size else ""
    return f"{moe.num_experts} of inner width {moe.ffn_hidden_size}, {moe.topk} per token, in {layers}{shared}"
