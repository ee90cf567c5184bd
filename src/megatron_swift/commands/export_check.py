"""`--test_convert_precision`: the converted model against its source, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_swift.checkpoint.load import load_decoder
from megatron_swift.checkpoint.weights import WeightSource
from megatron_swift.commands.export import QUESTION
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder
from megatron_swift.utils.errors import CheckpointError

LARGEST_MEAN = 0.1  # of |difference of logits|, as in Megatron-SWIFT


@dataclass(frozen=True)
class Precision:
    """Of all logits of some tokens. source, converted : the likeliest token behind each of them."""

    mean_diff: float
    max_diff: float
    source: tuple[int, ...]
    converted: tuple[int, ...]

    @property
    def same(self) -> int:
        """At how many positions both find the same token the likeliest."""
        return sum(a == b for a, b in zip(self.source, self.converted, strict=True))

    def table(self) -> str:
        """What the user sees."""
        rows = [
            ("mean_diff", f"{self.mean_diff:.3e}", f"must be below {LARGEST_MEAN}"),
            ("max_diff", f"{self.max_diff:.3e}", ""),
            ("same arg-max", f"{self.same} of {len(self.source)}", "must be all"),
        ]
        head = f"logits of {QUESTION!r} ({len(self.source)} tokens), source and converted model in float32:"
        return "\n".join([head, *(f"  {a:14s}{b:>12s}  {c}".rstrip() for a, b, c in rows)])

    def check(self) -> None:
        """Raise CheckpointError where the models differ by more than rounding."""
        if self.mean_diff < LARGEST_MEAN and self.same == len(self.source):
            return
        wrong = [
            f"position {i}: token {a} and {b}"
            for i, (a, b) in enumerate(zip(self.source, self.converted, strict=True))
            if a != b
        ]
        raise CheckpointError(
            "the converted model does not compute what its source does",
            why=f"mean_diff {self.mean_diff:.3e}, max_diff {self.max_diff:.3e}; arg-max: {'; '.join(wrong[:5]) or 'the same'}",
            do="look at --torch_dtype; with the stored type a conversion is exact",
        )


def compare(source: WeightSource, converted: WeightSource, cfg: ModelConfig, ids: Sequence[int]) -> Precision:
    """Both models' logits on the CPU in float32, one model in memory at a time."""
    first, second = (_logits(weights, cfg, ids) for weights in (source, converted))
    difference = (first - second).abs().double()
    return Precision(
        difference.mean().item(),
        difference.max().item(),
        tuple(first.argmax(-1).tolist()),
        tuple(second.argmax(-1).tolist()),
    )


def _logits(weights: WeightSource, cfg: ModelConfig, ids: Sequence[int]) -> Tensor:
    cpu = torch.device("cpu")
    model: Decoder = load_decoder(weights, cfg, dtype=torch.float32, device=cpu)
    positions = torch.arange(len(ids))
    with torch.no_grad():
        return model.logits(model.hidden_states(torch.tensor(ids), positions, Segments.of([len(ids)], cpu)))
