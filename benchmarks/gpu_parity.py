"""The fast kernels against their plain twins on a GPU: logits, gradients and 20 training steps, with a float32 model as the judge.

    python benchmarks/gpu_parity.py [--models dense qwen3 moe] [--steps 20] [--set NAME=VALUE ...] [--out FILE]

Three engines start from the same weights: `exact`, float32 (TF32 off) with every fast path off; `plain`, bfloat16 with every fast path off;
`fast`, bfloat16 as the product runs. Rows are ragged, even, and of short segments, so that each attention path is met. The demands:

logits, gradients : relative distance of `fast` from `exact` at most 1.25 times that of `plain` (and 3e-2 at most): a fast path may not be
                    less exact than bfloat16 itself is.
steps             : the loss of each of the 20 AdamW steps within 1 % of `exact`, and on average at most 1.5 times as far from it as
                    `plain` (distances under 1e-3 count as 1e-3: two bfloat16 runs differ by as much).

`--set` changes fields of EngineOptions for `fast` alone. Exit code 1 where a demand is not met.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import DENSE, fill, make_batch, parse_change, release
from torch import Tensor

from megatron_swift.data.types import Batch
from megatron_swift.kernels.adamw import plain_adamw
from megatron_swift.kernels.cross_entropy import linear_cross_entropy
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Mesh, start
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step

SMALL = DENSE.replace(
    num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=4, num_query_groups=2, vocab_size=4999
)
EXPERTS = MoEConfig(
    num_experts=16,
    topk=4,
    ffn_hidden_size=384,
    shared_size=512,
    pre_softmax=True,
    sparse_layers=(True,) * 4,
    aux_loss_coeff=0.01,
)
MODELS = {
    "dense": SMALL,
    "qwen3": SMALL.replace(qk_layernorm=True, qkv_bias=False),
    "moe": SMALL.replace(moe=EXPERTS, tied_embeddings=False),
}
# Documents; a dense batch; conversations of one to about a hundred tokens.
ROWS: tuple[tuple[int, ...], ...] = (
    (700, 33, 1024, 291),
    (512,) * 4,
    tuple(int(n) for n in np.random.default_rng(3).integers(1, 120, 30)),
)
PLAIN = dict(attention_backend="unfused", unfused=("norm", "rope", "swiglu"), grouped_experts=False)


@dataclass
class Found:
    """What one engine computed: per row its logits, per parameter its gradient, per step its loss."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]
    losses: list[float]
    kernels: dict[str, str]


def build(cfg: ModelConfig, mesh: Mesh, kind: str, changes: dict[str, Any]) -> tuple[Engine, Optimizer]:
    """An engine of one of the three kinds, with the same weights in each."""
    fast = kind == "fast"
    dtype = torch.float32 if kind == "exact" else torch.bfloat16
    engine = build_engine(cfg, mesh, EngineOptions(compute_dtype=dtype, **(changes if fast else PLAIN)))  # type: ignore[arg-type]
    fill(engine)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    if not fast:
        engine.chunks[0].loss_function, optimizer.adamw = linear_cross_entropy, plain_adamw
    return engine, optimizer


def compute(cfg: ModelConfig, mesh: Mesh, kind: str, *, steps: int, changes: dict[str, Any]) -> Found:
    """Everything of one engine, on the CPU."""
    engine, optimizer = build(cfg, mesh, kind, changes)
    batches = [make_batch(lengths, cfg.vocab_size) for lengths in ROWS]
    with torch.no_grad():
        logits = [logits_of(engine, batch) for batch in batches]
    engine.forward_backward(batches, num_tokens=engine.count(batches).trained, num_rows=len(batches))
    gradients = {s.name: s.grad.float().cpu() for s in engine.shards if s.grad is not None}
    engine.shards.drop_grads()
    scale, losses = LossScale.for_dtype("bfloat16"), []
    for number in range(steps):
        one = [batches[number % len(batches)]]
        losses.append(train_step(engine, optimizer, one, lr=3e-4, clip_grad=1.0, loss_scale=scale).loss)
    kernels = {**engine.kernels, "optimizer": optimizer.kernel if kind == "fast" else "torch"}
    release(engine, optimizer)
    return Found(logits, gradients, losses, kernels)


def logits_of(engine: Engine, batch: Batch) -> Tensor:
    """float32 [T, vocabulary]."""
    row, model = engine._row(batch), engine.chunks[0]
    return model.logits(model.hidden_states(row.tokens, row.positions, row.segments)).float().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def judge(exact: Found, plain: Found, fast: Found) -> tuple[dict[str, Any], list[str]]:
    """(figures, what is not met)."""
    wrong: list[str] = []
    figures: dict[str, Any] = {}

    def demand(what: str, mine: float, twin: float) -> None:
        if not mine <= min(max(1.25 * twin, 1e-3), 3e-2):
            wrong.append(f"{what}: {mine:.2e} from float32, the plain twin {twin:.2e}")

    pairs = [(distance(f, e), distance(p, e)) for f, p, e in zip(fast.logits, plain.logits, exact.logits, strict=True)]
    figures["logits"] = [(round(mine, 5), round(twin, 5)) for mine, twin in pairs]
    for number, (mine, twin) in enumerate(pairs):
        demand(f"logits of row {number}", mine, twin)
    each = {
        name: (distance(fast.gradients[name], g), distance(plain.gradients[name], g))
        for name, g in exact.gradients.items()
    }
    worst = max(each, key=lambda name: each[name][0] / max(each[name][1], 1e-9))
    figures["gradients"] = {
        "largest": max(mine for mine, _ in each.values()),
        "largest of the twin": max(twin for _, twin in each.values()),
        "worst ratio": {worst: each[worst]},
    }
    whole = [torch.cat([found.gradients[name].flatten() for name in each]) for found in (fast, plain, exact)]
    mine, twin = distance(whole[0], whole[2]), distance(whole[1], whole[2])
    figures["gradients"]["all together"] = (round(mine, 5), round(twin, 5))
    demand("all gradients together", mine, twin)
    apart = [abs(a - b) / b for a, b in zip(fast.losses, exact.losses, strict=True)]
    twins = [abs(a - b) / b for a, b in zip(plain.losses, exact.losses, strict=True)]
    mean, of_twin = sum(apart) / len(apart), sum(twins) / len(twins)
    figures["steps"] = {"largest": max(apart), "mean": mean, "mean of the twin": of_twin, "losses": fast.losses}
    if not (max(apart) <= 1e-2 and mean <= 1.5 * max(of_twin, 1e-3)):
        wrong.append(f"steps: losses up to {max(apart):.2e} from float32, {mean:.2e} on average (twin {of_twin:.2e})")
    return figures, wrong


def main() -> None:
    """Compute, compare, print; exit 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", type=parse_change, default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    mesh = start(backend="nccl", timeout_minutes=1)
    assert mesh.device.type == "cuda", "this compares kernels that run on a GPU"
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["python"], all_wrong = platform.python_version(), []
    for name in arguments.models:
        found = {
            kind: compute(MODELS[name], mesh, kind, steps=arguments.steps, changes=dict(arguments.set))
            for kind in ("exact", "plain", "fast")
        }
        figures, wrong = judge(found["exact"], found["plain"], found["fast"])
        report[name] = figures | {"kernels": found["fast"].kernels}
        all_wrong += [f"{name}: {line}" for line in wrong]
        print(name, json.dumps(figures), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(all_wrong) if all_wrong else "nothing is wrong")
    sys.exit(bool(all_wrong))


if __name__ == "__main__":
    main()
