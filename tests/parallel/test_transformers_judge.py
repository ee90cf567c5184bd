"""transformers as a judge: 20 AdamW steps on 8 ranks follow a plain transformers loop, which shares no code with the engine.

The loop computes sequence by sequence with torch's own clip and AdamW; the ranks hold tensor, pipeline and context parts of packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data_parallel import CLIP, OPTIMIZER
from test_layouts import SP

from megatron_swift.data.loader import collate
from megatron_swift.data.types import IGNORE, Sample
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.precision import LossScale
from megatron_swift.train.step import train_step
from tiny_models import make_engine, random_samples

STEPS, LR, TOLERANCE = 20, 1e-3, 1e-4
# The vocabulary, tied and untied, is not divided by tp, and three layers not by pp.
MODELS = {
    "qwen3": {"tied": True, "layers": 3, "vocab_size": 263, "hidden_size": 32, "head_dim": 8},
    "llama": {"tied": False, "layers": 3, "vocab_size": 263, "hidden_size": 32},
}
Steps = Sequence[Sequence[Sequence[Sample]]]


def packed_steps() -> Steps:
    """[step][micro-batch][sample]: three global batches again and again, so that there is something to learn. Ragged; a step trains
    few, many or nearly all of its tokens."""
    rng = np.random.default_rng(8)
    batches = [
        [random_samples(rng, rng.integers(2, 40, rng.integers(1, 5)), trained=t) for t in trained]
        for trained in ((0.1, 1.0, 0.0), (0.9, 0.8, 1.0), (0.02, 0.3, 0.5))
    ]
    return [batches[step % len(batches)] for step in range(STEPS)]


def on_rank(
    rank: int, folder: Path, steps: Steps, sizes: Sizes, options: dict, *, lr: float, decay_all: bool = False
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of training on this rank. decay_all: weight decay reaches norms and biases too."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    engine = make_engine(folder, torch.float32, mesh, **options)
    optimizer, scale = Optimizer(engine.shards, OPTIMIZER), LossScale.for_dtype("float32")
    if decay_all:
        optimizer.decays = dict.fromkeys(optimizer.decays, OPTIMIZER.weight_decay)
    multiples = {"pad_to_multiple": engine.row_multiple, "segment_multiple": engine.segment_multiple}
    losses, norms = [], []
    for step in steps:
        batches = [collate(m, pad_id=0, rows=(), **multiples) for m in step[mesh.dp_rank :: mesh.dp_size]]
        report = train_step(engine, optimizer, batches, lr=lr, clip_grad=CLIP, loss_scale=scale)
        losses.append(report.loss)
        norms.append(report.grad_norm)
    mesh_module.stop()
    return losses, norms


def by_transformers(folder: Path, steps: Steps, *, lr: float) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the plain loop."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    losses, norms = [], []
    for step in steps:
        samples = [sample for micro in step for sample in micro]
        tokens = sum(int((s.labels[1:] != IGNORE).sum()) for s in samples)
        total = torch.zeros(())
        for sample in samples:
            ids, labels = (torch.from_numpy(x.astype(np.int64)) for x in sample[:2])
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        (total / tokens).backward()
        losses.append(float(total.detach()) / tokens)
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("family", MODELS)
def test_eight_ranks_follow_transformers(family, tmp_path):
    folder, steps = make_tiny_model(tmp_path, family=family, **MODELS[family]), packed_steps()
    losses, norms = by_transformers(folder, steps, lr=LR)
    assert losses[-1] < losses[STEPS % 3 - 1] - 0.5, f"nothing was learnt: {losses}"
    assert max(norms) > CLIP, "the clip was never at work"
    sizes = Sizes(tp=2, pp=2, cp=2)
    for found in run_ranks(lambda rank: on_rank(rank, folder, steps, sizes, SP, lr=LR), 8):
        np.testing.assert_allclose(found[0], losses, rtol=TOLERANCE, atol=0)
        np.testing.assert_allclose(found[1], norms, rtol=10 * TOLERANCE, atol=0)


def test_the_judge_sees_a_wrong_rate(tmp_path):
    """Two per cent of the learning rate are outside the tolerance: the comparison is not blind."""
    folder, steps = make_tiny_model(tmp_path, family="qwen3", **MODELS["qwen3"]), packed_steps()
    right, wrong = (by_transformers(folder, steps, lr=lr)[0] for lr in (LR, 1.02 * LR))
    assert not np.allclose(right, wrong, rtol=TOLERANCE, atol=0)
