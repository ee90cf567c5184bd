"""Rules between parameters, checked before any process starts. Each rule is one function that raises UsageError.

Pass the arguments through `inherit.inherit` first, so that `model` is filled in from a checkpoint's args.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_swift.args.commands import ExportArguments, InferArguments, TrainArguments
from megatron_swift.args.indexed_rules import check_data_source
from megatron_swift.args.stream_rules import check_streaming
from megatron_swift.args.training_params import asked_kernel
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.files import TRACKER
from megatron_swift.utils.log import get_logger

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
SELF_COGNITION = "self-cognition"


def check_train(args: TrainArguments, *, world_size: int, env: Mapping[str, str] | None = None) -> None:
    """Raise UsageError for the first combination that cannot train on `world_size` processes; warn about odd ones.

    env : the environment variables of the launcher, checked when given.
    """
    if env is not None:
        check_environment(env)
    _weights_source(args)
    _written_format(args.ckpt_format)
    check_data_source(args)
    _run_length(args)
    check_streaming(args)
    if args.train_iters is not None:
        check_schedule(args, train_iters=args.train_iters)
    _learning_rates(args)
    _batches(args, data_parallel_size(args, world_size=world_size))
    _precision(args)
    _deterministic(args)
    _recompute(args)
    _sharding(args)
    _overlap(args)
    _tensor_overlap(args, env or {})
    _attention(args)
    _sequence_parallel(args)
    _self_cognition(args)
    _reports(args)
    if args.max_position_embeddings is not None:
        check_lengths(args, max_position_embeddings=args.max_position_embeddings)


def _written_format(ckpt_format: str) -> None:
    if ckpt_format == "zarr":
        raise UsageError(
            "--ckpt_format zarr: checkpoints of this format are read, but not written",
            why="Megatron-Core gave it up after 0.11, and wrote it with a zarr library that is no longer maintained",
            do="use torch_dist or torch; leave it out to load one, for the format is found out",
        )


def check_export(args: ExportArguments) -> None:
    """Raise UsageError unless exactly one conversion is asked for and its source and target are usable."""
    if args.to_mcore == args.to_hf:
        both = "both are given" if args.to_hf else "neither is given"
        raise UsageError(
            f"export needs exactly one of --to_mcore true and --to_hf true; {both}",
            do="to_mcore makes a Megatron checkpoint of --model, to_hf makes a Hugging Face folder of --mcore_model",
        )
    if args.to_mcore:
        _written_format(args.ckpt_format)
        if args.mcore_model is not None:
            raise UsageError(
                f"--to_mcore reads --model, but --mcore_model {args.mcore_model} is given", do="leave --mcore_model out"
            )
        if args.model is None:
            raise UsageError("--to_mcore needs the model to convert", do="give it as --model")
        _model_exists(args.model)
    else:
        if args.mcore_model is None:
            raise UsageError("--to_hf needs the Megatron checkpoint to convert", do="give it as --mcore_model")
        _holds_checkpoint("--mcore_model", args.mcore_model)
        _model_known(args.model, f"--mcore_model {args.mcore_model}")
    if args.output_dir is not None:
        check_output_dir(args.output_dir, exist_ok=args.exist_ok)


def check_infer(args: InferArguments, *, world_size: int = 1) -> None:
    """Raise UsageError for a combination that cannot generate on `world_size` processes."""
    if args.model is None:
        raise UsageError("swift infer needs a model", do="give a folder or a hub name as --model")
    _model_exists(args.model)
    batch = bool(args.dataset or args.val_dataset)
    if world_size > 1 and (args.stream or not batch):
        reason = "with --stream true" if batch else "without --dataset or --val_dataset"
        raise UsageError(f"{world_size} processes cannot be used {reason}", do="unset NPROC_PER_NODE")
    if args.stream and args.max_batch_size > 1:
        raise UsageError(
            f"--stream true with --max_batch_size {args.max_batch_size}: only one answer can be shown while it is made",
            do="use --max_batch_size 1 or --stream false",
        )
    for name in ("metric", "val_dataset_sample"):
        if getattr(args, name) is not None and not batch:
            raise UsageError(f"--{name} needs a data set to answer", do="give one as --val_dataset")


def check_schedule(args: TrainArguments, *, train_iters: int) -> None:
    """Raise UsageError unless the warm-up ends before the decay. For runs by epochs: call it once steps are known."""
    decay = args.lr_decay_iters if args.lr_decay_iters is not None else train_iters
    if args.lr_warmup_iters >= decay:
        name = "lr_decay_iters" if args.lr_decay_iters is not None else "train_iters"
        raise UsageError(
            f"--lr_warmup_iters {args.lr_warmup_iters} must be below {name} {decay}",
            why="the learning rate would never leave the warm-up",
            do=f"use at most --lr_warmup_iters {decay - 1}",
        )


def check_lengths(args: TrainArguments, *, max_position_embeddings: int) -> None:
    """Raise UsageError where samples may be longer than the model allows. Call it again once config.json is read."""
    for name in ("max_length", "seq_length"):
        value = getattr(args, name)
        if value is not None and value > max_position_embeddings:
            raise UsageError(
                f"--{name} {value} is more than the model's {max_position_embeddings} positions",
                why="max_position_embeddings is the longest sequence that the model knows",
                do=f"use --{name} {max_position_embeddings} or less",
            )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the layout rules need of the model."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int


def check_layout(args: TrainArguments, model: Shape, *, num_micro_batches: int) -> None:
    """Raise UsageError where the model's sizes do not divide by the parallel sizes. Call it once config.json is read."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups

    def tensor_fits(size: int) -> bool:
        grouped = groups % size == 0 or (size % groups == 0 and (heads // groups) % (size // groups) == 0)
        return heads % size == 0 and grouped and model.ffn_hidden_size % size == 0

    if not tensor_fits(tp):
        legal = ", ".join(str(n) for n in range(1, heads + 1) if tensor_fits(n))
        raise UsageError(
            f"--tensor_model_parallel_size {tp} does not divide the model",
            why=f"it has {heads} attention heads, {groups} query groups and ffn_hidden_size {model.ffn_hidden_size}",
            do=f"use one of {legal}",
        )
    local_heads, local_groups = heads // tp, max(groups // tp, 1)
    if args.cp_comm_type == "a2a" and (local_heads % cp or (local_groups % cp and cp % local_groups)):
        raise UsageError(
            f"--cp_comm_type a2a with --context_parallel_size {cp} needs {cp} to divide a rank's {local_heads} attention heads "
            f"and to divide or be a multiple of its {local_groups} query groups",
            do="use --cp_comm_type all_gather or p2p, or another --context_parallel_size",
        )
    stages = pp * virtual_stages(args, num_layers=model.num_layers)
    if stages > model.num_layers:
        raise UsageError(
            f"{model.num_layers} layers cannot be split over {stages} pipeline stages",
            do=f"use a --pipeline_model_parallel_size of at most {model.num_layers}",
        )
    if stages > pp and num_micro_batches % pp:
        raise UsageError(
            f"virtual pipeline stages need the {num_micro_batches} micro-batches of a step to be a multiple of "
            f"--pipeline_model_parallel_size {pp}",
            why="micro-batches run through the stages in groups of that size",
            do="change --global_batch_size or --micro_batch_size",
        )
    _fixed_stages(args, model.num_layers, stages)


def virtual_stages(args: TrainArguments, *, num_layers: int) -> int:
    """Virtual pipeline stages per rank: 1 unless the user asks for more. UsageError where that is not whole."""
    pp, per_stage = args.pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage
    virtual = args.virtual_pipeline_model_parallel_size
    if per_stage is None and virtual is None:
        return 1
    name = "virtual_pipeline_model_parallel_size" if per_stage is None else "num_layers_per_virtual_pipeline_stage"
    if per_stage is not None and virtual is not None:
        raise UsageError(
            "--num_layers_per_virtual_pipeline_stage and --virtual_pipeline_model_parallel_size say the same thing",
            do="give one of them",
        )
    if pp == 1:
        raise UsageError(f"--{name} needs a --pipeline_model_parallel_size of at least 2", do=f"leave --{name} out")
    if virtual is not None:
        return virtual
    assert per_stage is not None
    if num_layers % (pp * per_stage):
        legal = [n for n in range(1, num_layers // pp + 1) if num_layers % (pp * n) == 0]
        raise UsageError(
            f"--num_layers_per_virtual_pipeline_stage {per_stage}: {num_layers} layers on {pp} ranks cannot be cut into such stages",
            do=f"use one of {', '.join(map(str, legal))}" if legal else "use --virtual_pipeline_model_parallel_size",
        )
    return num_layers // pp // per_stage


def _fixed_stages(args: TrainArguments, num_layers: int, stages: int) -> None:
    named = [
        (name, value)
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        if (value := getattr(args, name)) is not None
    ]
    if not named:
        return
    flags = " and ".join(f"--{name} {value}" for name, value in named)
    if stages != args.pipeline_model_parallel_size:
        raise UsageError(f"{flags} cannot be combined with virtual pipeline stages", do="leave one of the two out")
    if stages == 1:
        raise UsageError(f"{flags} needs a --pipeline_model_parallel_size of at least 2", do="leave it out")
    left, others = num_layers - sum(value for _, value in named), stages - len(named)
    if left < others or (others == 0 and left):
        raise UsageError(
            f"{flags} leaves {left} of {num_layers} layers for {others} other pipeline stages",
            why="every stage needs at least one layer, and every layer a stage",
            do="change it, or leave it out: the stages are then balanced",
        )


def check_output_dir(path: str, *, exist_ok: bool) -> None:
    """Raise UsageError where a conversion would write into something that exists. An empty folder is fine."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output_dir {path} is a file", do="name a folder")
    if target.is_dir() and not exist_ok and any(target.iterdir()):
        raise UsageError(
            f"--output_dir {path} exists and is not empty", do="name another folder or use --exist_ok true to overwrite"
        )


def check_environment(env: Mapping[str, str]) -> None:
    """Raise UsageError where NPROC_PER_NODE, NNODES, NODE_RANK or MASTER_ADDR cannot start a run."""
    numbers = {}
    for name, least in (("NPROC_PER_NODE", 1), ("NNODES", 1), ("NODE_RANK", 0)):
        text = env.get(name, "")
        if not text:
            continue
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise UsageError(f"{name}={text}: must be a whole number, at least {least}")
        numbers[name] = int(text)
    nodes, rank = numbers.get("NNODES", 1), numbers.get("NODE_RANK")
    if rank is not None and rank >= nodes:
        raise UsageError(f"NODE_RANK={rank} with NNODES={nodes}", why=f"machines are numbered 0 to {nodes - 1}")
    address = env.get("MASTER_ADDR", "")
    if nodes > 1 and address in ("", *LOCAL_NAMES):
        raise UsageError(
            f"MASTER_ADDR={address} with NNODES={nodes}" if address else f"NNODES={nodes} needs MASTER_ADDR",
            why="every machine would wait for itself",
            do="set MASTER_ADDR to the address of machine 0 on all machines",
        )


def data_parallel_size(args: TrainArguments, *, world_size: int) -> int:
    """Ranks that see different data: world_size / (TP x PP x CP). UsageError where that is not whole."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if world_size % (tp * pp * cp):
        raise UsageError(
            f"{world_size} processes cannot be split by tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} x context_parallel_size {cp} = {tp * pp * cp}",
            do=f"start a multiple of {tp * pp * cp} processes (NPROC_PER_NODE x NNODES) or use smaller sizes",
        )
    return world_size // (tp * pp * cp)


def has_self_cognition(datasets: Iterable[str]) -> bool:
    """Whether a data set is swift/self-cognition, whatever its hub, subset or row count."""
    for name in datasets:
        plain = name.removeprefix("hf::").removeprefix("ms::").split("#")[0].split(":")[0].rstrip("/")
        if plain.rsplit("/", 1)[-1].lower() == SELF_COGNITION:
            return True
    return False


def _weights_source(args: TrainArguments) -> None:
    if args.model is None and args.load is None:
        raise UsageError(
            "no model is given", do="give --load (a Megatron checkpoint) or --model (a Hugging Face model)"
        )
    if args.load is not None:
        missing = not has_checkpoint(Path(args.load))
        if missing and (args.exit_on_missing_checkpoint or args.model is None):
            _holds_checkpoint("--load", args.load)
        if missing:
            get_logger().warning("--load %s holds no checkpoint; starting from --model %s", args.load, args.model)
        _model_known(args.model, f"--load {args.load}")
    if args.model is not None and args.load is None:
        _model_exists(args.model)


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a run's: it has a tracker file, or a published checkpoint whose tracker was lost."""
    return (folder / TRACKER).is_file() or any(folder.glob("iter_*/manifest.json"))


def _holds_checkpoint(flag: str, path: str) -> None:
    folder = Path(path)
    if not folder.exists():
        raise UsageError(
            f"{flag} {path} does not exist", do="make it with `swift export --to_mcore true`, or mend the path"
        )
    if has_checkpoint(folder):
        return
    do = "name the folder of a run or conversion, which holds that file"
    if (folder.parent / TRACKER).is_file():
        do = f"name the folder above: {flag} {folder.parent}"
    elif (folder / "config.json").is_file():
        do = "this is a Hugging Face folder: give it as --model, or convert it with `swift export --to_mcore true`"
    else:
        inner = sorted(p.parent for p in folder.glob(f"*/{TRACKER}")) if folder.is_dir() else []
        if inner:
            do = f"name the run in it, such as {flag} {inner[-1]}"
    raise UsageError(
        f"{flag} {path} holds no checkpoint",
        why=f"there is neither a {TRACKER} nor a published iter_* folder in it",
        do=do,
    )


def _model_known(model: str | None, source: str) -> None:
    if model is None:
        raise UsageError(
            f"the model that {source} was made from is not known",
            why="its folder has no args.json with `model` (or --load_args is false)",
            do="give --model, which supplies config.json and the tokenizer",
        )


def _model_exists(model: str) -> None:
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise UsageError(f"--model {model} is not an existing folder", do="mend the path, or give a hub name")


def _run_length(args: TrainArguments) -> None:
    if args.train_iters is None and args.max_epochs is None:
        raise UsageError("the length of the run is not given", do="give --train_iters N or --max_epochs N")
    if args.train_iters is not None and args.max_epochs is not None:
        raise UsageError(
            f"--train_iters {args.train_iters} and --max_epochs {args.max_epochs} both set the length of the run",
            do="give one of them",
        )


def _learning_rates(args: TrainArguments) -> None:
    if args.min_lr > args.lr:
        raise UsageError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}", do=f"use at most --min_lr {args.lr:g}")


def _batches(args: TrainArguments, dp: int) -> None:
    gbs, mbs = args.global_batch_size, args.micro_batch_size
    if gbs % (mbs * dp) == 0:
        return
    legal = [m for m in range(1, gbs // dp + 1) if gbs % (m * dp) == 0]
    below = gbs // (mbs * dp) * mbs * dp
    near = " or ".join(str(n) for n in (below, below + mbs * dp) if n > 0)
    micro = f"--micro_batch_size {_short(legal)} or " if legal else ""
    raise UsageError(
        f"--global_batch_size {gbs} is not a multiple of --micro_batch_size {mbs} x {dp} data-parallel ranks",
        why="every rank must get the same whole number of micro-batches in each step",
        do=f"use {micro}--global_batch_size {near}",
    )


def _short(numbers: list[int]) -> str:
    shown = numbers if len(numbers) <= 6 else [*numbers[:3], *numbers[-3:]]
    return ", ".join(str(n) for n in shown)


def _precision(args: TrainArguments) -> None:
    if args.fp16 and args.bf16:
        raise UsageError(
            "--fp16 true and --bf16 true exclude each other", do="give one of them; bf16 needs no loss scale"
        )


def _deterministic(args: TrainArguments) -> None:
    if not args.deterministic_mode:
        return
    kernel, flag = asked_kernel(args)
    for clash in (
        flag if kernel in ("flash", "cudnn") else "",
        "--cross_entropy_loss_fusion true" if args.cross_entropy_loss_fusion else "",
    ):
        if clash:
            raise UsageError(
                f"--deterministic_mode true excludes {clash}",
                why="its backward pass adds in an order that changes from run to run",
                do="leave one of the two out",
            )


def _recompute(args: TrainArguments) -> None:
    full = args.recompute_granularity == "full"
    if "recompute_modules" in args.given and args.recompute_granularity != "selective":
        raise UsageError(
            f"--recompute_modules needs --recompute_granularity selective; it is {args.recompute_granularity}",
            do="leave one of the two out",
        )
    if "layernorm" in args.recompute_modules and args.tp_comm_overlap:
        raise UsageError(
            "--recompute_modules layernorm cannot be used with --tp_comm_overlap true",
            why="the product that gathers its input keeps it",
            do="leave one of the two out",
        )
    for name in ("recompute_method", "recompute_num_layers"):
        value = getattr(args, name)
        if full and value is None:
            raise UsageError(
                f"--recompute_granularity full needs --{name}",
                do="for example --recompute_method uniform --recompute_num_layers 1",
            )
        if not full and value is not None:
            raise UsageError(
                f"--{name} {value} needs --recompute_granularity full; it is {args.recompute_granularity}",
                do=f"leave --{name} out or use --recompute_granularity full",
            )


def _sharding(args: TrainArguments) -> None:
    strategy = args.data_parallel_sharding_strategy
    if strategy is not None and (strategy == "no_shard") == args.use_distributed_optimizer:
        flag = f"--use_distributed_optimizer {str(args.use_distributed_optimizer).lower()}"
        if strategy == "no_shard" and "use_distributed_optimizer" not in args.given:
            return
        raise UsageError(
            f"--data_parallel_sharding_strategy {strategy} contradicts {flag}", do="leave one of the two out"
        )


def _overlap(args: TrainArguments) -> None:
    if not args.overlap_param_gather:
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(args, name):
            raise UsageError(f"--overlap_param_gather true needs --{name} true", do=f"add --{name} true")


def _tensor_overlap(args: TrainArguments, env: Mapping[str, str]) -> None:
    """What can be known before the ranks look at their GPUs."""
    if not args.tp_comm_overlap:
        return
    tp, per_node = args.tensor_model_parallel_size, int(env.get("NPROC_PER_NODE") or 1)
    if tp == 1:
        raise UsageError(
            "--tp_comm_overlap true needs a --tensor_model_parallel_size of at least 2",
            why="one rank has nothing to communicate",
            do="leave --tp_comm_overlap out",
        )
    if not args.sequence_parallel:
        raise UsageError(
            "--tp_comm_overlap true needs --sequence_parallel true",
            why="its all-gathers and reduce-scatters are what runs beside the matrix products",
            do="add --sequence_parallel true",
        )
    if int(env.get("NNODES") or 1) > 1 and per_node % tp:
        raise UsageError(
            f"--tp_comm_overlap true: --tensor_model_parallel_size {tp} does not divide NPROC_PER_NODE={per_node}",
            why="tensor-parallel ranks on several machines cannot reach each other's GPU memory",
            do="use a --tensor_model_parallel_size that divides it, or leave --tp_comm_overlap out",
        )


def _attention(args: TrainArguments) -> None:
    if args.use_flash_attn and args.attention_backend not in ("auto", "flash"):
        raise UsageError(
            f"--use_flash_attn true contradicts --attention_backend {args.attention_backend}",
            do="leave one of the two out",
        )


def _sequence_parallel(args: TrainArguments) -> None:
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        get_logger().warning("--sequence_parallel is disabled: tensor_model_parallel_size is 1")


def _self_cognition(args: TrainArguments) -> None:
    missing = [name for name in ("model_name", "model_author") if not getattr(args, name)]
    if has_self_cognition([*args.dataset, *args.val_dataset]):
        if missing:
            raise UsageError(
                f"swift/self-cognition needs --model_name and --model_author; missing: {', '.join(missing)}",
                why="its rows have blanks that these names fill",
                do="for example --model_name swift-robot --model_author swift",
            )
    elif len(missing) < 2:
        get_logger().warning("--model_name and --model_author are not used: swift/self-cognition is not in --dataset")


def _reports(args: TrainArguments) -> None:
    if "none" in args.report_to and len(args.report_to) > 1:
        raise UsageError(f"--report_to {' '.join(args.report_to)}: none excludes the others", do="leave none out")
