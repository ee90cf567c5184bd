"""The same training by the commands of the product in bfloat16 and in FP8, several seeds each; what gpu_fp8_sft.py and gpu_fp8_pt.py share.

The runs are processes of their own, some at a time on one GPU: their losses are wanted, not their times.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PLAIN: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "bfloat16, another attention": {"attention_backend": "unfused"},
    "float32": {"torch_dtype": "float32"},
}
BASE = "bfloat16"
MAIN = "import sys; from megatron_swift.cli import main; sys.exit(main('megatron', sys.argv[1:]))"
Flags = Mapping[str, Any]


def schedule(steps: int, lr: float, *, warmup: int) -> dict[str, Any]:
    """What all runs of a kind share: rates, every step in the log, all held-out rows at the end, nothing kept that is not needed."""
    return {
        "train_iters": steps,
        "lr": lr,
        "min_lr": lr / 10,
        "lr_warmup_iters": warmup,
        "log_interval": 1,
        "eval_interval": steps,
        "eval_iters": -1,
        "no_save_optim": "true",
        "torch_dtype": "bfloat16",
    }


@dataclass(frozen=True)
class Run:
    """losses: of each training step. validation: of the held-out rows at the end. more: what else was found of the run."""

    losses: np.ndarray
    validation: float
    more: dict[str, float]


def ways(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Flags by name; of FP8 the name is format and recipe, as in "hybrid rowwise"."""
    found = {}
    for name in names:
        kind, _, recipe = name.partition(" ")
        found[name] = PLAIN.get(name, {"fp8_format": kind, "fp8_recipe": recipe})
    return found


def megatron(command: str, flags: Flags, folder: Path) -> tuple[np.ndarray, float]:
    """(the training losses, the validation loss at the end) of one run that saves into `folder`."""
    typed = [part for name, value in ({"save": folder} | dict(flags)).items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", MAIN, command, *typed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"megatron {command} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    )
    (log,) = folder.glob("v*/logging.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (validation,) = [line["eval_lm loss"] for line in lines if "eval_lm loss" in line]
    return np.array([line["lm loss"] for line in lines if "lm loss" in line]), float(validation)


def run_all(
    command: str,
    names: Sequence[str],
    flags: Callable[[int], Flags],
    *,
    seeds: int,
    jobs: int,
    after: Callable[[Path], dict[str, float]] = lambda folder: {},
) -> dict[str, list[Run]]:
    """Every way with every seed. flags: of a run with this seed. after: looks at the folder of a finished run."""

    def one(asked: tuple[tuple[str, dict[str, str]], int]) -> tuple[str, Run]:
        (name, own), seed = asked
        with tempfile.TemporaryDirectory() as temporary:
            run = Run(*megatron(command, {**flags(seed), **own}, Path(temporary)), more=after(Path(temporary)))
        print(
            name, seed, "validation", round(run.validation, 4), run.more, "last", run.losses[-3:].tolist(), flush=True
        )
        return name, run

    found: dict[str, list[Run]] = {name: [] for name in names}
    with ThreadPoolExecutor(jobs) as pool:
        for name, run in pool.map(one, itertools.product(ways(names).items(), range(seeds))):
            found[name].append(run)
    return found


def report(found: dict[str, list[Run]]) -> list[str]:
    """A line for each way: its distance from bfloat16 with the same seed, in the training losses' second half and on held-out rows.

    Noise, of bfloat16 itself: the deviation over seeds; of the difference of two runs it is root 2 times that.
    """
    base = found[BASE]
    lines = [f"bfloat16's deviation over {len(base)} seeds: {_deviations(base)}"]
    for name, runs in found.items():
        curve, first = np.array([r.losses for r in runs]), np.array([r.losses for r in base])
        half = curve.shape[1] // 2
        apart = (curve - first)[:, half:].mean(1)
        last = (curve - first)[:, -(half // 5) :].mean()
        parts = [f"second half {_spread(apart)}, last tenth {last:+.4f}"]
        parts.append(f"validation {np.mean([r.validation for r in runs]):.4f}, from bfloat16 ")
        parts[-1] += _spread(np.array([a.validation - b.validation for a, b in zip(runs, base, strict=True)]))
        for kind in runs[0].more:
            parts.append(
                f"{kind} {_spread(np.array([a.more[kind] - b.more[kind] for a, b in zip(runs, base, strict=True)]))}"
            )
        lines.append(f"{name}: " + "; ".join(parts))
    return lines


def _deviations(runs: list[Run]) -> str:
    if len(runs) < 2:
        return "not known"
    parts = [f"validation {np.std([r.validation for r in runs], ddof=1):.4f}"]
    half = len(runs[0].losses) // 2
    parts.append(f"second half of the losses {np.std([r.losses[half:].mean() for r in runs], ddof=1):.4f}")
    parts += [f"{kind} {np.std([r.more[kind] for r in runs], ddof=1):.4f}" for kind in runs[0].more]
    return ", ".join(parts)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():+.4f} ({values.min():+.4f} to {values.max():+.4f})"


def keep(found: dict[str, list[Run]], path: Path | None) -> None:
    """Print the report, and write all figures to `path`."""
    lines = report(found)
    print("\n".join(lines), flush=True)
    if path is not None:
        figures = {
            name: [{"losses": r.losses.tolist(), "validation": r.validation, **r.more} for r in runs]
            for name, runs in found.items()
        }
        path.write_text(json.dumps({"report": lines, "runs": figures}) + "\n", encoding="utf-8")
