"""Training runs on forked ranks, from a command line to what they computed and left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # the first optimizer imports it: here once, and not in each fork

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.checkpoint.dcp import DcpFolder
from megatron_swift.checkpoint.publish import iteration_folder
from megatron_swift.commands import train
from megatron_swift.commands.setup import RunSetup, prepare_run
from megatron_swift.testing import run_ranks
from megatron_swift.train import loop, outputs
from megatron_swift.utils.errors import SwiftError

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "for",
    "was",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
]
FEW = ("--report_to", "none", "--num_workers", "0", "--micro_batch_size", "2", "--global_batch_size", "4")
FEW += (
    "--lr",
    "1e-2",
    "--log_interval",
    "1",
    "--split_dataset_ratio",
    "0",
    "--max_length",
    "96",
    "--save_interval",
    "100",
)


def write_rows(path: Path, count: int = 24) -> Path:
    """Conversations of many lengths."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + j) % len(WORDS)] for j in range(3 + i * 5 % 17)]
        rows.append({"query": " ".join(words[: 1 + i % 3]), "response": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Step = tuple[str, ...]


class Result(NamedTuple):
    """steps: (loss, gradient norm, loss scale, learning rate) of each step, as computed, to the last bit."""

    run_dir: Path
    steps: list[Step]

    def values(self, place: int) -> list[float]:
        """One of the four figures, of all steps."""
        return [float.fromhex(step[place]) for step in self.steps]


def set_up(*flags: str, ranks: int = 1) -> RunSetup:
    """What `megatron sft` settles before it starts ranks."""
    env = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
    return prepare_run(parse(SftArguments, [*FEW, *flags], warn=False), env)


def _rank(rank: int, setup: RunSetup) -> tuple[list[Step], SwiftError | None]:
    inner, steps = loop.train_step, []

    def noting(*args: Any, lr: float, **kwargs: Any) -> Any:
        report = inner(*args, lr=lr, **kwargs)
        figures = (report.loss, report.grad_norm, report.loss_scale, lr)
        steps.append(tuple(float(figure).hex() for figure in figures))  # text: NaN equals itself
        return report

    loop.train_step = noting  # in a fork of the test
    outputs.draw_curves = lambda *_: []  # seconds
    try:
        train.run(setup)
    except SwiftError as error:
        return steps, error
    return steps, None


def go(*flags: str, ranks: int = 1) -> Result:
    """Train; raises what all ranks raised alike."""
    setup = set_up(*flags, ranks=ranks)
    results = run_ranks(_rank, ranks, setup, timeout=60)
    assert all((steps, str(error)) == (results[0][0], str(results[0][1])) for steps, error in results)
    if results[0][1] is not None:
        raise results[0][1]
    assert setup.run_dir is not None
    return Result(setup.run_dir, results[0][0])


def contents(run_dir: Path, iteration: int) -> dict[str, Any]:
    """All that a checkpoint says, by name: tensors, state, random numbers of each rank."""
    folder = iteration_folder(run_dir, iteration)
    files = DcpFolder(folder)
    found: dict[str, Any] = {
        key: files.read(key, (0,) * len(stored.shape), stored.shape) for key, stored in files.tensors.items()
    }
    return found | {
        path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "manifest.json"
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two checkpoints differ in a single bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not same(one[name], other[name])
    )
