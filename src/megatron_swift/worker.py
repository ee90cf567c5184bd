"""One rank, started by torchrun: `python -m megatron_swift.worker SETUP`, SETUP being the launcher's private file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_swift.args.run_params import logging_level_number
from megatron_swift.launch import EXPORT, TRAIN, guarded
from megatron_swift.utils.log import set_up_logging

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(path: str) -> int:
    """Train or export as the setup says; the exit code of `launch.guarded`."""
    _die_with_launcher()
    job, setup, started = pickle.loads(Path(path).read_bytes())
    level = setup.args.logging_level if job == TRAIN else None
    set_up_logging(logging_level_number(level))

    def train() -> None:
        from megatron_swift.commands.train import run

        run(setup, started=started)

    def export() -> None:
        from megatron_swift.commands.export import run_rank

        run_rank(setup)

    return guarded({TRAIN: train, EXPORT: export}[job])


def _die_with_launcher() -> None:
    """A launcher that is killed can end nobody any more: its ranks would train on, holding GPUs and the run's folder."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before we asked
        os._exit(1)


def _leave(code: int) -> NoReturn:
    """End at once, without taking the interpreter down.

    Meanwhile C++ code of torch's may abort a rank that has done its work, and torchrun then ends the others for it. Seen with gloo: no
    Python frame left, "terminate called without an active exception", in 5 of 14 runs one after the other, and not again at will.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1]))
