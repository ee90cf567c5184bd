"""One optimizer step, from micro-batches to a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_swift.data.types import Batch
from megatron_swift.parallel.engine import Counts, Engine
from megatron_swift.parallel.routers import LayerReport
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.precision import LossScale


@dataclass(frozen=True)
class StepReport:
    """loss: mean over the global batch's trained tokens. grad_norm: before clipping. skipped: the parameters were left alone.

    routers: what the routers of each sparse layer did; empty for a dense model.
    """

    loss: float
    grad_norm: float
    counts: Counts
    loss_scale: float
    skipped: bool
    routers: tuple[LayerReport, ...] = ()


def train_step(
    engine: Engine,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    clip_grad: float,
    loss_scale: LossScale,
    iteration: int = 0,
) -> StepReport:
    """Forward, backward, clip and update.

    The divisor of the loss is the number of trained tokens of the global batch, known before any backward. When the gradient norm is
    not finite, on whatever rank the cause lies, every rank skips the update alike. iteration: from which dropout draws.
    """
    counts = engine.count(batches)
    scale = loss_scale.scale
    loss_sum = engine.forward_backward(
        batches,
        num_tokens=max(counts.trained, 1),
        num_rows=max(counts.rows, 1),
        loss_scale=scale,
        iteration=iteration,
    )
    loss, norm = loss_sum / max(counts.trained, 1), engine.shards.grad_norm()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        coefficient = clip_grad / (norm + 1e-6)
        optimizer.step(lr, scale=coefficient if clip_grad > 0 and coefficient < 1 else 1.0)
    else:
        engine.shards.drop_grads()
    loss_scale.update(overflow=not finite)
    routers = engine.routers.take() if engine.routers is not None else ()
    return StepReport(loss, norm, counts, scale, skipped=not finite, routers=routers)
