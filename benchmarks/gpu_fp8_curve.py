"""Losses of the same pre-training in bfloat16 and in FP8, on one GPU, from the same random weights and on text that is never seen twice.

    BENCH_TEXT=a.txt:b.txt BENCH_TOKENIZER=folder python benchmarks/gpu_fp8_curve.py [--lr 5e-4] [--ways hybrid-tensorwise ...]

A Llama of 12 layers of 1024 (gpu_rows.py says where the text comes from), four rows of 2048 tokens a step, as many steps as the text has. A
second run in bfloat16 with FlashAttention instead of cuDNN's attention, whose sums round differently, shows the noise. Prints each curve, and
its distance from the first one.
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
from gpu_rows import TOKENIZER, text_batches

from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Batch
from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import EngineOptions
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


def curve(model: ModelConfig, mesh: Mesh, batches: list[Batch], *, lr: float, **options: Any) -> np.ndarray:
    """(loss, gradient norm) of each step [steps, 2]; the rate rises over the first fifth of them and stays."""
    engine = build_engine(model, mesh, EngineOptions(compute_dtype=torch.bfloat16, **options))
    fill(engine)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    scale, found = LossScale.for_dtype("bfloat16"), []
    for number, batch in enumerate(batches):
        rate = lr * min(1.0, (number + 1) / max(len(batches) // 5, 1))
        report = train_step(engine, optimizer, [batch], lr=rate, clip_grad=1.0, loss_scale=scale)
        found.append((report.loss, report.grad_norm))
    release(engine, optimizer)
    return np.array(found)


def main() -> None:
    """Train each way, print the curves and what lies between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="also write the curves here, as JSON")
    arguments = parser.parse_args()
    mesh = start(backend="nccl", timeout_minutes=1)
    vocabulary = -(-Tokenizer.load(Path(os.environ[TOKENIZER])).vocab_size // 128) * 128
    model = LLAMA_8B.replace(
        num_layers=12,
        hidden_size=1024,
        ffn_hidden_size=2816,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=vocabulary,
        tied_embeddings=True,
    )
    batches = text_batches(length=2048, rows=4)
    curves: dict[str, np.ndarray] = {}
    for name in arguments.ways:
        try:
            curves[name] = curve(model, mesh, batches, lr=arguments.lr, **WAYS[name])
        except RuntimeError as error:  # the other ways are worth having all the same
            print(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            losses, norms = curves[name].T
            print(
                name, "losses", np.round(losses[::4], 3).tolist(), "norms", np.round(norms[::4], 2).tolist(), flush=True
            )
        gc.collect()
        torch.cuda.empty_cache()
    first = next(iter(curves.values()))[:, 0]
    for name, found in curves.items():
        apart = found[:, 0] - first
        later = apart[len(apart) // 2 :].mean()
        print(
            f"{name}: {len(found)} steps, mean {apart.mean():+.4f}, second half {later:+.4f}, largest {np.abs(apart).max():.4f}, "
            f"last five {found[-5:, 0].mean():.4f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({k: v.tolist() for k, v in curves.items()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
