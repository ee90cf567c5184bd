"""The learning rate as a pure function of the number of completed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0, then decay from `lr` to `min_lr`. Counts are optimizer steps; style is cosine, linear or constant."""

    lr: float
    min_lr: float
    style: str
    warmup_iters: int
    decay_iters: int

    def at(self, completed: int) -> float:
        """The rate of the step that follows `completed` (not skipped) steps.

        Source: Megatron's optimizer_param_scheduler, spec section 2.2; the first step of a warm-up has rate 0.
        """
        if self.warmup_iters > 0 and completed <= self.warmup_iters:
            return self.lr * completed / self.warmup_iters
        if self.style == "constant":
            return self.lr
        if completed > self.decay_iters:
            return self.min_lr
        progress = (completed - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        weight = 1.0 - progress if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr + (self.lr - self.min_lr) * weight
