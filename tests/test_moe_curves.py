"""A Qwen3-MoE-shaped model with random weights learns real text under EP2 x PP2 to the curve of one process, through the commands.

Weights start as models do before pre-training: normal of 0.02, norms of ones. The large ones of make_tiny_model make top-k choices
so sharp that in one process, too, a router's weight changed in its last bit is 7e-3 of the loss after 15 iterations.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_swift.testing import make_tiny_model
from scripts import command, environment

pytestmark = [pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(900)]

ITERATIONS, TOLERANCE = 30, 1e-4
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "hidden_size": 128}
WATCHED = ("lm loss", "grad_norm", "load_balancing_loss", "expert-load max/ideal", "idle experts")
LAYOUT = ("--expert_model_parallel_size", "2", "--pipeline_model_parallel_size", "2")


def curve(model: Path, shared: Path, save: Path, *flags: str, ranks: int = 1) -> dict[str, list[float]]:
    """What `megatron sft` logs, by name."""
    argv = command("megatron", "sft", "--model", model, "--dataset", shared / "data" / "alpaca_en_demo.json")
    argv += ["--split_dataset_ratio", "0", "--max_length", "256", "--micro_batch_size", "2", "--global_batch_size", "8"]
    argv += ["--strict", "false", "--train_iters", str(ITERATIONS), "--lr", "1e-3", "--min_lr", "1e-4"]
    argv += ["--lr_warmup_iters", "3", "--moe_aux_loss_coeff", "0.01", "--log_interval", "1", "--num_workers", "0"]
    argv += ["--report_to", "none", "--no_save_optim", "true", "--no_save_rng", "true", "--save", str(save), *flags]
    env = environment(**({"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}))
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = save.iterdir()
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "lm loss" in line]
    return {name: [step[name] for step in steps] for name in WATCHED}


def fresh_model(folder: Path) -> Path:
    """Random weights before any training."""
    make_tiny_model(folder, family="qwen3_moe", tied=False, layers=4, **EXPERTS)
    path, rng = folder / "model.safetensors", torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones_like(old) if old.ndim == 1 else 0.02 * torch.randn(old.shape, generator=rng)
        for name, old in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_experts_and_stages_give_the_curve_of_one_process(shared, tmp_path):
    model = fresh_model(tmp_path / "model")
    alone = curve(model, shared, tmp_path / "one")
    spread = curve(model, shared, tmp_path / "four", *LAYOUT, ranks=4)
    for name in WATCHED:
        print(
            f"{name}: first and last {alone[name][0]} {alone[name][-1]}, EP2 x PP2 {spread[name][0]} {spread[name][-1]}"
        )
    assert len(alone["lm loss"]) == ITERATIONS
    assert alone["lm loss"][-1] < 0.7 * alone["lm loss"][0]  # it does learn
    np.testing.assert_allclose(spread["lm loss"], alone["lm loss"], rtol=TOLERANCE, atol=0)
    np.testing.assert_allclose(spread["grad_norm"], alone["grad_norm"], rtol=10 * TOLERANCE, atol=0)
    np.testing.assert_allclose(spread["load_balancing_loss"], alone["load_balancing_loss"], rtol=10 * TOLERANCE, atol=0)
