"""Rules of linear layers in FP8: what fits them. Each raises UsageError."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_swift.args.commands import TrainArguments
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger


def check_fp8(args: TrainArguments, *, sizes: Mapping[str, int], dtype: str) -> None:
    """Raise UsageError for what the 8-bit products cannot do; warn about a recipe without a format.

    sizes : the features on either side of a rank's linear layers, by a name for the message.  dtype: what the run computes in.
    """
    if args.fp8_format is None:
        if "fp8_recipe" in args.given:
            get_logger().warning("--fp8_recipe %s: no effect without --fp8_format", args.fp8_recipe)
        return
    if args.fp8_recipe == "blockwise" and args.fp8_format != "e4m3":
        raise UsageError(
            f"--fp8_recipe blockwise needs --fp8_format e4m3, not {args.fp8_format}",
            why="torch's products of blocks take e4m3 alone; a scale of 128 gradients leaves them range enough",
            do="use --fp8_format e4m3, or --fp8_recipe tensorwise",
        )
    if dtype != "bfloat16":
        raise UsageError(
            f"--fp8_format {args.fp8_format} needs a run in bfloat16, not {dtype}",
            why="all that is not in 8 bits is in bfloat16, as in Megatron",
            do="add --torch_dtype bfloat16",
        )
    if args.tp_comm_overlap:
        raise UsageError(
            f"--fp8_format {args.fp8_format} excludes --tp_comm_overlap true",
            why="the products that communicate meanwhile are in 16 bits",
            do="leave one of the two out",
        )
    _sizes(args, sizes)


def _sizes(args: TrainArguments, sizes: Mapping[str, int]) -> None:
    whole = 128 if args.fp8_recipe == "blockwise" else 16
    odd = [f"{name} {size}" for name, size in sizes.items() if size % whole]
    if not odd:
        return
    tp = args.tensor_model_parallel_size
    others = [] if tp == 1 else ["a smaller --tensor_model_parallel_size"]
    if whole == 128 and not any(size % 16 for size in sizes.values()):
        others.insert(0, "--fp8_recipe tensorwise")
    raise UsageError(
        f"--fp8_format {args.fp8_format} with --fp8_recipe {args.fp8_recipe} needs sizes that are multiples of {whole}, "
        f"and {' and '.join(odd)} {'are' if len(odd) > 1 else 'is'} not"
        + (f" (on each of {tp} ranks)" if tp > 1 else ""),
        why="the tensor cores take 8-bit matrices in such pieces",
        do=f"use {' or '.join(others)}, or leave --fp8_format out" if others else "leave --fp8_format out",
    )
