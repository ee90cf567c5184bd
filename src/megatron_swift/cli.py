"""The console scripts `megatron` and `swift`: pick the command, parse, and start it. Nothing here imports torch."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_swift import __version__
from megatron_swift.args.commands import (
    DataShowArguments,
    ExportArguments,
    InferArguments,
    PreprocessArguments,
    PtArguments,
    SftArguments,
    parse,
)
from megatron_swift.args.flags import wants_help
from megatron_swift.args.reference import help_text
from megatron_swift.args.rules import check_environment
from megatron_swift.args.run_params import logging_level_number
from megatron_swift.args.spec import Arguments
from megatron_swift.launch import EXPORT, check_processes, guarded, launch, set_threads, wants_torchrun
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import set_up_logging

NOT_BUILT = {"rlhf", "deploy", "rollout", "sample", "eval", "app", "web-ui", "merge-lora"}


def megatron() -> None:
    """Entry point of `megatron`."""
    _enter("megatron")


def swift() -> None:
    """Entry point of `swift`."""
    _enter("swift")


def _enter(program: str) -> None:
    try:
        code = main(program, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        code = 128 + signal.SIGPIPE
    if code:
        # At once: Python would first wait for loader processes of the run that failed, and they for its next question.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(program: str, argv: Sequence[str]) -> int:
    """Run `program` (megatron or swift) with its arguments; returns the exit code."""
    started = time.time()
    set_up_logging()
    commands = COMMANDS[program]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(program))
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        print(f"megatron-swift {__version__}")
        return 0
    name, words = argv[0].replace("_", "-"), 1
    if len(argv) > 1 and f"{name} {argv[1]}" in commands:
        name, words = f"{name} {argv[1]}", 2
    if name not in commands:
        return guarded(lambda: _unknown(program, argv[0], list(commands)))
    kind, action = commands[name]
    if wants_help(argv[words:]):
        print(help_text(kind, f"{program} {name}"), end="")
        return 0
    set_threads(1)
    result = 0

    def start() -> None:
        nonlocal result
        args = parse(kind, argv[words:])
        for key, value in args.config_env.items():
            os.environ.setdefault(key, value)
        result = action(args, started)

    return guarded(start) or result


def _unknown(program: str, name: str, known: list[str]) -> None:
    if name.replace("_", "-") in NOT_BUILT:
        raise UsageError(
            f"{program} {name} is not built yet in this version", do=f"built are: {program} {', '.join(known)}"
        )
    near = difflib.get_close_matches(name, known, 1)
    raise UsageError(
        f"{program} has no command {name!r}", do=f"did you mean {near[0]}?" if near else f"commands: {', '.join(known)}"
    )


def _overview(program: str) -> str:
    lines = [f"usage: {program} COMMAND [--name value ...]", "", "commands:"]
    lines += [f"  {name:10s} {kind.__dict__['summary']}" for name, (kind, _) in COMMANDS[program].items()]
    return "\n".join([*lines, "", f"`{program} COMMAND --help` lists the parameters."])


def _train(args: Any, started: float) -> int:
    set_up_logging(logging_level_number(args.logging_level))
    from megatron_swift.commands.setup import prepare_run

    check_environment(os.environ)
    check_processes(os.environ)
    setup = prepare_run(args, os.environ)
    if wants_torchrun(os.environ):
        return launch((setup, started), os.environ)
    from megatron_swift.commands.train import run

    run(setup, started=started)
    return 0


def _export(args: Any, started: float) -> int:
    from megatron_swift.commands.export import run

    run(args)
    return 0


def _export_on_ranks(args: Any, started: float) -> int:
    if not wants_torchrun(os.environ):
        return _export(args, started)
    from megatron_swift.commands.export import prepare_export

    check_environment(os.environ)
    # Weights pass through host memory only: any number of ranks will do, and none of them makes a CUDA context.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return launch((prepare_export(args), started), os.environ, job=EXPORT)


def _infer(args: Any, started: float) -> int:
    from megatron_swift.commands.infer import run

    run(args)
    return 0


def _data_show(args: Any, started: float) -> int:
    from megatron_swift.commands.data import show

    show(args)
    return 0


def _preprocess(args: Any, started: float) -> int:
    set_up_logging(logging_level_number(args.logging_level))
    from megatron_swift.commands.preprocess import run

    run(args)
    return 0


Action = Callable[[Any, float], int]
COMMANDS: dict[str, dict[str, tuple[type[Arguments], Action]]] = {
    "megatron": {
        "sft": (SftArguments, _train),
        "pt": (PtArguments, _train),
        "preprocess": (PreprocessArguments, _preprocess),
        "export": (ExportArguments, _export_on_ranks),
        "data show": (DataShowArguments, _data_show),
    },
    "swift": {"export": (ExportArguments, _export), "infer": (InferArguments, _infer)},
}
