"""Host time of a training step: a model so tiny that what is left is Python, autograd and the collectives' calls.

    python benchmarks/host_time.py [--steps 20]

Forked gloo ranks share this machine's cores. Per layout it prints the shortest step by the clock, and the least CPU time that a rank spent
on one; the latter hardly depends on what else the machine does. Minima, because others may be using it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from communication import Case, Shape, make_batches, make_model

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.models.families import describe
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import EngineOptions
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import load_weights
from megatron_swift.train.step import train_step

SEQUENCE = {"sequence_parallel": True}
CASES = {
    "one process": Case(1, Sizes()),
    "dp2": Case(2, Sizes()),
    "tp2": Case(2, Sizes(tp=2), SEQUENCE),
    "pp2": Case(2, Sizes(pp=2)),
    "cp2": Case(2, Sizes(cp=2)),
    "dp4": Case(4, Sizes()),
    "tp2 pp2": Case(4, Sizes(tp=2, pp=2), SEQUENCE),
    "dp8": Case(8, Sizes()),
    "tp2 pp2 cp2": Case(8, Sizes(tp=2, pp=2, cp=2), SEQUENCE),
}


class Times(NamedTuple):
    """Milliseconds: the shortest step by the clock, and the least CPU time of one."""

    clock: float
    cpu: float


def time_steps(rank: int, folder: Path, case: Case, shape: Shape, steps: int) -> Times:
    """The minima of one rank over `steps` steps, after two to warm up."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=2, sizes=case.sizes)
    cfg = describe(folder, model_type=None, template="chatml", chat_template=None).config
    engine = build_engine(cfg, mesh, EngineOptions(compute_dtype=torch.float32, **case.options))
    load_weights(engine.shards, tensor_specs(cfg), HuggingFaceWeights(folder, cfg))
    optimizer, batches = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1)), make_batches(shape)
    scale, clock, cpu = LossScale.for_dtype("float32"), [], []
    for _ in range(steps + 2):
        began, worked = time.perf_counter(), time.process_time()
        train_step(engine, optimizer, batches, lr=1e-3, clip_grad=1.0, loss_scale=scale)
        clock.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - worked))
    mesh_module.stop()
    return Times(min(clock[2:]), min(cpu[2:]))


def main() -> None:
    """Print a table, one line per layout: rank 0's shortest step, and the CPU time of the rank that spent most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps, shape = parser.parse_args().steps, Shape()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {shape}")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), shape)
        for name, case in CASES.items():
            times = run_ranks(time_steps, case.ranks, model, case, shape, steps, timeout=300)
            clock, cpu = times[0].clock, max(t.cpu for t in times)
            print(f"| {case.ranks} | {name} | {clock:.0f} | {cpu:.0f} |", flush=True)


if __name__ == "__main__":
    main()
