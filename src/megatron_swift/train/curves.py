"""Curves as PNG files, one for each scalar, when matplotlib is installed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_swift.utils.log import get_logger


def draw_curves(folder: Path, history: Mapping[str, Sequence[tuple[int, float]]]) -> list[Path]:
    """Write `folder/<name>.png` for each scalar with at least two points; returns the files.

    Without matplotlib says how to get it. A disk that cannot take a picture is a warning: the training is done and saved by then.
    """
    series = {name: points for name, points in history.items() if len(points) > 1}
    if not series:
        return []
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        get_logger().warning("no curves are drawn: matplotlib is not installed (pip install 'megatron-swift[plots]')")
        return []
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, points in series.items():
            path = folder / (re.sub(r"[^A-Za-z0-9]+", "_", name) + ".png")
            _draw(path, name, points)
            files.append(path)
    except OSError as error:
        get_logger().warning("no curves are drawn: cannot write to %s: %s", folder, error.strerror)
    return files


def _draw(path: Path, name: str, points: Sequence[tuple[int, float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    steps, values = zip(*points, strict=True)
    smooth = _smoothed(values)
    axes.plot(steps, values, color="tab:blue", alpha=0.35 if smooth else 1.0)
    if smooth:
        axes.plot(steps, smooth, color="tab:blue")
    axes.set_xlabel("iteration")
    axes.set_title(name)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def _smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """An exponential average, bias-corrected; empty for short series, where it would only hide points."""
    if len(values) < 50:
        return []
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out
