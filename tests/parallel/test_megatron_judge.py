"""Megatron-Core itself as a judge: its schedules, DistributedDataParallel and (distributed) optimizer train the same rows on a CPU.

../shared/oracle/mcore_oracle.py runs it, with the interpreter that MCORE_PYTHON names (docs/parallelism.md says how to make one).
It has no context parallelism on a CPU, and one row length per step where there is a pipeline.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_data_parallel import CLIP, LR, OPTIMIZER
from test_layouts import SP
from test_transformers_judge import on_rank

from megatron_swift.data.types import IGNORE, Sample
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from scripts import environment
from tiny_models import random_samples

pytestmark = [pytest.mark.slow, pytest.mark.shared]

STEPS, ROWS, VOCAB, TOLERANCE = 10, 4, 448, 1e-5
MODELS = {"qwen2": True, "qwen3": True, "llama": False}  # family -> tied
# name -> Megatron-Core's flags; our ranks, sizes and options
LAYOUTS = {
    "one": ([], 1, Sizes(), {}),
    "tp2-sp": (["--tp", "2", "--sp"], 2, Sizes(tp=2), SP),
    "dp2-optim": (["--dp", "2", "--dist-opt"], 2, Sizes(), {}),
    "tp2-pp2": (["--tp", "2", "--pp", "2"], 4, Sizes(tp=2, pp=2), {}),
}


@pytest.fixture(scope="module")
def megatron(shared):
    """train(folder, rows file, flags) -> (losses, gradient norms), by Megatron-Core."""
    python = os.environ.get("MCORE_PYTHON")
    if not python:
        pytest.skip("MCORE_PYTHON does not name the Python of an environment with megatron-core (docs/parallelism.md)")

    def train(folder: Path, rows: Path, flags: list[str]) -> tuple[list[float], list[float]]:
        settings = {"steps": STEPS, "gbs": ROWS, "lr": LR, "wd": OPTIMIZER.weight_decay, "clip": CLIP}
        out = rows.with_suffix(".losses.json")
        argv = [python, shared / "oracle" / "mcore_oracle.py", "train", "--per-token", "--hf", folder, "--data", rows]
        argv += ["--out", out, *flags, *(word for name, value in settings.items() for word in (f"--{name}", value))]
        argv = [str(word) for word in argv]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        steps = json.loads(out.read_text(encoding="utf-8"))
        assert len(steps) == STEPS
        return [step["loss"] for step in steps], [step["grad_norm"] for step in steps]

    return train


@pytest.fixture(scope="module")
def steps() -> list[list[Sample]]:
    """[step][row]: two global batches in turn, rows of one length per step, trained from one token to all of them."""
    rng = np.random.default_rng(21)
    shares = (0.05, 1.0, 0.4, 0.8)
    batches = [
        [random_samples(rng, [length], trained=share, vocab_size=VOCAB)[0] for share in shares] for length in (40, 24)
    ]
    return [batches[step % len(batches)] for step in range(STEPS)]


def write_rows(path: Path, steps: list[list[Sample]]) -> Path:
    """For Megatron-Core, which wants shifted labels."""
    rows = [
        {"input_ids": row.ids.tolist(), "labels": [*row.labels[1:].tolist(), IGNORE]} for step in steps for row in step
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MODELS)
def test_losses_are_megatrons(megatron, steps, family, layout, tmp_path):
    """Two rows make a packed micro-batch here; Megatron-Core has one in each. It is Megatron's scheduler of rates that spares norms and
    biases from weight decay, and the judge runs without one: it decays everything."""
    flags, ranks, sizes, options = LAYOUTS[layout]
    folder = make_tiny_model(tmp_path / "model", family=family, tied=MODELS[family], layers=4, vocab_size=VOCAB)
    losses, norms = megatron(folder, write_rows(tmp_path / "rows.jsonl", steps), flags)
    assert losses[-2] < losses[0] - 0.5, f"Megatron-Core learnt nothing: {losses}"
    packed = [[step[:2], step[2:]] for step in steps]
    for ours in run_ranks(lambda rank: on_rank(rank, folder, packed, sizes, options, lr=LR, decay_all=True), ranks):
        differences = [float(np.abs(np.divide(*pair) - 1).max()) for pair in zip(ours, (losses, norms), strict=True)]
        print(
            f"{family} {layout}: loss {losses[0]:.6f} -> {losses[-1]:.6f}, largest relative differences {differences}"
        )
        assert differences[0] < TOLERANCE and differences[1] < 10 * TOLERANCE, (ours, losses, norms)
