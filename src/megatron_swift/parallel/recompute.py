"""Activation recomputation: whole layers in chunks or the first few, or the core attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.models.decoder import LayerRunner, Rotation, TransformerLayer, run_layers
from megatron_swift.models.routing import Routing


@dataclass(frozen=True)
class Recompute:
    """granularity: none, selective or full. method (full): uniform = chunks of num_layers, block = the first num_layers one by one."""

    granularity: str = "none"
    method: str | None = None
    num_layers: int | None = None


def layer_runner(options: Recompute) -> LayerRunner:
    """How the layers of a stage are run."""
    if options.granularity != "full":
        return run_layers
    assert options.num_layers is not None
    size, uniform = options.num_layers, options.method == "uniform"

    def run(
        layers: Sequence[TransformerLayer], x: Tensor, rotary: Rotation, segments: Segments, routing: Routing | None
    ) -> Tensor:
        if not x.requires_grad:
            return run_layers(layers, x, rotary, segments, routing)
        chunks = (
            [layers[i : i + size] for i in range(0, len(layers), size)] if uniform else [[y] for y in layers[:size]]
        )
        for chunk in chunks:
            x = checkpoint(run_layers, chunk, x, rotary, segments, routing, use_reentrant=False)  # type: ignore[assignment]
        return x if uniform else run_layers(layers[size:], x, rotary, segments, routing)

    return run


def recomputed_core(core: AttentionCore) -> AttentionCore:
    """The core attention, computed again in the backward pass. For kernels that keep the attention weights; fused ones do not."""

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if not q.requires_grad:
            return core(q, k, v, segments)
        return checkpoint(core, q, k, v, segments, use_reentrant=False)  # type: ignore[return-value]

    return run
