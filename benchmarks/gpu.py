"""Training steps of the product's own engine on one GPU, on random weights and packed rows: what every user's step costs.

    python benchmarks/gpu.py [--cases dense moe ...] [--steps 5] [--set name=value ...] [--torch_compile true] [--profile FOLDER] [--out FILE]
    python benchmarks/gpu.py --cases llama8b --fp8_format hybrid --fp8_recipe tensorwise rowwise blockwise

Shapes: Qwen2.5-1.5B (dense), Qwen1.5-MoE-A2.7B with 4 of its 24 layers (moe), Llama-3-8B with 8 of its 32 layers (llama8b). TFLOP/s are
model FLOPs as train/flops.py counts them: recomputation is not counted. Seconds are the mean of `--steps` steps
after two that warm up (alpaca: after an epoch).
`alpaca` steps through real rows instead, two packs of 8192 tokens each step: benchmarks/gpu_rows.py says where they come from.
With `--fp8_format` each case runs in bfloat16 first and then in 8 bits, once for each recipe; blockwise takes e4m3 whatever the format.
With `--recompute_modules layernorm mlp,layernorm` each case runs once more for each list.
`--set` changes fields of EngineOptions, so that two ways to compute can be told apart. Prints one line per case, then JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import packed_batches

from megatron_swift.data.loader import collate
from megatron_swift.data.types import Batch, Sample
from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.compiled import Compile
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Mesh, start
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.train.flops import step_flops
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step

WARM_UP = 2
FULL = Recompute("full", "uniform", 1)

COMMON: dict[str, Any] = dict(
    max_position_embeddings=32768, norm_epsilon=1e-6, rope_scaling=None, qk_layernorm=False, dtype="bfloat16"
)
DENSE = ModelConfig(
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151936,
    rotary_base=1e6,
    tied_embeddings=True,
    qkv_bias=True,
    **COMMON,
)
MOE = ModelConfig(
    num_layers=4,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    num_query_groups=16,
    kv_channels=128,
    vocab_size=151936,
    rotary_base=1e6,
    tied_embeddings=False,
    qkv_bias=True,
    moe=MoEConfig(
        num_experts=60,
        topk=4,
        ffn_hidden_size=1408,
        shared_size=5632,
        pre_softmax=True,
        sparse_layers=(True,) * 4,
        aux_loss_coeff=0.001,
    ),
    **COMMON,
)
LLAMA_8B = ModelConfig(
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    rotary_base=5e5,
    tied_embeddings=False,
    qkv_bias=False,
    **COMMON,
)

# The dense model with norms of each head before the rotation; and with what Triton kernels do not cover: LayerNorm and GELU.
QWEN3 = DENSE.replace(qk_layernorm=True, qkv_bias=False)
GELU = DENSE.replace(normalization="LayerNorm", swiglu=False, ffn_hidden_size=13440, linear_bias=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One micro-batch per step. lengths: of its segments; () for packs of alpaca's rows. options: fields of EngineOptions besides the dtype."""

    model: ModelConfig
    lengths: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def ragged(total: int, *, mean: float, seed: int = 0) -> tuple[int, ...]:
    """Lengths of short conversations (log-normal, 20 to 1500 tokens) that fill a packed row of `total` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(np.clip(rng.lognormal(np.log(mean), 0.7), 20, 1500)))
    lengths[-1] -= sum(lengths) - total
    return tuple(n for n in lengths if n > 0)


CASES = {
    "dense": Case(model=DENSE, lengths=(4096,) * 4),
    "recompute": Case(model=DENSE, lengths=(4096,) * 8, options={"recompute": FULL}),
    "moe": Case(model=MOE, lengths=(4096,) * 4),
    "llama8b": Case(model=LLAMA_8B, lengths=(8192,)),
    "full8192": Case(model=DENSE, lengths=(8192,) * 2),
    "ragged8192": Case(model=DENSE, lengths=ragged(16384, mean=150.0)),
    "documents": Case(model=DENSE, lengths=(3000, 33, 4096, 700, 1200, 5000, 2355)),
    "alpaca": Case(model=DENSE, lengths=()),
    "qwen3": Case(model=QWEN3, lengths=(4096,) * 4),
    "gelu": Case(model=GELU, lengths=(4096,) * 4),
    "dense2": Case(model=DENSE, lengths=(4096,) * 2),
    "moe2": Case(model=MOE, lengths=(4096,) * 2),
}


def make_batch(lengths: tuple[int, ...], vocab_size: int) -> Batch:
    """Random tokens, all of them trained."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    return collate([Sample(ids, ids) for ids in rows], pad_to_multiple=1, pad_id=0, rows=())


def fill(engine: Engine) -> None:
    """Random weights: norms 1, biases 0, the rest of deviation 0.02."""
    torch.manual_seed(0)
    with torch.no_grad():
        for shard in engine.shards:
            if "norm" in shard.name:
                shard.master.fill_(1.0)
            elif not shard.name.endswith(".bias"):
                shard.master.normal_(std=0.02)
    engine.shards.push()


def run_case(case: Case, mesh: Mesh, *, steps: int, changes: dict[str, Any], profile: str | None) -> dict[str, Any]:
    """Build, step and measure one case."""
    options = EngineOptions(compute_dtype=torch.bfloat16, **{**case.options, **changes})
    engine = build_engine(case.model, mesh, options)
    fill(engine)
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    if case.lengths:
        batches = [make_batch(case.lengths, case.model.vocab_size)]
    else:
        batches = packed_batches(capacity=8192, packs_per_batch=2)
    turn, scale = itertools.cycle(batches), LossScale.for_dtype("bfloat16")

    def step() -> Any:
        return train_step(engine, optimizer, [next(turn)], lr=1e-4, clip_grad=1.0, loss_scale=scale)

    losses, counts = [], []
    # Every shape once: Triton compiles once more for numbers that 16 does not divide.
    warm_up = max(WARM_UP, len(batches))
    began = time.perf_counter()
    for number in range(warm_up + steps):
        if number == 1:
            first = time.perf_counter() - began
            torch.cuda.reset_peak_memory_stats()
        if number == warm_up:
            torch.cuda.synchronize()
            at = time.perf_counter()
        report = step()  # ends before the update does: the next step's forward pass is issued meanwhile, as in training
        losses.append(report.loss)
        counts.append(report.counts)
    torch.cuda.synchronize()
    took = (time.perf_counter() - at) / steps
    if profile:
        print_profile(step, profile)
    total, timed = took * steps, counts[warm_up:]
    result = {
        "seconds": round(took, 4),
        "tflops": round(sum(step_flops(case.model, c) for c in timed) / total / 1e12, 1),
        "tokens_per_second": round(sum(c.tokens for c in timed) / total),
        "trained_per_second": round(sum(c.trained for c in timed) / total),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_step_seconds": round(first, 1),
        "losses": [round(x, 4) for x in losses],
        "grad_norm": round(report.grad_norm, 4),
        "kernels": {**engine.kernels, "optimizer": optimizer.kernel},
    }
    release(engine, optimizer)
    return result


def release(engine: Engine, optimizer: Optimizer) -> None:
    """Free the memory for the next case: the hooks of gradients hold their parameters for as long as the process lives."""
    optimizer.states.clear()
    torch.compiler.reset()  # torch gives up on a function after eight graphs
    for shard in engine.shards:
        shard.narrow = shard.master.grad = None
        shard.master.data, shard.param.data = shard.master.data.new_empty(0), shard.param.data.new_empty(0)


def print_profile(step: Any, path: str) -> None:
    """The kernels of one step by their time; the whole table to `path`."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    lines = [f"{'ms':>9} {'calls':>6}  kernel   (busy {total / 1000:.1f} ms)"]
    lines += [f"{e.self_device_time_total / 1000:9.3f} {e.count:6d}  {e.key[:150]}" for e in kernels]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(line[:118] for line in lines[:24]), flush=True)


def parse_change(text: str) -> tuple[str, Any]:
    """name=value, the value as JSON where it is JSON."""
    name, _, value = text.partition("=")
    assert name in {f.name for f in dataclasses.fields(EngineOptions)}, f"EngineOptions has no {name}"
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def ways(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Changes of EngineOptions to measure each case with, by what is added to its name."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for modules in arguments.recompute_modules:
        chosen = tuple(modules.split(","))
        found[f"-again-{'-'.join(chosen)}"] = {"recompute": Recompute("selective", modules=chosen)}
    for recipe in arguments.fp8_recipe if arguments.fp8_format else ():
        kind = "e4m3" if recipe == "blockwise" else arguments.fp8_format
        for fast in (False, True) if arguments.fp8_fast_backward and recipe != "blockwise" else (False,):
            options = Fp8Options(format=kind, recipe=recipe, fast_backward=fast)
            found[f"-{kind}-{recipe}{'-fast' if fast else ''}"] = {"fp8": options}
    return found


def main() -> None:
    """Parse, measure, print and perhaps keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", nargs="*", type=parse_change, default=[], metavar="NAME=VALUE")
    parser.add_argument("--fp8_format", choices=("hybrid", "e4m3"))
    parser.add_argument(
        "--fp8_recipe", nargs="+", choices=("tensorwise", "rowwise", "blockwise"), default=["tensorwise"]
    )
    parser.add_argument("--fp8_fast_backward", action="store_true", help="the same with fast sums in the backward pass")
    parser.add_argument(
        "--recompute_modules", nargs="*", default=[], metavar="LIST", help="as in megatron sft, joined by commas"
    )
    parser.add_argument("--torch_compile", choices=("auto", "true", "false"), help="as in megatron sft")
    parser.add_argument("--profile", type=Path, help="folder for a table of one step's kernels per case")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    base = dict(arguments.set)
    if arguments.torch_compile:
        base["compile"] = Compile(arguments.torch_compile)
    mesh = start(backend="nccl", timeout_minutes=1)
    assert mesh.device.type == "cuda", "this measures a GPU; benchmarks/step.py measures a CPU"
    results: dict[str, Any] = {}
    for case, (way, fp8) in itertools.product(arguments.cases, ways(arguments).items()):
        name, changes = case + way, base | fp8
        profile = str(arguments.profile / f"{name}.txt") if arguments.profile else None
        try:
            result = run_case(CASES[case], mesh, steps=arguments.steps, changes=changes, profile=profile)
        except RuntimeError as error:  # most often of memory; the other cases are worth having all the same
            result = {"error": str(error).splitlines()[0][:160]}
        results[name] = result
        print(name, {k: v for k, v in result.items() if k != "kernels"}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "results": results,
        "changes": {k: str(v) for k, v in base.items()},
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
    }
    text = json.dumps(report, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({**report, "results": {k: v.get("kernels") for k, v in results.items()}}))


if __name__ == "__main__":
    main()
