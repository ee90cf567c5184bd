"""Losses of the same training in bfloat16 and in FP8, on one GPU: Llama-3-8B's shape with 8 of its 32 layers, from the same random weights.

    BENCH_DATA=alpaca.json BENCH_TOKENIZER=folder python benchmarks/gpu_fp8_curve.py [--steps 60] [--layers 8] [--ways hybrid-tensorwise ...]

Real rows, packs of up to 8192 tokens, one a step (gpu_rows.py says where they come from). A second run in bfloat16 with FlashAttention instead of
cuDNN's attention, whose sums round differently, shows the noise. Prints each curve, and its distance from the first one. 20 s a way.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import LLAMA_8B, fill, release
from gpu_rows import TOKENIZER, packed_batches

from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Batch
from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.engine import EngineOptions, build_engine
from megatron_swift.parallel.mesh import Mesh, start
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step

WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "bfloat16-flash": {"attention_backend": "flash"},
    "hybrid-tensorwise": {"fp8": Fp8Options(format="hybrid")},
    "hybrid-tensorwise-fast": {"fp8": Fp8Options(format="hybrid", fast_backward=True)},
    "e4m3-tensorwise": {"fp8": Fp8Options(format="e4m3")},
    "hybrid-rowwise": {"fp8": Fp8Options(format="hybrid", recipe="rowwise")},
    "e4m3-blockwise": {"fp8": Fp8Options(format="e4m3", recipe="blockwise")},
}


def curve(model: ModelConfig, mesh: Mesh, batches: list[Batch], *, steps: int, lr: float, **options: Any) -> np.ndarray:
    """(loss, gradient norm) of each step [steps, 2]; the rate rises over the first tenth of them and stays."""
    engine = build_engine(model, mesh, EngineOptions(compute_dtype=torch.bfloat16, **options))
    fill(engine)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    found = []
    for number in range(steps):
        rate = lr * min(1.0, (number + 1) / max(steps // 10, 1))
        batch = [batches[number % len(batches)]]
        scale = LossScale.for_dtype("bfloat16")
        report = train_step(engine, optimizer, batch, lr=rate, clip_grad=1.0, loss_scale=scale)
        found.append((report.loss, report.grad_norm))
    release(engine, optimizer)
    return np.array(found)


def main() -> None:
    """Train each way, print the curves and what lies between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="also write the curves here, as JSON")
    arguments = parser.parse_args()
    mesh = start(backend="nccl", timeout_minutes=1)
    vocabulary = -(-Tokenizer.load(Path(os.environ[TOKENIZER])).vocab_size // 128) * 128
    model = LLAMA_8B.replace(num_layers=arguments.layers, vocab_size=vocabulary)
    batches = packed_batches(capacity=8192, packs_per_batch=1)
    curves: dict[str, np.ndarray] = {}
    for name in arguments.ways:
        try:
            curves[name] = curve(model, mesh, batches, steps=arguments.steps, lr=arguments.lr, **WAYS[name])
        except RuntimeError as error:  # the other ways are worth having all the same
            print(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            losses, norms = curves[name].T
            print(name, "losses", np.round(losses, 3).tolist(), "norms", np.round(norms, 2).tolist(), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    first = next(iter(curves.values()))[:, 0]
    for name, found in curves.items():
        apart = found[:, 0] - first
        later = apart[len(apart) // 2 :].mean()
        print(
            f"{name}: mean {apart.mean():+.4f}, second half {later:+.4f}, largest {np.abs(apart).max():.4f}, end {found[-5:, 0].mean():.4f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({k: v.tolist() for k, v in curves.items()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
