"""Activation recomputation: whole layers in chunks or the first few, or parts of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.models.decoder import Decoder, LayerRunner, Rotation, TransformerLayer, call, run_layers
from megatron_swift.models.moe import MoELayer
from megatron_swift.models.routing import Routing

CORE = "core_attn"


@dataclass(frozen=True)
class Recompute:
    """granularity: none, selective or full.

    method (full)       : uniform = chunks of num_layers, block = the first num_layers one by one.
    modules (selective) : core_attn, layernorm, mlp (dense ones, whole), moe_act (the activations of experts).
    """

    granularity: str = "none"
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = (CORE,)

    def has(self, module: str) -> bool:
        """Whether this part of a layer is computed again."""
        return self.granularity == "selective" and module in self.modules

    def repeats_mlps(self, *, sparse: bool) -> bool:
        """Whether all MLPs are computed again as wholes. sparse: the model has experts, whose shared ones are only repeated with their layer."""
        return self.granularity == "full" or (self.has("mlp") and not sparse)


def install(model: Decoder, options: Recompute) -> None:
    """Have the layers computed again as the options say, the core attention aside. Comes after all that exchanges modules."""
    model.run_layers = _layer_runner(options)
    norm, mlp, act = (options.has(name) for name in ("layernorm", "mlp", "moe_act"))
    for layer in model.layers:
        layer.norm_again = layer.self_attention.linear_qkv.norm_again = norm
        if isinstance(layer.mlp, MoELayer):
            layer.mlp.experts.act_again = act
            if layer.mlp.shared_experts is not None:
                layer.mlp.shared_experts.act_again = act
        else:
            # In what is repeated whole, a norm that is forgotten as well would only be kept by its neighbour's wrapping.
            layer.mlp.linear_fc1.norm_again = norm and not mlp
            layer.run_mlp = _repeated if mlp else call


def describe(options: Recompute, model: Decoder) -> str:
    """The sentence for the banner, "" where everything is kept."""
    if options.granularity == "full":
        return f"whole layers, {options.method} {options.num_layers}"
    dense = any(not isinstance(layer.mlp, MoELayer) for layer in model.layers)
    parts = {"layernorm": True, "mlp": dense, "moe_act": bool(model.sparse)}
    words = {"layernorm": "norms in front of products", "mlp": "dense MLPs", "moe_act": "activations of experts"}
    return ", ".join(words[name] for name, there in parts.items() if there and options.has(name))


def _repeated(mlp: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    if not x.requires_grad:
        return call(mlp, x, added)
    x = x + added  # one of them is kept instead of both
    return x, checkpoint(lambda x: mlp(x)[1], x, use_reentrant=False)  # type: ignore[return-value]


def _layer_runner(options: Recompute) -> LayerRunner:
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
