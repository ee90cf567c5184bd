"""Rules of the parameters that describe a model, and of dropout. Each raises UsageError."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.training_params import asked_kernel
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger

SIZES = ("num_layers", "hidden_size", "num_attention_heads")  # without a config.json, what nothing else can tell
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "default": (),
}


def check_flags(args: TrainArguments) -> None:
    """Raise UsageError for model parameters that contradict each other, whatever the config.json says."""
    if args.group_query_attention and args.num_query_groups is None:
        raise UsageError(
            "--group_query_attention true needs --num_query_groups", do="give the number of key and value heads"
        )
    if args.group_query_attention is False and args.num_query_groups not in (None, args.num_attention_heads):
        raise UsageError(
            f"--group_query_attention false contradicts --num_query_groups {args.num_query_groups}",
            do="leave one of the two out",
        )
    if args.disable_bias_linear is False and args.add_qkv_bias is False:
        raise UsageError(
            "--disable_bias_linear false contradicts --add_qkv_bias false",
            why="query, key and value are linear layers, too",
            do="leave one of the two out",
        )
    hidden, heads = args.hidden_size, args.num_attention_heads
    if hidden is not None and heads is not None and args.kv_channels is None and hidden % heads:
        raise UsageError(
            f"--hidden_size {hidden} is not a multiple of --num_attention_heads {heads}",
            do="change one of them, or give the dimensions of a head as --kv_channels",
        )
    scaling = args.rope_scaling
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in ROPE_KEYS:
            raise UsageError(f"--rope_scaling: rope_type {kind!r} is not one of {', '.join(ROPE_KEYS)}")
        missing = [key for key in ROPE_KEYS[kind] if key not in scaling]
        if missing:
            raise UsageError(f"--rope_scaling: rope_type {kind} needs {', '.join(missing)}")
    _dropout(args)


def _dropout(args: TrainArguments) -> None:
    if not args.attention_dropout:
        return
    kernel, flag = asked_kernel(args)
    if kernel in ("flash", "cudnn", "fused"):
        raise UsageError(
            f"--attention_dropout {args.attention_dropout:g} excludes {flag}",
            why="a fused kernel drops other weights on each layout; attention is written out",
            do="leave one of the two out",
        )
    if args.context_parallel_size > 1 and args.cp_comm_type != "all_gather":
        raise UsageError(
            f"--attention_dropout {args.attention_dropout:g} excludes --cp_comm_type {args.cp_comm_type}",
            do="use --cp_comm_type all_gather",
        )


def check_sizes(args: TrainArguments, *, folder: str) -> None:
    """Raise UsageError where a folder has no config.json and the parameters do not describe a model either."""
    missing = [f"--{name}" for name in SIZES if getattr(args, name) is None]
    if args.max_position_embeddings is None and args.max_length is None:
        missing.append("--max_position_embeddings")
    if missing:
        raise UsageError(
            f"{folder} holds no config.json, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given",
            why="without one the parameters must describe the model",
            do="give them, or the folder of a model",
        )


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the rules need of the settled model. rotary_dim: dims of a head that are rotated; None without rope."""

    num_attention_heads: int
    num_query_groups: int
    hidden_size: int
    kv_channels: int
    rotary_dim: int | None
    linear_bias: bool
    experts: bool


def check_model(args: TrainArguments, model: Described) -> None:
    """Raise UsageError for a model that cannot be built; warn about parameters that change nothing in it."""
    if model.num_attention_heads % model.num_query_groups:
        raise UsageError(
            f"num_attention_heads {model.num_attention_heads} is not a multiple of num_query_groups {model.num_query_groups}",
            do="change --num_attention_heads or --num_query_groups",
        )
    if model.kv_channels < 1:
        raise UsageError(
            f"hidden_size {model.hidden_size} is less than num_attention_heads {model.num_attention_heads}",
            do="change one of them, or give --kv_channels",
        )
    if model.rotary_dim is not None and (model.rotary_dim % 2 or not model.rotary_dim):
        raise UsageError(
            f"{model.rotary_dim} of a head's {model.kv_channels} dimensions would be rotated, which are turned in pairs",
            do="change --kv_channels or --rotary_percent",
        )
    if model.experts and model.linear_bias:
        raise UsageError(
            "--disable_bias_linear false: experts have no bias", do="leave it out; --add_qkv_bias true is possible"
        )
    if model.rotary_dim is None:
        for name in ("rotary_base", "rotary_percent", "rope_scaling"):
            if name in args.given:
                get_logger().warning("--%s has no effect: the model has no rotary positions", name)
