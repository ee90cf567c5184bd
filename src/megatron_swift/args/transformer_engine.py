"""What `--transformer_impl` asks for, and the rules of it."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.training_params import asked_kernel
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger

FLAG = "--transformer_impl transformer_engine"
INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"  # as its own page says

Wish = Literal["never", "where it runs", "required"]


def wish(args: TrainArguments) -> Wish:
    """Whether Transformer Engine shall do the attention: never under `local` or where attention_backend names a kernel, required where
    the flag was typed, and where it runs otherwise, for it is the default."""
    if args.transformer_impl == "local" or asked_kernel(args)[0] != "auto":
        return "never"
    return "required" if "transformer_impl" in args.given else "where it runs"


def attention_flag(args: TrainArguments) -> str:
    """The flag that asks for a kernel of the attention which may not run."""
    return FLAG if wish(args) == "required" else asked_kernel(args)[1]


def check_transformer_engine(args: TrainArguments, *, gpus: int) -> None:
    """Raise UsageError where Transformer Engine is asked for by name and cannot run. gpus: of this machine.

    That it does not load, or not with this model's heads, is only seen once a rank tries.
    """
    if "transformer_impl" in args.given and args.transformer_impl != "local" and wish(args) == "never":
        get_logger().warning("%s has no effect: %s names the kernel", FLAG, asked_kernel(args)[1])
    if wish(args) != "required":
        return
    leave = "leave it out, or use --transformer_impl local: the fastest kernel that fits is taken"
    if args.attention_dropout:
        raise UsageError(
            f"--attention_dropout {args.attention_dropout:g} excludes {FLAG}",
            why="a fused kernel drops other weights on each layout; attention is written out",
            do="leave one of the two out",
        )
    if args.deterministic_mode:
        raise UsageError(
            f"--deterministic_mode true excludes {FLAG}",
            why="its deterministic backward pass of packed rows takes memory that grows with the square of the longest segment",
            do="leave one of the two out",
        )
    if not gpus:
        raise UsageError(f"{FLAG} needs a GPU", why="this machine has none that can be seen", do=leave)
    if importlib.util.find_spec("transformer_engine") is None:
        raise UsageError(f"{FLAG}: Transformer Engine is not installed", do=f"{INSTALL}; or {leave}")
