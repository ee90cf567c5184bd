"""Whether the experts of a mixture are evenly used: figures for the log, and a warning about experts that nothing reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_swift.parallel.routers import LayerReport
from megatron_swift.utils.log import get_logger

PATIENCE = 50  # steps in a row without a token before an expert is called dead


class RouterHealth:
    """Follows the reports of a run's steps."""

    def __init__(self, patience: int = PATIENCE):
        self.patience = patience
        self.idle: dict[int, np.ndarray] = {}

    def step(self, iteration: int, reports: Sequence[LayerReport]) -> None:
        """Account for a step. A warning names each expert once, when it has got no token for `patience` steps in a row."""
        for report in reports:
            idle = self.idle.get(report.number, np.zeros(len(report.load), dtype=np.int64))
            self.idle[report.number] = idle = np.where(report.load > 0, 0, idle + 1)
            dead = np.flatnonzero(idle == self.patience)
            if len(dead):
                get_logger().warning(
                    "iteration %d: layer %d, expert%s %s: no token for %d iterations; a larger --moe_aux_loss_coeff spreads tokens better",
                    iteration,
                    report.number,
                    "s" if len(dead) > 1 else "",
                    ", ".join(map(str, dead)),
                    self.patience,
                )


def summary(reports: Sequence[LayerReport]) -> dict[str, float]:
    """Means over the layers (the busiest of all for the load), under Megatron's names where it has one."""
    if not reports:
        return {}
    values = {
        "load_balancing_loss": float(np.mean([r.balance for r in reports])),
        "z_loss": float(np.mean([r.z for r in reports])),
        "router-entropy": float(np.mean([r.entropy for r in reports])),
        "expert-load max/ideal": max(r.busiest for r in reports),
        "idle experts": float(sum(int((r.load == 0).sum()) for r in reports)),
    }
    if dropped := sum(r.dropped for r in reports):
        values["dropped tokens"] = float(dropped)
    return values


def by_layer(reports: Sequence[LayerReport]) -> dict[str, float]:
    """The same for each layer, for trackers."""
    return {
        f"moe/{what} layer {r.number}": value
        for r in reports
        for what, value in (
            ("load_balancing_loss", r.balance),
            ("z_loss", r.z),
            ("entropy", r.entropy),
            ("load max/ideal", r.busiest),
            ("idle experts", float((r.load == 0).sum())),
        )
    }
