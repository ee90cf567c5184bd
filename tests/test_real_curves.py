"""A real model on real data: the commands under tensor, pipeline and context parallelism log the one-process loss curve.

SmolLM2-135M-Instruct, as examples/fetch_smollm2.py leaves it; SMOLLM2 names its folder. Minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from scripts import command, environment

pytestmark = [pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(900)]

MODEL = Path(os.environ.get("SMOLLM2", "/tmp/smollm2"))
ITERATIONS, TOLERANCE = 6, 1e-4
LAYOUTS = {
    "tp3": (3, "--tensor_model_parallel_size", "3", "--sequence_parallel", "true"),  # nine heads, three groups
    "pp2": (2, "--pipeline_model_parallel_size", "2"),
    "cp2": (2, "--context_parallel_size", "2"),
}


def curve(folder: Path, shared: Path, *flags: str, ranks: int = 1) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) that `megatron sft` logs."""
    data = [str(shared / "data" / f"alpaca_{language}_demo.json") + "#30" for language in ("en", "zh")]
    argv = command("megatron", "sft", "--model", MODEL, "--torch_dtype", "float32", "--dataset", *data)
    argv += ["--split_dataset_ratio", "0", "--max_length", "512", "--micro_batch_size", "2", "--global_batch_size", "4"]
    argv += ["--train_iters", str(ITERATIONS), "--lr", "1e-4", "--lr_warmup_iters", "2", "--log_interval", "1"]
    argv += ["--num_workers", "0", "--report_to", "none", "--no_save_optim", "true", "--no_save_rng", "true"]
    argv += ["--save", str(folder), *flags]
    env = environment(**({"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}))
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.iterdir()
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(folder)  # half a gigabyte of weights
    steps = [line for line in lines if "lm loss" in line]
    return [step["lm loss"] for step in steps], [step["grad_norm"] for step in steps]


@pytest.fixture(scope="module")
def expected(shared, tmp_path_factory) -> tuple[list[float], list[float]]:
    """The curve of one process."""
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip(f"{MODEL} is absent: python examples/fetch_smollm2.py {MODEL}")
    losses, norms = curve(tmp_path_factory.mktemp("one") / "run", shared)
    print(f"one process: losses {losses}, gradient norms {norms}")
    assert len(losses) == ITERATIONS and len(set(losses)) == ITERATIONS
    return losses, norms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_curve_of_one_process(layout, expected, shared, tmp_path):
    ranks, *flags = LAYOUTS[layout]
    losses, norms = curve(tmp_path / "run", shared, *flags, ranks=ranks)
    print(f"{layout}: losses {losses}, gradient norms {norms}")
    np.testing.assert_allclose(losses, expected[0], rtol=TOLERANCE, atol=0)
    np.testing.assert_allclose(norms, expected[1], rtol=TOLERANCE, atol=0)
