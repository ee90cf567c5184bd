"""A training run of forked ranks into which faults are put, and the proof that what comes after it is as good as undisturbed."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import Result, _rank, contents, differences, go, set_up, write_rows

from megatron_swift.checkpoint import manifest as manifests
from megatron_swift.checkpoint.manifest import verify
from megatron_swift.checkpoint.publish import TRACKER, iteration_folder, published
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.utils.errors import SwiftError
from megatron_swift.utils.log import set_up_logging

LENGTH, INTERVAL, RANKS = 12, 3, 2
SETTINGS = ("--lr_decay_iters", str(LENGTH), "--lr_warmup_iters", "2", "--packing", "true", "--add_version", "false")
Fault = Callable[[int], None]  # called in each rank's fork, before it trains


@dataclass
class World:
    """A model, data, and the undisturbed run that all others are compared with."""

    place: Path
    golden: Result = field(init=False)
    final: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        make_tiny_model(self.place / "model", dtype="bfloat16", layers=1)
        write_rows(self.place / "rows.jsonl")
        self.golden = self.start(self.place / "golden")
        self.final = contents(self.golden.run_dir, LENGTH)

    def flags(self, run: Path, *more: str) -> tuple[str, ...]:
        """Of a run into the folder, from the model unless `more` says otherwise."""
        source = () if "--load" in more else ("--model", str(self.place / "model"))
        data = ("--dataset", str(self.place / "rows.jsonl"), "--save", str(run), "--train_iters", str(LENGTH))
        return (*source, *data, "--save_interval", str(INTERVAL), *SETTINGS, *more)

    def start(self, run: Path, *more: str, ranks: int = RANKS) -> Result:
        """A run to its end."""
        set_up_logging()  # onto the stderr of this test
        return go(*self.flags(run, *more), ranks=ranks)

    def disturb(self, run: Path, fault: Fault, *more: str, ranks: int = RANKS) -> SwiftError | None:
        """A run with a fault; what all ranks raised alike, None where they were killed."""
        set_up_logging()
        setup = set_up(*self.flags(run, *more), ranks=ranks)
        try:
            results = run_ranks(_disturbed, ranks, setup, fault, timeout=60)
        except AssertionError as error:
            # Either word may come first: that of the dead rank's silence, or that of the one who waited for it.
            if re.search(r"died without a word|Connection (closed|reset) by peer|Broken pipe", str(error)):
                return None
            raise
        errors = [error for _, error in results]
        assert len({str(error) for error in errors}) == 1, errors
        return errors[0]

    def resume(self, run: Path, *more: str, expected_start: int | None = None, into: Path | None = None) -> Result:
        """A run from the folder's checkpoints (or anew where there is none) to the end, which is the golden one, bit for bit."""
        load = ("--load", str(run), "--model", str(self.place / "model"), "--exit_on_missing_checkpoint", "false")
        into = into or run
        result = self.start(into, *load, *more)
        done = LENGTH - len(result.steps)
        assert result.steps == self.golden.steps[done:]
        assert expected_start in (None, done), done
        assert differences(self.final, contents(into, LENGTH)) == []
        self.check(into)
        return result

    def check(self, run: Path) -> None:
        """What every run must leave: whole checkpoints, a tracker that names the last one, nothing half-done."""
        for iteration in published(run):
            verify(iteration_folder(run, iteration))
        assert (run / TRACKER).read_text() == str(LENGTH)
        assert half_done(run) == []


def half_done(run: Path) -> list[str]:
    """Staging folders and half-deleted checkpoints."""
    return sorted(path.name for pattern in (".iter_*", ".trash-*", ".probe-*") for path in run.glob(pattern))


def _disturbed(rank: int, setup: Any, fault: Fault) -> Any:
    faulthandler.dump_traceback_later(50, exit=True)  # says where a rank hangs, before run_ranks ends it
    fault(rank)
    return _rank(rank, setup)


def kill() -> None:
    """This process, as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_write(rank: int, iteration: int, action: Callable[[Path], None]) -> Fault:
    """Do something when a rank has written half of its tensors' file of an iteration."""

    def fault(me: int) -> None:
        if me != rank:
            return
        inner, seen = manifests._Summed.write, [0]

        def write(self: Any, data: Any) -> int:
            path = Path(self.file.name)
            seen[0] += path.suffix == ".distcp" and f"iter_{iteration:07d}" in path.parent.name
            if seen[0] == 40:
                action(path)
            return inner(self, data)

        manifests._Summed.write = write  # in a fork of the test

    return fault


def before(owner: Any, name: str, when: Callable[..., bool], action: Callable[[], None], *, rank: int = 0) -> Fault:
    """Do something on a rank before it calls a function with certain arguments."""

    def fault(me: int) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if me == rank and when(*args):
                action()
            return inner(*args, **kwargs)

        setattr(owner, name, call)  # in a fork of the test

    return fault


def killed_at(seconds: float, rank: int) -> Fault:
    """Kill a rank some time after it has begun."""

    def fault(me: int) -> None:
        if me == rank:
            timer = threading.Timer(seconds, kill)
            timer.daemon = True
            timer.start()

    return fault


def flip(path: Path, generator: random.Random) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
