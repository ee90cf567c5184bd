"""How busy `megatron sft` keeps a GPU: the command itself, on real rows read by its loader's processes, under a trace of the device alone.

    BENCH_DATA=alpaca.json BENCH_TOKENIZER=folder python benchmarks/gpu_busy.py [--steps 20] [--layers 28] [--out FILE] [flags of megatron sft]

The model has Qwen2.5-1.5B's shape and random weights, made in a temporary folder. Packs of 8192 tokens, two micro-batches a step, one
process. The first half of the steps, in which kernels are compiled and caches fill, is left out. Busy: the union of all kernels and copies,
over the time from the end of one optimizer step to the end of a later one. Prints the share, and which kernels the longest waits stand between.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_rows import DATA, TOKENIZER

from megatron_swift.cli import main as megatron
from megatron_swift.testing import make_tiny_model

SIZES = dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, rope_theta=1e6)
UPDATE = "_update"  # the optimizer's kernel
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def make_model(folder: Path, layers: int) -> Path:
    """A folder of random weights, with the tokenizer that BENCH_TOKENIZER names."""
    make_tiny_model(folder, layers=layers, vocab_size=151936, dtype="bfloat16", max_position_embeddings=32768, **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(os.environ[TOKENIZER]) / name, folder / name)
    return folder


def traced(flags: list[str], trace: Path) -> list[dict[str, Any]]:
    """Run `megatron sft` and return what the device did, in order: name, ts and dur in microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        code = megatron("megatron", ["sft", *flags])
    assert code == 0, f"megatron sft ended with {code}"
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: float(e["ts"]))


def ends_of_steps(events: list[dict[str, Any]]) -> list[int]:
    """The place of each step's last update."""
    updates = [i for i, event in enumerate(events) if event["name"] == UPDATE]
    return [a for a, b in zip(updates, [*updates[1:], len(events) + 10**6], strict=True) if b - a > 100]


def measure(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of time in which the device did something, and the longest waits."""
    ends = ends_of_steps(events)
    first, last = ends[len(ends) // 2 - 1], ends[-1]
    at = began = float(events[first]["ts"]) + float(events[first]["dur"])
    busy, waits = 0.0, []
    for before, event in zip(events[first:last], events[first + 1 : last + 1], strict=True):
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if start > at:
            waits.append((start - at, before["name"][:60], event["name"][:60]))
        busy += max(stop - max(start, at), 0.0)
        at = max(at, stop)
    steps = len(ends) - len(ends) // 2
    waits.sort(reverse=True)
    long = [wait for wait, _, _ in waits if wait > 20]
    pairs: dict[str, list[float]] = {}
    for wait, before, after in waits[: len(long)]:
        pairs.setdefault(f"{before[:40]} -> {after[:40]}", []).append(wait)
    places = sorted(pairs.items(), key=lambda pair: -sum(pair[1]))[:15]
    return {
        "busy": round(busy / (at - began), 4),
        "milliseconds_per_step": round((at - began) / 1000 / steps, 2),
        "waits_over_20_us_per_step": round(len(long) / steps, 1),
        "their_milliseconds_per_step": round(sum(long) / 1000 / steps, 2),
        "other_waits_milliseconds_per_step": round((sum(w for w, _, _ in waits) - sum(long)) / 1000 / steps, 2),
        "kernels_per_step": round((last - first) / steps),
        "places": {where: [len(found), round(sum(found))] for where, found in places},
        "longest": [(round(wait), before, after) for wait, before, after in waits[:12]],
    }


def main() -> None:
    """Make the model, train under the trace, print and perhaps keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = {
            "model": make_model(folder / "model", arguments.layers),
            "dataset": os.environ[DATA],
            "packing": "true",
            "max_length": 8192,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "train_iters": arguments.steps,
            "eval_iters": 0,
            "split_dataset_ratio": 0,
            "save": folder / "run",
            "no_save_optim": "true",
            "lr": 1e-5,
        }
        typed = [part for name, value in run.items() for part in (f"--{name}", str(value))]
        result = measure(traced([*typed, *flags], folder / "trace.json.gz"))
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
