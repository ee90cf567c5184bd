"""A decoder, or the consecutive layers of one that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_swift.kernels.again import through
from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.kernels.cross_entropy import linear_cross_entropy
from megatron_swift.kernels.dropout import dropout
from megatron_swift.kernels.layers import LayerKernels, rotate
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.layers import (
    Attention,
    Embedding,
    Linear,
    NormLinear,
    RMSNorm,
    Seam,
    choose_turn,
    identity,
    make_mlp,
    make_norm,
)
from megatron_swift.models.moe import Experts, MoELayer
from megatron_swift.models.rope import Rotary
from megatron_swift.models.routing import Routing

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]


# Which dropout of the model it is: 3 of layer i from 3 * i on, and the embedding's.
_EMBEDDING, _PER_LAYER = -1, 3


def call(mlp: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(x + added, mlp of that)."""
    return mlp(x, added)  # type: ignore[no-any-return]


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, or experts, with residual connections. `number` counts from 0 over the whole model.

    hidden_dropout : the share of what attention and MLP add that is dropped, in rows that bring noise.
    norm_again     : the normalised input of experts is not kept for the backward pass but computed again.
    run_mlp        : calls a dense MLP; recomputation is put there.
    form           : calls the parts of the layer; compiled ones are put there.
    """

    form: LayerForm

    def __init__(self, cfg: ModelConfig, number: int):
        super().__init__()
        self.number, self.hidden_dropout = number, 0.0
        self.self_attention = Attention(cfg)
        # A dense MLP has its norm inside, under Megatron-Core's names; the router and all experts share one.
        self.pre_mlp_layernorm = make_norm(cfg, cfg.hidden_size) if cfg.is_sparse(number) else None
        self.mlp = MoELayer(cfg, number) if cfg.is_sparse(number) else make_mlp(cfg)
        self.norm_again, self.run_mlp, self.form = False, call, TransformerLayer.written_out

    @property
    def streams(self) -> tuple[int, int, int]:
        """The numbers of this layer's dropouts: of attention weights, after attention, after the MLP."""
        first = _PER_LAYER * self.number
        return first, first + 1, first + 2

    def forward(
        self,
        x: Tensor,
        rotary: Rotation,
        segments: Segments,
        routing: Routing | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H] -> (x, added) [T, H] each: the layer's output is their sum, as its input is the sum of the two that it gets.

        The norm that comes next adds them up: an addition of its own, and that of the gradients, would cost three passes more.
        """
        return self.form(self, x, rotary, segments, routing, added)

    def written_out(
        self, x: Tensor, rotary: Rotation, segments: Segments, routing: Routing | None, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """forward, operation by operation."""
        x, added = self.self_attention(x, rotary, segments, added)
        added = self._dropped(added, segments, self.streams[1])
        if self.pre_mlp_layernorm is None:
            x, added = self.run_mlp(self.mlp, x, added)
        elif self.norm_again:
            x = x + added
            added = through(self.pre_mlp_layernorm, lambda y: self.mlp(y, routing), x)
        else:
            x, normalised = self.pre_mlp_layernorm.after_add(x, added)
            added = self.mlp(normalised, routing)
        return x, self._dropped(added, segments, self.streams[2])

    def _dropped(self, y: Tensor, segments: Segments, stream: int) -> Tensor:
        if segments.noise is None or not self.hidden_dropout:
            return y
        return dropout(y, self.hidden_dropout, segments.noise, stream)


# form(layer, x [T, H], cos and sin, segments, routing, added) -> (x, added), which is None for nothing
LayerForm = Callable[
    [TransformerLayer, Tensor, Rotation, Segments, Routing | None, Tensor | None], tuple[Tensor, Tensor | None]
]
# run(layers, x [T, H], cos and sin, segments, routing) -> [T, H]
LayerRunner = Callable[[Sequence[TransformerLayer], Tensor, Rotation, Segments, Routing | None], Tensor]


def run_layers(
    layers: Sequence[TransformerLayer], x: Tensor, rotary: Rotation, segments: Segments, routing: Routing | None = None
) -> Tensor:
    """One layer after the other, keeping every activation."""
    added = None
    for layer in layers:
        x, added = layer(x, rotary, segments, routing, added)
    return x if added is None else x + added


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
        self.final_layernorm = make_norm(cfg, cfg.hidden_size) if last else None


class TokenEmbedding(nn.Module):
    """`word_embeddings` and, where positions are learned and this is the first stage, `position_embeddings`.

    `own` takes out of a tensor of a row's tokens those whose hidden states this rank holds.
    """

    own: Seam

    def __init__(self, cfg: ModelConfig, *, first: bool):
        super().__init__()
        self.word_embeddings = Embedding(cfg.vocab_size, cfg.hidden_size)
        learned = first and cfg.position_embedding_type == "learned_absolute"
        self.position_embeddings = Embedding(cfg.max_position_embeddings, cfg.hidden_size) if learned else None
        self.own = identity

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions int64 [T] -> [T, H]."""
        x = self.word_embeddings(tokens)
        if self.position_embeddings is None:
            return x  # type: ignore[no-any-return]
        # Padding of a segment to a multiple (context parallelism) may lie beyond the last position.
        known = positions.clamp(max=len(self.position_embeddings.weight) - 1)
        return x + self.position_embeddings(self.own(known))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Layers `layers` of the model; `first` adds the token embedding, `last` the final norm and the output layer.

    Parameters are uninitialised. With tied embeddings there is no output_layer: the embedding's weight is used.
    loss_function is `kernels.cross_entropy`'s plain or chunked form.
    """

    def __init__(self, cfg: ModelConfig, layers: range | None = None, *, first: bool = True, last: bool = True):
        super().__init__()
        self.cfg, self.first, self.last = cfg, first, last
        self.rotary = Rotary(cfg)
        self.embedding = TokenEmbedding(cfg, first=first) if first or (last and cfg.tied_embeddings) else None
        self.decoder = Blocks(cfg, layers if layers is not None else range(cfg.num_layers), last=last)
        self.output_layer = Linear(cfg.hidden_size, cfg.vocab_size) if last and not cfg.tied_embeddings else None
        self.loss_function: LossFunction = linear_cross_entropy
        self.enter: Seam = identity  # before the output layer, as in NormLinear
        self.run_layers: LayerRunner = run_layers  # recomputation is put there
        self.hidden_dropout = 0.0

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

    def set_hidden_dropout(self, p: float) -> None:
        """Drop a share of the embeddings and of what each layer adds, in rows that bring noise."""
        self.hidden_dropout = p
        for layer in self.layers:
            layer.hidden_dropout = p

    def set_kernels(self, kernels: LayerKernels) -> None:
        """Use these forms of what lies between the matrix products, everywhere."""
        for module in self.modules():
            if isinstance(module, (RMSNorm, NormLinear, Linear, Attention, Experts)):
                module.kernels = kernels

    def change_linears(self, change: Callable[[LayerKernels], LayerKernels]) -> None:
        """Other kernels for the linear layers of attention, dense MLPs and shared experts; `set_kernels` comes before.

        Not for routers and their experts, gates, embeddings and the output layer.
        """
        for layer in self.layers:
            mlp = layer.mlp.shared_experts if isinstance(layer.mlp, MoELayer) else layer.mlp
            for part in (layer.self_attention, mlp):
                for module in part.modules() if part is not None else ():
                    if isinstance(module, (Linear, NormLinear)):
                        module.kernels = change(module.kernels)

    @property
    def fusible(self) -> set[str]:
        """What of this model has the form that `kernels.layers` has kernels for, under its names."""
        cfg = self.cfg
        rms = cfg.normalization == "RMSNorm"
        whole = choose_turn(cfg) is rotate and (rms or not cfg.qk_layernorm)
        there = {"norm": rms, "rope": whole, "swiglu": cfg.swiglu}
        return {name for name, is_there in there.items() if is_there}

    @property
    def sparse(self) -> list[MoELayer]:
        """The layers' mixtures of experts, in order."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]

    def hidden_states(self, x: Tensor, positions: Tensor, segments: Segments, routing: Routing | None = None) -> Tensor:
        """tokens int64 [T] (first stage) or hidden [T, H] -> hidden [T, H], normalised on the last stage."""
        if self.first:
            assert self.embedding is not None
            x = self.embedding(x, positions)
            if segments.noise is not None and self.hidden_dropout:
                x = dropout(x, self.hidden_dropout, segments.noise, _EMBEDDING)
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
