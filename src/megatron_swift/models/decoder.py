"""A decoder, or the consecutive layers of one that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.kernels.cross_entropy import linear_cross_entropy
from megatron_swift.kernels.layers import LayerKernels
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.layers import MLP, Attention, Embedding, Linear, NormLinear, RMSNorm, Seam, identity
from megatron_swift.models.moe import Experts, MoELayer
from megatron_swift.models.rope import Rotary
from megatron_swift.models.routing import Routing

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, or experts, with residual connections. `number` counts from 0 over the whole model."""

    def __init__(self, cfg: ModelConfig, number: int):
        super().__init__()
        self.self_attention = Attention(cfg)
        # A dense MLP has its norm inside, under Megatron-Core's names; the router and all experts share one.
        self.pre_mlp_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_epsilon) if cfg.is_sparse(number) else None
        self.mlp = MoELayer(cfg, number) if cfg.is_sparse(number) else MLP(cfg)

    def forward(self, x: Tensor, rotary: Rotation, segments: Segments, routing: Routing | None = None) -> Tensor:
        """x [T, H] -> [T, H]."""
        x = x + self.self_attention(x, rotary, segments)
        if self.pre_mlp_layernorm is None:
            return x + self.mlp(x)
        return x + self.mlp(self.pre_mlp_layernorm(x), routing)


# run(layers, x [T, H], cos and sin, segments, routing) -> [T, H]
LayerRunner = Callable[[Sequence[TransformerLayer], Tensor, Rotation, Segments, Routing | None], Tensor]


def run_layers(
    layers: Sequence[TransformerLayer], x: Tensor, rotary: Rotation, segments: Segments, routing: Routing | None = None
) -> Tensor:
    """One layer after the other, keeping every activation."""
    for layer in layers:
        x = layer(x, rotary, segments, routing)
    return x


@dataclass(frozen=True)
class Row:
    """A packed row on the device.

    tokens, positions int64 [T]; segments of the row; index int64 [N]: the positions that carry loss, targets int64 [N]: what they
    must predict. Only those N positions reach the vocabulary, which is exact and saves the logits of every prompt token.
    routing: what a mixture of experts must know of the row, None for a dense model.
    """

    tokens: Tensor
    positions: Tensor
    segments: Segments
    index: Tensor
    targets: Tensor
    weights: Tensor | None = None
    routing: Routing | None = None


class Blocks(nn.Module):
    """The transformer layers by their number in the whole model, and the final norm on the last stage."""

    def __init__(self, cfg: ModelConfig, layers: range, *, last: bool):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): TransformerLayer(cfg, i) for i in layers})
        self.final_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_epsilon) if last else None


class TokenEmbedding(nn.Module):
    """Holds `word_embeddings`, for Megatron-Core's name of it."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.word_embeddings = Embedding(cfg.vocab_size, cfg.hidden_size)


class Decoder(nn.Module):
    """Layers `layers` of the model; `first` adds the token embedding, `last` the final norm and the output layer.

    Parameters are uninitialised. With tied embeddings there is no output_layer: the embedding's weight is used.
    loss_function is `kernels.cross_entropy`'s plain or chunked form.
    """

    def __init__(self, cfg: ModelConfig, layers: range | None = None, *, first: bool = True, last: bool = True):
        super().__init__()
        self.cfg, self.first, self.last = cfg, first, last
        self.rotary = Rotary(cfg)
        self.embedding = TokenEmbedding(cfg) if first or (last and cfg.tied_embeddings) else None
        self.decoder = Blocks(cfg, layers if layers is not None else range(cfg.num_layers), last=last)
        self.output_layer = Linear(cfg.hidden_size, cfg.vocab_size) if last and not cfg.tied_embeddings else None
        self.loss_function: LossFunction = linear_cross_entropy
        self.enter: Seam = identity  # before the output layer, as in NormLinear
        self.run_layers: LayerRunner = run_layers  # recomputation is put there

    @property
    def layers(self) -> list[TransformerLayer]:
        """The layers, in order."""
        return list(self.decoder.layers.values())  # type: ignore[arg-type]  # a ModuleDict does not say what it holds

    @property
    def attentions(self) -> list[Attention]:
        """The attention of each layer, in order."""
        return [layer.self_attention for layer in self.layers]

    def set_attention(self, core: AttentionCore) -> None:
        """Use one attention kernel in every layer."""
        for attention in self.attentions:
            attention.core = core

    def set_kernels(self, kernels: LayerKernels) -> None:
        """Use these forms of what lies between the matrix products, everywhere."""
        for module in self.modules():
            if isinstance(module, (RMSNorm, NormLinear, Linear, Attention, Experts)):
                module.kernels = kernels

    @property
    def sparse(self) -> list[MoELayer]:
        """The layers' mixtures of experts, in order."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]

    def hidden_states(self, x: Tensor, positions: Tensor, segments: Segments, routing: Routing | None = None) -> Tensor:
        """tokens int64 [T] (first stage) or hidden [T, H] -> hidden [T, H], normalised on the last stage."""
        if self.first:
            assert self.embedding is not None
            x = self.embedding.word_embeddings(x)
        x = self.run_layers(self.layers, x, self.rotary(positions, x.dtype), segments, routing)
        return x if self.decoder.final_layernorm is None else self.decoder.final_layernorm(x)

    def output_weight(self) -> Tensor:
        """The weight [vocabulary, H] that makes logits."""
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self.embedding is not None
        return self.embedding.word_embeddings.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, vocabulary] in the model's dtype."""
        return torch.nn.functional.linear(hidden, self.output_weight())

    def forward(self, row: Row, scale: Tensor, hidden: Tensor | None = None) -> Tensor:
        """On the last stage scale * the sum of the row's token losses, a scalar; on the others the hidden states [T, H] to hand on.

        hidden : what the previous stage handed on, None on the first. scale : a 0-dim tensor (float32; float64 for a float64 model).
        """
        x = self.hidden_states(row.tokens if hidden is None else hidden, row.positions, row.segments, row.routing)
        if not self.last:
            return x
        if row.weights is not None:
            scale = scale * row.weights
        # Without any trained token this is a zero that still depends on all that ran: every rank must run the same backward.
        return self.loss_function(self.enter(x)[row.index], self.output_weight(), row.targets, scale)


def build_decoder(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layers: range | None = None,
    first: bool = True,
    last: bool = True,
) -> Decoder:
    """A Decoder whose (uninitialised) parameters have `dtype` and live on `device`, which may be meta."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Decoder(cfg, layers, first=first, last=last)
    finally:
        torch.set_default_dtype(previous)
