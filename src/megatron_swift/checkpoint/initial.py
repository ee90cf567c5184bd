"""Initial weights as Megatron-LM draws them, for training from scratch: a source of weights like a folder, but without files."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megatron_swift.checkpoint.layout import TensorSpec

_CHUNK = 1 << 16  # values that are drawn together
_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")  # what is added to the residual stream


class InitialWeights:
    """Norms are 1 and biases 0; matrices are normal with standard deviation `std`, those added to the residual stream std / sqrt(2 L).

    Each value is a pure function of (seed, parameter name, row, column): what a rank draws of its rows is the same under every layout.
    Always drawn on the CPU, in float32.
    """

    def __init__(self, *, num_layers: int, seed: int, std: float):
        self.seed, self.std = seed, std
        self.output_std = std / math.sqrt(2 * num_layers)

    def read(
        self, spec: TensorSpec, start: int = 0, stop: int | None = None, *, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows [start, stop), columns [columns) of a parameter, float32."""
        stop = spec.shape[0] if stop is None else stop
        where = slice(None) if columns is None else slice(*columns)
        if len(spec.shape) == 1:
            return torch.full((stop - start,), 0.0 if spec.name.endswith("bias") else 1.0)
        rows, width = max(_CHUNK // spec.shape[1], 1), spec.shape[1]
        out = torch.empty(stop - start, len(range(width)[where]))
        for chunk in range(start // rows, -(-stop // rows)):
            first, last = max(start, chunk * rows), min(stop, (chunk + 1) * rows)
            if first < last:
                drawn = self._draw(spec.name, chunk, rows * width).reshape(rows, width)
                out[first - start : last - start] = drawn[first - chunk * rows : last - chunk * rows, where]
        return out.mul_(self.output_std if spec.name.endswith(_OUTPUTS) else self.std)

    def _draw(self, name: str, chunk: int, count: int) -> Tensor:
        key = hashlib.sha256(f"{self.seed} {chunk} {name}".encode()).digest()
        return torch.randn(count, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "little")))
