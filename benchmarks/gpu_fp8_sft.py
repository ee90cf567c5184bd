"""The same fine-tuning of a real model by `megatron sft` in bfloat16 and in FP8: are FP8's losses within bfloat16's noise?

    BENCH_DATA=alpaca.json python benchmarks/gpu_fp8_sft.py --model SmolLM2-135M-Instruct [--recipes tensorwise rowwise] [--seeds 3] [--out FILE]

Every tenth row is held out. Per recipe two figures, each beside the noise of bfloat16 itself:
curve      : mean difference of the training losses from bfloat16's, same rows in the same order. Noise: bfloat16 with another attention kernel, and
             float32, against bfloat16.
validation : the loss of the held-out rows at the end, mean over seeds (the order of rows). Noise: bfloat16's standard deviation over seeds.
Runs on a CPU, too, slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gpu_rows import DATA

from megatron_swift.cli import main as megatron

PLAIN: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "bfloat16, another attention": {"attention_backend": "unfused"},
    "float32": {"torch_dtype": "float32"},
}


def train(folder: Path, flags: dict[str, Any]) -> tuple[np.ndarray, float]:
    """(the training losses, the validation loss at the end) of one run."""
    typed = [part for name, value in ({"save": folder} | flags).items() for part in (f"--{name}", str(value))]
    code = megatron("megatron", ["sft", *typed])
    assert code == 0, f"megatron sft ended with {code}"
    (log,) = folder.glob("v*/logging.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (validation,) = [line["eval_lm loss"] for line in lines if "eval_lm loss" in line]
    return np.array([line["lm loss"] for line in lines if "lm loss" in line]), float(validation)


def ways(recipes: list[str]) -> dict[str, dict[str, str]]:
    """Flags of each way by its name."""
    eight = {f"hybrid {recipe}": {"fp8_format": "hybrid", "fp8_recipe": recipe} for recipe in recipes}
    return PLAIN | eight


def cut(folder: Path) -> dict[str, Path]:
    """The rows, every tenth held out: whatever the seed, the same."""
    rows = json.loads(Path(os.environ[DATA]).read_text(encoding="utf-8"))
    parts = {"val_dataset": rows[::10], "dataset": [row for number, row in enumerate(rows) if number % 10]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in parts}


def measure(arguments: argparse.Namespace, data: dict[str, Path]) -> dict[str, Any]:
    """name -> seed -> losses and validation loss."""
    common = {
        "model": arguments.model,
        **data,
        "max_length": 512,
        "micro_batch_size": 16,
        "global_batch_size": 16,
        "train_iters": arguments.steps,
        "lr": arguments.lr,
        "min_lr": arguments.lr / 10,
        "lr_warmup_iters": arguments.steps // 20,
        "log_interval": 1,
        "eval_interval": arguments.steps,
        "eval_iters": -1,
        "no_save_optim": "true",
        "torch_dtype": "bfloat16",
    }
    found: dict[str, Any] = {}
    for name, flags in ways(arguments.recipes).items():
        # The other attention and float32 only show how far two runs in the same order are apart.
        seeds = 1 if name in PLAIN and name != "bfloat16" else arguments.seeds
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as temporary:
                losses, validation = train(Path(temporary), common | flags | {"data_seed": 42 + seed})
            found.setdefault(name, []).append({"losses": losses.tolist(), "validation": validation})
            print(name, seed, "validation", round(validation, 4), "last losses", losses[-3:].tolist(), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def report(found: dict[str, Any]) -> list[str]:
    """A line for each way."""
    first = np.array(found["bfloat16"][0]["losses"])
    base = np.array([run["validation"] for run in found["bfloat16"]])
    lines = [f"bfloat16: validation {base.mean():.4f}, deviation over {len(base)} seeds {base.std(ddof=1):.4f}"]
    for name, runs in found.items():
        apart = np.array(runs[0]["losses"]) - first
        later = apart[len(apart) // 2 :]
        validation = np.array([run["validation"] for run in runs])
        off = (validation - base[: len(validation)]).mean()
        lines.append(
            f"{name}: curve {apart.mean():+.4f}, second half {later.mean():+.4f}, largest {np.abs(apart).max():.4f}; "
            f"validation {validation.mean():.4f}, from bfloat16 {off:+.4f}"
        )
    return lines


def main() -> None:
    """Train each way, print what lies between, keeping the figures as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "rowwise"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=168, help="three passes over alpaca's rows")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(arguments, cut(Path(temporary)))
    print("\n".join(report(found)), flush=True)


if __name__ == "__main__":
    main()
