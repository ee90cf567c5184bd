"""How busy `megatron sft` keeps a GPU: the command itself, on real rows read by its loader's processes, under a trace of the device alone.

    BENCH_DATA=alpaca.json BENCH_TOKENIZER=folder python benchmarks/gpu_busy.py [--steps 20] [--layers 28] [--out FILE] [flags of megatron sft]

The model has Qwen2.5-1.5B's shape and random weights, made in a temporary folder. Packs of 8192 tokens, two micro-batches a step, one
process. The first half of the steps, in which kernels are compiled and caches fill, is left out. Busy: the union of all kernels and copies,
over the time from the end of one optimizer step to the end of a later one. Prints the share, of all and step by step, and which kernels the longest
waits stand between. How long this process's first thread had to wait for a processor is "waited", what a hypervisor took from all of
them "stolen", in seconds over the whole command. `--untraced`: the same steps without the trace first; "busy_of_untraced" is the traced
busy time over the time of the same steps without it.

The trace is cupti.py's, of the device alone. `--host` takes torch's profiler instead, which makes each launch dearer, so that a host that is slow
for a moment falls behind. It says what the host did: its longest calls into CUDA, the longest times between two of them ("host"), and the tracer's
own work ("overhead"). Beside it a process sleeps for 2 ms again and again; where it wakes more than 20 ms late, the whole machine
stood still ("pauses"). All times are in one count.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cupti import recorded
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


WATCH = """
import sys, time
at = time.time()
while True:
    time.sleep(0.002)
    now = time.time()
    if now - at > 0.022:
        print(at, now, file=sys.stdout, flush=True)
    at = now
"""


Events = list[dict[str, Any]]  # what the device did, in order: name, ts and dur in microseconds


def traced(flags: list[str]) -> tuple[Events, dict[str, Any]]:
    """Run `megatron sft` under a trace of the device."""
    before = waits_of_the_host()
    with recorded() as events:
        train(flags)
    return events, waits_of_the_host(before)


def traced_with_host(flags: list[str], trace: Path) -> tuple[Events, dict[str, Any]]:
    """The same by torch's profiler; and what the host did."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    before = waits_of_the_host()
    with subprocess.Popen([sys.executable, "-c", WATCH], stdout=subprocess.PIPE, text=True) as watch:
        with torch.profiler.profile(activities=activities) as profiler:
            train(flags)
        watch.terminate()
        pauses = [tuple(float(t) * 1e6 for t in line.split()) for line in watch.communicate()[0].splitlines()]
    waits = waits_of_the_host(before)
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt") as file:
        whole = json.load(file)
    base = float(whole.get("baseTimeNanoseconds", 0)) / 1000  # the trace counts from here
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in whole["traceEvents"]:
        kinds.setdefault("device" if event.get("cat") in ON_DEVICE else event.get("cat", ""), []).append(event)
    host = host_side(kinds.get("cuda_runtime", []) + kinds.get("cuda_driver", []))
    host["overhead"] = longest((float(e["ts"]), float(e["dur"]), e["name"]) for e in kinds.get("overhead", []))
    host["pauses"] = [(round(start - base), round(stop - start)) for start, stop in pauses]
    return sorted(kinds["device"], key=lambda e: float(e["ts"])), host | waits


def waits_of_the_host(since: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds in which this process's first thread was ready and without a processor; processors taken by a hypervisor, summed."""
    waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    stolen = int(Path("/proc/stat").read_text().split("\n")[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    since = since or {"waited": 0.0, "stolen": 0.0}
    return {"waited": round(waited - since["waited"], 2), "stolen": round(stolen - since["stolen"], 2)}


def longest(spans: Iterable[tuple[float, float, str]]) -> list[tuple[int, int, str]]:
    """The dozen longest of (start, microseconds, what)."""
    return [(round(start), round(took), what) for start, took, what in sorted(spans, key=lambda s: -s[1])[:12]]


def host_side(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The longest calls, and the longest times in which nobody called."""
    calls = sorted((e for e in calls if "dur" in e), key=lambda e: float(e["ts"]))
    between, end = [], 0.0
    for before, call in pairwise(calls):
        end = max(end, float(before["ts"]) + float(before["dur"]))
        between.append((end, float(call["ts"]) - end, f"{before['name']} -> {call['name']}"))
    return {
        "calls": longest((float(e["ts"]), float(e["dur"]), e["name"]) for e in calls),
        "between": longest(between),
    }


def train(flags: list[str]) -> None:
    """`megatron sft`."""
    code = megatron("megatron", ["sft", *flags])
    assert code == 0, f"megatron sft ended with {code}"


def untraced(flags: list[str], run: Path, steps: int) -> dict[str, Any]:
    """The milliseconds of a step as logged, over the second half."""
    train([*flags, "--log_interval", "1", "--save", str(run)])
    (log,) = run.glob("v*/logging.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    times = [round(1000 * line["seconds_per_iteration"], 1) for line in lines if "lm loss" in line][steps // 2 :]
    return {"mean": round(statistics.mean(times), 2), "steps": times}


def ends_of_steps(events: Events) -> list[int]:
    """The place of each step's last update."""
    updates = [i for i, event in enumerate(events) if event["name"] == UPDATE]
    return [a for a, b in zip(updates, [*updates[1:], len(events) + 10**6], strict=True) if b - a > 100]


def end_of(event: dict[str, Any]) -> float:
    """In microseconds."""
    return float(event["ts"]) + float(event["dur"])


def busy_and_waits(events: Events) -> tuple[float, list[tuple[float, str, str, float]]]:
    """After the end of the first event: microseconds in which the device did something, and each wait: how long, between what, since when."""
    at = end_of(events[0])
    busy, waits = 0.0, []
    for before, event in pairwise(events):
        start, stop = float(event["ts"]), end_of(event)
        if start > at:
            waits.append((start - at, before["name"][:60], event["name"][:60], at))
        busy += max(stop - max(start, at), 0.0)
        at = max(at, stop)
    return busy, waits


def share(events: Events) -> float:
    """Of the time after the end of the first event, the part in which the device did something."""
    return busy_and_waits(events)[0] / (max(map(end_of, events)) - end_of(events[0]))


def measure(events: Events, host: dict[str, Any]) -> dict[str, Any]:
    """The share of time in which the device did something, of all and of each step of the second half, and the longest waits."""
    ends = ends_of_steps(events)
    later = ends[len(ends) // 2 - 1 :]  # the second half begins where the step before it ends
    first, last = later[0], later[-1]
    began, at = end_of(events[first]), max(map(end_of, events[first : last + 1]))
    busy, waits = busy_and_waits(events[first : last + 1])
    steps = len(ends) - len(ends) // 2
    waits.sort(reverse=True)
    long = [wait for wait, *_ in waits if wait > 20]
    pairs: dict[str, list[float]] = {}
    for wait, before, after, _ in waits[: len(long)]:
        pairs.setdefault(f"{before[:40]} -> {after[:40]}", []).append(wait)
    shares = [share(events[start : stop + 1]) for start, stop in pairwise(later)]
    places = sorted(pairs.items(), key=lambda pair: -sum(pair[1]))[:15]
    return {
        "busy": round(busy / (at - began), 4),
        "busy_by_step": [round(one, 4) for one in shares],
        "steps_of_98_percent": f"{sum(one >= 0.98 for one in shares)} of {len(shares)}",
        "milliseconds_per_step": round((at - began) / 1000 / steps, 2),
        "waits_over_20_us_per_step": round(len(long) / steps, 1),
        "their_milliseconds_per_step": round(sum(long) / 1000 / steps, 2),
        "other_waits_milliseconds_per_step": round((sum(w for w, *_ in waits) - sum(long)) / 1000 / steps, 2),
        "kernels_per_step": round((last - first) / steps),
        "places": {where: [len(found), round(sum(found))] for where, found in places},
        "longest": [(round(wait), before, after, round(when)) for wait, before, after, when in waits[:12]],
        "from": round(began),
        "host": host,
    }


def main() -> None:
    """Make the model, train under the trace, print and perhaps keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--untraced", action="store_true")
    parser.add_argument("--host", action="store_true")
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
        typed = [part for name, value in run.items() for part in (f"--{name}", str(value))] + flags
        plain = untraced(typed, folder / "untraced", arguments.steps) if arguments.untraced else None
        trace = traced_with_host(typed, folder / "trace.json.gz") if arguments.host else traced(typed)
        result = measure(*trace)
    if plain is not None:
        of_untraced = result["busy"] * result["milliseconds_per_step"] / plain["mean"]
        result = {"busy_of_untraced": round(of_untraced, 4), "untraced": plain} | result
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
