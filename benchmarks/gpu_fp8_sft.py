"""The same fine-tuning of a real model by `megatron sft` in bfloat16 and in FP8: are FP8's losses within bfloat16's noise?

    BENCH_DATA=alpaca.json python benchmarks/gpu_fp8_sft.py --model SmolLM2-135M-Instruct [--ways "hybrid rowwise" ...] [--seeds 3] [--out FILE]

Every tenth row is held out, whatever the seed, which is of the rows' order. Besides what fp8_runs.py prints: "exported", the held-out loss of
the folder that comes out, computed in bfloat16. Runs on a CPU, too, slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fp8_runs import BASE, PLAIN, keep, megatron, run_all, schedule
from gpu_rows import DATA


def cut(folder: Path) -> dict[str, Path]:
    """The rows, every tenth held out: whatever the seed, the same."""
    rows = json.loads(Path(os.environ[DATA]).read_text(encoding="utf-8"))
    parts = {"val_dataset": rows[::10], "dataset": [row for number, row in enumerate(rows) if number % 10]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in parts}


def exported(run: Path, flags: dict[str, Any]) -> dict[str, float]:
    """The held-out loss of what a run exported, in bfloat16: that of a run whose only step changes nothing."""
    (folder,) = run.glob("v*/iter_*/hf")
    still = {"model": folder, "lr": 1e-30, "min_lr": 0, "train_iters": 1, "eval_interval": 1, "lr_warmup_iters": 0}
    return {"exported": megatron("sft", {**flags, **still, "save_safetensors": "false"}, run / "again")[1]}


def main() -> None:
    """Train each way with each seed, print what lies between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ways", nargs="+", default=[*list(PLAIN)[1:], "hybrid tensorwise", "hybrid rowwise"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=168, help="three passes over alpaca's rows")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    common: dict[str, Any] = {
        "model": arguments.model,
        "max_length": 512,
        "micro_batch_size": 16,
        "global_batch_size": 16,
        "save_safetensors": "true",
        **schedule(arguments.steps, arguments.lr, warmup=arguments.steps // 20),
    }
    with tempfile.TemporaryDirectory() as temporary:
        common |= cut(Path(temporary))
        found = run_all(
            "sft",
            [BASE, *arguments.ways],
            lambda seed: common | {"data_seed": 42 + seed},
            seeds=arguments.seeds,
            jobs=arguments.jobs,
            after=lambda run: exported(run, common),
        )
        keep(found, arguments.out)


if __name__ == "__main__":
    main()
