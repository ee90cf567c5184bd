"""How long samples are: a histogram as text, and as a picture where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_swift.utils.errors import StorageError, UsageError

_BAR = 40  # characters of the longest bar
_STEPS = (1, 2, 5)


class Bin(NamedTuple):
    """`samples` samples have from `first` to `last` tokens."""

    first: int
    last: int
    samples: int


def bins(lengths: np.ndarray, *, at_most: int = 12) -> list[Bin]:
    """The lengths in at most `at_most` bins of one round width (1, 2, 5, 10, 20 ...), empty ones between included.

    lengths : int [samples], in tokens.
    """
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = next(
        step * 10**power
        for power in range(20)
        for step in _STEPS
        if high // (step * 10**power) - low // (step * 10**power) < at_most
    )
    start = low // width * width
    counts = np.bincount((lengths - start) // width).tolist()
    return [Bin(start + n * width, start + (n + 1) * width - 1, count) for n, count in enumerate(counts)]


def text_histogram(lengths: np.ndarray, *, max_length: int | None = None) -> str:
    """The histogram, a line for each bin, with the longest bar _BAR characters wide; a rule after the bin of max_length."""
    found = bins(lengths)
    if not found:
        return "no samples"
    most, digits = max(one.samples for one in found), len(str(found[-1].last))
    lines = [f"{'tokens':>{2 * digits + 1}}  samples"]
    for one in found:
        full, rest = divmod(one.samples * _BAR * 8, most * 8)
        bar = "█" * full + (" ▏▎▍▌▋▊▉"[rest * 8 // (most * 8)] if rest else "")
        name = (
            f"{one.first:>{digits}}-{one.last:<{digits}}" if one.first < one.last else f"{one.first:>{2 * digits + 1}}"
        )
        lines.append(f"{name}  {one.samples:>7} {bar}".rstrip())
        if max_length is not None and one.first <= max_length <= one.last:
            lines[-1] += f"   (max_length {max_length})"
    return "\n".join(lines)


def draw_histogram(path: Path, lengths: np.ndarray, *, title: str, max_length: int | None = None) -> None:
    """Write the histogram as a PNG file, its folder made where there is none.

    lengths : int [samples], in tokens. UsageError where matplotlib is missing, StorageError where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"--histogram_png {path} needs matplotlib", do="pip install 'megatron-swift[plots]', or leave it out"
        ) from error
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=min(100, max(1, len(set(lengths.tolist())))), color="tab:blue")
    if max_length is not None and len(lengths) and max_length <= 2 * int(lengths.max()):
        axes.axvline(max_length, color="tab:red", linestyle="--", label=f"max_length {max_length}")
        axes.legend()
    axes.set_xlabel("tokens")
    axes.set_ylabel("samples")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(path))
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", do="choose another file for --histogram_png"
        ) from None
