"""What a run says: the console line, logging.jsonl, trackers, curves and the progress bar. Rank 0 only."""

from __future__ import annotations

import datetime
import json
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_swift.models.config import ModelConfig
from megatron_swift.train.curves import draw_curves
from megatron_swift.train.flops import step_flops
from megatron_swift.train.router_health import RouterHealth, by_layer, summary
from megatron_swift.train.step import StepReport
from megatron_swift.train.trackers import TrackerOptions, Trackers
from megatron_swift.utils.files import storage_errors

VS_SAMPLES = frozenset({"learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "params-norm"})
VS_SAMPLES |= {"lm loss validation", "lm loss validation ppl"}
MAX_EXPONENT = 20.0  # perplexity is exp(min(20, loss)), Megatron's ceiling


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Paths, intervals and switches of a run's output. world_size: GPUs (or processes) that share the FLOPs."""

    run_dir: Path
    train_iters: int
    global_batch_size: int
    world_size: int
    trackers: TrackerOptions
    log_interval: int = 5
    tracker_interval: int = 1
    throughput: bool = True
    learning_rate: bool = True
    validation_ppl: bool = True
    memory: bool = True
    timers: bool = True


@dataclass
class _Interval:
    """Sums since the last console line."""

    started: float
    steps: int = 0
    loss: float = 0.0
    trained: int = 0
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0
    nan: int = 0


def memory_gib() -> float:
    """Peak memory of this process: the device's on CUDA, resident memory elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Outputs:
    """Collects step reports and writes them where they belong."""

    options: OutputOptions
    cfg: ModelConfig
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trackers = Trackers(self.options.trackers)
        self.interval = _Interval(time.perf_counter())
        self.last_step = time.perf_counter()
        self.seconds_per_step = math.nan
        self.bar = ProgressBar(self.options.train_iters)
        self.health = RouterHealth()

    def step(self, iteration: int, samples: int, report: StepReport, *, lr: float, params_norm: float | None) -> None:
        """Account for one finished iteration. lr: the rate after it, as Megatron prints it."""
        now = time.perf_counter()
        seconds, self.last_step = now - self.last_step, now
        known = math.isfinite(self.seconds_per_step)
        self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * seconds if known else seconds
        flops = step_flops(self.cfg, report.counts)
        self._add(report, flops)
        self.health.step(iteration, report.routers)
        if iteration % self.options.tracker_interval == 0:
            self._track(iteration, samples, report, lr=lr, params_norm=params_norm, seconds=seconds, flops=flops)
        if iteration % self.options.log_interval == 0 or iteration in (1, self.options.train_iters):
            self._line(iteration, samples, report, lr=lr, params_norm=params_norm)
            self.interval = _Interval(time.perf_counter())
        self.bar.show(iteration, f"loss {report.loss:.4f}  {format_seconds(self._remaining(iteration))} left")

    def skip_time(self) -> None:
        """Leave out of the next step's time what passed since the last one (an evaluation, a save)."""
        now = time.perf_counter()
        self.interval.started += now - max(self.last_step, self.interval.started)  # it may have begun after the step
        self.last_step = now

    def evaluation(self, iteration: int, samples: int, loss: float, *, where: str) -> None:
        """Print and keep a validation loss; where: "iteration 100", or "the end of training"."""
        perplexity = math.exp(min(MAX_EXPONENT, loss)) if math.isfinite(loss) else math.nan
        line = f" validation loss at {where} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} | "
        rule = "-" * (len(line) + 1)
        self.bar.say(f"{rule}\n{line}\n{rule}")
        values = {"lm loss validation": loss}
        if self.options.validation_ppl:
            values["lm loss validation ppl"] = perplexity
        self._keep(iteration, samples, values)
        self._jsonl({"eval_lm loss": round(loss, 8), "eval_ppl": round(perplexity, 8), "iteration": iteration})

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        self.bar.say(text)

    def close(self) -> None:
        """End the trackers and draw the curves."""
        self.bar.close()
        self.trackers.close()
        files = draw_curves(self.options.run_dir / "images", self.history)
        if files:
            print(f"curves: {files[0].parent} ({len(files)} pictures)", flush=True)

    def _add(self, report: StepReport, flops: float) -> None:
        interval = self.interval
        interval.steps += 1
        interval.tokens += report.counts.tokens
        interval.flops += flops
        interval.skipped += report.skipped
        if math.isfinite(report.loss):
            interval.loss += report.loss * report.counts.trained
            interval.trained += report.counts.trained
        else:
            interval.nan += 1

    def _remaining(self, iteration: int) -> float:
        return (self.options.train_iters - iteration) * self.seconds_per_step

    def _track(
        self,
        iteration: int,
        samples: int,
        report: StepReport,
        *,
        lr: float,
        params_norm: float | None,
        seconds: float,
        flops: float,
    ) -> None:
        options = self.options
        values = {"batch-size": float(options.global_batch_size), "lm loss": report.loss}
        values |= {"loss-scale": report.loss_scale, "grad-norm": report.grad_norm}
        if options.learning_rate:
            values["learning-rate"] = lr
        if params_norm is not None:
            values["params-norm"] = params_norm
        if options.timers:
            values["iteration-time"] = seconds
        if options.throughput:
            values["throughput"] = flops / seconds / options.world_size / 1e12
            values["tokens-per-second"] = report.counts.tokens / seconds
        if options.memory and torch.cuda.is_available():
            values["mem-reserved-bytes"] = float(torch.cuda.memory_reserved())
            values["mem-allocated-bytes"] = float(torch.cuda.memory_allocated())
            values["mem-max-allocated-bytes"] = float(torch.cuda.max_memory_allocated())
            values["mem-allocated-count"] = float(torch.cuda.memory_stats().get("allocation.all.current", 0))
        self._keep(iteration, samples, values | summary(report.routers))
        if report.routers:
            self.trackers.scalars(by_layer(report.routers), step=iteration, samples=samples)

    def _keep(self, iteration: int, samples: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append((iteration, value))
        self.trackers.scalars(values, step=iteration, samples=samples)

    def _line(self, iteration: int, samples: int, report: StepReport, *, lr: float, params_norm: float | None) -> None:
        options, interval = self.options, self.interval
        elapsed = max(time.perf_counter() - interval.started, 1e-9)
        rate, speed = elapsed / interval.steps, interval.tokens / elapsed
        tflops = interval.flops / elapsed / options.world_size / 1e12
        loss = interval.loss / interval.trained if interval.trained else math.nan
        memory, remaining = memory_gib(), self._remaining(iteration)
        routers = summary(report.routers)
        stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        parts = [
            f" [{stamp}] iteration {iteration:8d}/{options.train_iters:8d}",
            f"consumed samples: {samples:12d}",
            f"elapsed time per iteration (ms): {rate * 1000:.1f}",
            *([f"throughput per GPU (TFLOP/s/GPU): {tflops:.3f}"] if options.throughput else []),
            f"learning rate: {lr:.6E}",
            f"global batch size: {options.global_batch_size:5d}",
            f"lm loss: {loss:.6E}",
            *_router_parts(routers),
            f"loss scale: {report.loss_scale:.1f}",
            f"grad norm: {report.grad_norm:.3f}",
            *([f"params norm: {params_norm:.3f}"] if params_norm is not None else []),
            f"number of skipped iterations: {interval.skipped:3d}",
            f"number of nan iterations: {interval.nan:3d}",
            f"tokens/s: {speed:.0f}",
            f"memory (GiB): {memory:.2f}",
            f"eta: {format_seconds(remaining)}",
        ]
        self.bar.say(" | ".join(parts) + " |")
        value = {
            "lm loss": round(report.loss, 8),
            "grad_norm": round(report.grad_norm, 8),
            "learning_rate": round(lr, 12),
            **({"params_norm": round(params_norm, 8)} if params_norm is not None else {}),
            **{name: round(value, 6) for name, value in routers.items()},
            "consumed_samples": samples,
            "global_step/max_steps": f"{iteration}/{options.train_iters}",
            "loss_scale": report.loss_scale,
            "skipped_iterations": interval.skipped,
            "seconds_per_iteration": round(rate, 4),
            "tokens_per_second": round(speed, 1),
            "tflops_per_gpu": round(tflops, 4),
            "memory_gib": round(memory, 3),
            "remaining_seconds": round(remaining, 1),
        }
        self._jsonl(value)

    def _jsonl(self, value: dict[str, object]) -> None:
        # NaN is no JSON: a loss that is not a number is written as null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
        path = self.options.run_dir / "logging.jsonl"
        with storage_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")


def _router_parts(values: dict[str, float]) -> list[str]:
    """Entries of the console line; none for a dense model."""
    return [f"{name}: {value:.4G}" for name, value in values.items()]


def format_seconds(seconds: float) -> str:
    """H:MM:SS, or ?:??:?? when unknown."""
    if not math.isfinite(seconds):
        return "?:??:??"
    return str(datetime.timedelta(seconds=round(seconds)))


class ProgressBar:
    """One line redrawn in place on a terminal; nothing at all elsewhere."""

    WIDTH = 30

    def __init__(self, total: int):
        self.total, self.live, self.shown = total, sys.stderr.isatty(), False

    def show(self, done: int, text: str) -> None:
        """Redraw."""
        if self.live:
            filled = self.WIDTH * done // self.total
            bar = "#" * filled + "." * (self.WIDTH - filled)
            print(f"\r\x1b[K[{bar}] {done}/{self.total}  {text}", end="", file=sys.stderr, flush=True)
            self.shown = True

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.close(end="\r\x1b[K")
        print(text, flush=True)

    def close(self, end: str = "\n") -> None:
        """Leave the bar's line."""
        if self.shown:
            print(end, end="", file=sys.stderr, flush=True)
            self.shown = False
