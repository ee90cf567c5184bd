"""Ranks through torchrun, and one error block for a failure however many ranks saw it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_swift.utils.errors import SwiftError, UsageError, WorkerError, out_of_memory
from megatron_swift.utils.files import write_text
from megatron_swift.utils.gpus import visible_gpus
from megatron_swift.utils.stop import NOTE, SIGNALS

FAILURES = "MEGATRON_SWIFT_FAILURES"  # the folder in which a failing rank says why
INTERRUPTED = 130
LESS_MEMORY = (
    "lower --micro_batch_size or --max_length, use --cross_entropy_loss_fusion true, or more data-parallel ranks"
)
TRAIN, EXPORT = "train", "export"  # what ranks can be started for


def wants_torchrun(env: Mapping[str, str]) -> bool:
    """Whether the user asked for ranks: NPROC_PER_NODE or NNODES is set, as in Megatron-SWIFT."""
    return bool(env.get("NPROC_PER_NODE") or env.get("NNODES"))


def check_processes(env: Mapping[str, str]) -> None:
    """Raise UsageError when more ranks are asked for than there are GPUs. Without GPUs the ranks share the CPU."""
    processes, gpus = int(env.get("NPROC_PER_NODE") or 1), visible_gpus(env)
    if 0 < gpus < processes:
        chosen = env.get("CUDA_VISIBLE_DEVICES")
        raise UsageError(
            f"NPROC_PER_NODE={processes}, but only {gpus} GPU{'s are' if gpus > 1 else ' is'} visible",
            why=f"CUDA_VISIBLE_DEVICES={chosen}" if chosen is not None else "every process needs a GPU of its own",
            do=f"use NPROC_PER_NODE={gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )


def torchrun_options(env: Mapping[str, str]) -> list[str]:
    """The torchrun options that the environment asks for; on one machine without a MASTER_PORT, a free port is found."""
    names = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    options = [f"--{name.lower()}={env[name]}" for name in names if env.get(name)]
    alone = int(env.get("NNODES") or 1) == 1
    if alone and not env.get("MASTER_PORT"):
        options += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", f"--rdzv_id={uuid.uuid4()}"]
    return options


def set_threads(processes: int) -> None:
    """Share this machine's cores among `processes`, unless the user's environment decides. Before torch is imported.

    OpenMP's threads spin while they wait for each other; on a machine that does anything else, the spinning steals the very core the
    other thread needs (measured: 3 to 4 times slower on two loaded cores). Passive waiting costs nothing measurable on an idle one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes > 1:  # torchrun would set 1 and warn
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))


def launch(payload: Any, env: Mapping[str, str], *, job: str = TRAIN) -> int:
    """Run `megatron_swift.worker` on every rank for a job, with its `payload` (a setup and when the command began, pickled to a private
    file); returns the exit code.

    A failure prints the block of the rank that failed first.
    """
    set_threads(int(env.get("NPROC_PER_NODE") or 1))
    with tempfile.TemporaryDirectory(prefix="megatron_swift_") as folder:
        file = Path(folder) / "setup.pickle"
        file.write_bytes(pickle.dumps((job, *payload)))
        os.environ[FAILURES] = folder
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        # Its own report of a failure names files of its own and comes on top of ours.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        # SIGTERM and SIGUSR1 are ours: torchrun would kill the ranks 30 s later, whatever they are saving.
        options = [*torchrun_options(env), "--signals_to_handle=SIGINT,SIGHUP,SIGQUIT"]
        config, command, arguments = config_from_args(parse_args([*options, "-m", "megatron_swift.worker", str(file)]))
        try:
            with _passing_on(Path(folder) / "stop", SignalException):
                elastic_launch(config=config, entrypoint=command)(*arguments)
        except ChildFailedError as error:
            return _report(Path(folder), {rank: failure.exitcode for rank, failure in error.failures.items()})
        except SignalException as error:
            print(f"stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
            return INTERRUPTED if error.sigval == signal.SIGINT else 128 + int(error.sigval)
    return 0


@contextlib.contextmanager
def _passing_on(note: Path, ended: Callable[[str, signal.Signals], BaseException]) -> Iterator[None]:
    """While it is open, a signal to stop is passed on to the ranks as a note, on which they save and end; a second one ends them now."""
    os.environ[NOTE] = str(note)

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if note.exists():
            raise ended(f"a second {name.name}", name)
        write_text(note, name.name)
        print(
            f"{name.name}: the ranks finish their step, save and stop; a second one ends them at once", file=sys.stderr
        )

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ[NOTE]


def _report(folder: Path, exit_codes: Mapping[int, int]) -> int:
    """Print the block of the first failure and return its exit code."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank*.json")]
    silent = [
        (rank, -code) for rank, code in exit_codes.items() if code < 0 and not (folder / f"rank{rank}.json").exists()
    ]
    # torchrun ends the others by SIGTERM once one has failed, and ranks whose peer has gone report just that.
    killed = [(rank, number) for rank, number in silent if number != signal.SIGTERM] or (silent if not written else [])
    if killed and all(failure["exit_code"] == WorkerError.exit_code for failure in written):
        rank, number = killed[0]
        hint = "the system may have run out of memory" if number == signal.SIGKILL else ""
        print(
            WorkerError(f"rank {rank} was killed by {signal.Signals(number).name}", why=hint).block(), file=sys.stderr
        )
        return WorkerError.exit_code
    if not written:
        print(WorkerError(f"the training processes ended with {dict(exit_codes)}").block(), file=sys.stderr)
        return WorkerError.exit_code
    first = min(written, key=lambda failure: failure["time"])
    print(first["block"], file=sys.stderr)
    return int(first["exit_code"])


def guarded(action: Callable[[], None]) -> int:
    """Run a command in this process: 0, or the exit code of what it raised, after printing (or, on a rank, leaving) its block."""
    try:
        action()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SwiftError as error:
        return _leave(error.block(), error.exit_code)
    except Exception as error:
        known = out_of_memory(error, do=LESS_MEMORY)
        if known is not None:
            return _leave(known.block(), known.exit_code)
        rank = os.environ.get("RANK")
        where = f"rank {rank} failed" if rank else "a failure of the program"
        block = WorkerError(f"{where}: {type(error).__name__}: {error}", do="the traceback above says where").block()
        return _leave(f"{traceback.format_exc()}\n{block}", WorkerError.exit_code)
    return 0


def _leave(block: str, exit_code: int) -> int:
    folder, rank = os.environ.get(FAILURES), os.environ.get("RANK")
    if folder and rank is not None:
        with contextlib.suppress(OSError):  # the launcher's folder is gone: it will report the exit code alone
            failure = {"time": time.time(), "exit_code": exit_code, "block": block}
            (Path(folder) / f"rank{rank}.json").write_text(json.dumps(failure), encoding="utf-8")
        return exit_code
    print(block, file=sys.stderr)
    return exit_code
