"""One optimizer step, from micro-batches to a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_swift.data.types import Batch
from megatron_swift.parallel.engine import Counts, Engine
from megatron_swift.parallel.routers import LayerReport
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.precision import LossScale

EPSILON = 1e-6  # added to the norm that divides, as Megatron and torch do


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
    scale, trained = loss_scale.scale, max(counts.trained, 1)
    loss_sum = engine.forward_backward(
        batches,
        num_tokens=trained,
        num_rows=max(counts.rows, 1),
        loss_scale=scale,
        iteration=iteration,
    )
    loss_and_norm = torch.stack((loss_sum / trained, engine.shards.grad_norm()))
    routed = [engine.routers.take().flatten()] if engine.routers is not None else []
    read = read_later(torch.cat([loss_and_norm, *routed]))
    if optimizer.scale_on_device:  # the update is on its way before the host waits for what it reports
        optimizer.step(lr, scale=clip_on_device(loss_and_norm, clip_grad))
    values = read()
    loss, norm = (float(value) for value in values[:2])
    finite = math.isfinite(norm) and math.isfinite(loss)
    if optimizer.scale_on_device:
        if not finite:
            optimizer.take_back()
    elif finite:
        coefficient = clip_grad / (norm + EPSILON)
        optimizer.step(lr, scale=coefficient if clip_grad > 0 and coefficient < 1 else 1.0)
    else:
        engine.shards.drop_grads()
    loss_scale.update(overflow=not finite)
    routers = engine.routers.reports(values[2:]) if engine.routers is not None else ()
    return StepReport(loss, norm, counts, scale, skipped=not finite, routers=routers)


def clip_on_device(loss_and_norm: Tensor, clip_grad: float) -> Tensor:
    """What gradients are multiplied by, 0-dim float32: at most 1, and NaN where loss or norm is not finite. 0 for clip_grad: no clip."""
    scale = torch.ones_like(loss_and_norm[1])
    if clip_grad > 0:
        scale = (clip_grad / (loss_and_norm[1] + EPSILON)).clamp(max=1.0)
    return torch.where(loss_and_norm.isfinite().all(), scale, math.nan).float()


def read_later(values: Tensor) -> Callable[[], np.ndarray]:
    """A function that gives the values once they are computed, without waiting for what is issued to the device after this call."""
    if not values.is_cuda:
        return values.numpy
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def read() -> np.ndarray:
        there.synchronize()
        return host.numpy().copy()

    return read
