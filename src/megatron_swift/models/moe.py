"""Sparse layers: a router sends each token to a few experts; one more expert may be shared by all tokens.

Shapes: T tokens that this rank holds, H hidden size, E experts, k of them per token, F inner width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_swift.kernels.again import through
from megatron_swift.kernels.expert_mlp import expert_mlp
from megatron_swift.kernels.grouped_linear import GroupedLinear, looped_linear
from megatron_swift.kernels.layers import PLAIN
from megatron_swift.kernels.permute import Order, permute, sort_choices
from megatron_swift.kernels.router import Gate, Sums, plain_gate, sums_of
from megatron_swift.models import routing as rules
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.models.layers import Linear, new_parameter
from megatron_swift.models.routing import AttachLoss, LayerRecord, RouterOptions, Routing, Sharers


class Choice(NamedTuple):
    """probs [T, k]; experts int64 [T, k]; kept bool [T, k] where some choices are dropped; limit: rows to pad an expert's input to."""

    probs: Tensor
    experts: Tensor
    kept: Tensor | None = None
    limit: int | None = None


class Router(nn.Module):
    """weight [E, H]; logits are x W^T. `options`, `sharers` and the kernel `gate` are set by who builds the model for training."""

    gate: Gate

    def __init__(self, cfg: MoEConfig, hidden_size: int, number: int):
        super().__init__()
        self.cfg, self.number = cfg, number
        self.weight = new_parameter(cfg.num_experts, hidden_size)
        self.options, self.sharers, self.gate = RouterOptions(), Sharers(), plain_gate

    def forward(self, x: Tensor, routing: Routing | None) -> Choice:
        """x [T, H], real tokens only. Training losses are attached to the probabilities; what happened is recorded in `routing`."""
        cfg, options = self.cfg, self.options
        exact = options.dtype or x.dtype
        if x.dtype == torch.float64:
            exact = torch.float64
        logits = F.linear(x.to(exact), self.weight.to(exact))
        logits = logits.to(torch.promote_types(exact, torch.float32))
        trains = routing is not None and routing.scale is not None
        if options.balancing == "sinkhorn":
            probs, experts = rules.sinkhorn_route(logits, topk=cfg.topk, routing=routing, sharers=self.sharers)
            sums = sums_of(logits, experts) if trains else None
        else:
            probs, experts, sums = self.gate(logits, cfg.topk, cfg.pre_softmax, trains)
        kept = limit = None
        if options.capacity_factor is not None and routing is not None:
            limit = rules.capacity(
                routing.count, topk=cfg.topk, experts=cfg.num_experts, factor=options.capacity_factor
            )
            kept = rules.kept_within_capacity(
                probs,
                experts,
                num_experts=cfg.num_experts,
                limit=limit,
                policy=options.drop_policy,
                routing=routing,
                sharers=self.sharers,
            )
        if sums is not None:
            assert routing is not None
            probs = self._balanced(logits, probs, experts, sums, kept, routing)
        padded = min(limit, len(x)) if limit is not None and options.pad_to_capacity else None
        return Choice(probs, experts, kept, padded)

    def _balanced(
        self, logits: Tensor, probs: Tensor, experts: Tensor, sums: Sums, kept: Tensor | None, routing: Routing
    ) -> Tensor:
        """probs with the losses of this layer attached."""
        cfg, options, load = self.cfg, self.options, sums.load
        assert routing.scale is not None
        over_all = None
        if options.balancing == "seq_aux_loss":
            scores = torch.softmax(logits, -1)
            chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)
            balance = rules.sequence_balancing_loss(scores, chosen, routing, self.sharers, topk=cfg.topk)
        elif options.balancing == "global_aux_loss":
            over_all = self.sharers.everywhere(load)
            running = over_all
            for row in routing.earlier:
                before = row.records[self.number].over_all
                assert before is not None
                running = running + before
            tokens = (running.sum() / cfg.topk).clamp(min=1)
            balance = rules.balancing_loss(sums.scores, running, count=tokens, tokens=routing.count, topk=cfg.topk)
        else:
            whole, count = self.sharers.total(load), max(routing.count, 1)
            balance = rules.balancing_loss(sums.scores, whole, count=count, tokens=routing.count, topk=cfg.topk)
        z = sums.squares / max(routing.count, 1)
        dropped = load.new_zeros(()) if kept is None else (~kept).sum().to(load.dtype)
        routing.records[self.number] = LayerRecord(load, dropped, sums.entropy, balance.detach(), z.detach(), over_all)
        aux = options.aux_coeff if options.balancing.endswith("aux_loss") else 0.0
        losses = [weight * loss for weight, loss in ((aux, balance), (options.z_coeff, z)) if weight]
        if not losses:
            return probs
        return AttachLoss.apply(probs, sum(losses[1:], losses[0]), routing.scale)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """The experts of a rank. linear_fc1.weight holds each expert's 2F rows (gate, up; F rows for GELU) one after the other,
    linear_fc2.weight H rows each.

    Held as matrices, they are sharded, saved and stepped like every other parameter. `product` is the kernel.
    act_again : what the activation gives is not kept for the backward pass but computed again.
    """

    product: GroupedLinear

    def __init__(self, cfg: MoEConfig, hidden_size: int, *, swiglu: bool):
        super().__init__()
        self.number = cfg.num_experts if cfg.experts_here is None else cfg.experts_here
        self.swiglu = swiglu
        self.linear_fc1 = Linear(hidden_size, self.number * (2 if swiglu else 1) * cfg.ffn_hidden_size)
        self.linear_fc2 = Linear(cfg.ffn_hidden_size, self.number * hidden_size)
        self.product, self.kernels, self.act_again = looped_linear, PLAIN, False

    def forward(self, x: Tensor, counts: Tensor, summed: tuple[Order, Tensor] | None = None) -> Tensor:
        """x [N, H] in order of expert, counts int64 [experts of this rank] -> [N, H].

        summed : (order, probs [T, k]) of SwiGLU experts in grouped products. x [T, H] are the tokens then, and each one's answers come back
        weighted and added up, [T, H], with a third as much kept for the backward pass.
        """
        first, second = (w.weight.view(self.number, -1, w.weight.shape[1]) for w in (self.linear_fc1, self.linear_fc2))
        if summed is not None:
            order, probs = summed
            return expert_mlp(x, first, second, probs, order)
        inner = self.product(x, first, counts)
        activation = self.kernels.swiglu if self.swiglu else F.gelu
        return through(activation, lambda y: self.product(y, second, counts), inner, again=self.act_again)


# dispatch(x [T, H], choice, experts) -> [T, H], the weighted sum of each token's experts
Dispatch = Callable[[Tensor, Choice, Experts], Tensor]


def dispatch_here(x: Tensor, choice: Choice, experts: Experts) -> Tensor:
    """All experts are on this rank."""
    sent = permute(x, choice.experts, num_experts=experts.number, kept=choice.kept, limit=choice.limit)
    return sent.combine(experts(sent.x, sent.counts), choice.probs)


def dispatch_at_once(x: Tensor, choice: Choice, experts: Experts) -> Tensor:
    """`dispatch_here` for SwiGLU experts in grouped products, in one function where rows are not padded."""
    if choice.limit is not None:
        return dispatch_here(x, choice, experts)
    order = sort_choices(choice.experts, num_experts=experts.number, kept=choice.kept)
    return experts(x, order.counts, (order, choice.probs))  # type: ignore[no-any-return]


class SharedExperts(nn.Module):
    """The expert that every token goes to: a SwiGLU (or GELU) MLP times the sigmoid of x gate_weight^T, gate_weight [1, H]."""

    def __init__(self, hidden_size: int, size: int, *, swiglu: bool):
        super().__init__()
        self.swiglu = swiglu
        self.linear_fc1 = Linear(hidden_size, (2 if swiglu else 1) * size)
        self.linear_fc2 = Linear(size, hidden_size)
        self.gate_weight = new_parameter(1, hidden_size)
        self.act_again = False

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        inner, after = self.linear_fc1(x), self.linear_fc2
        forgets = (
            after.kernels.swiglu_linear is not PLAIN.swiglu_linear
        )  # the fused form keeps `inner` alone in any case
        if self.swiglu and (forgets or not self.act_again):
            y = after.after_swiglu(inner)
        else:
            y = through(after.kernels.swiglu if self.swiglu else F.gelu, after, inner, again=self.act_again)
        return y * torch.sigmoid(F.linear(x, self.gate_weight))


class MoELayer(nn.Module):
    """Router, experts and shared expert of layer `number`. `dispatch` is the seam where expert parallelism is put.

    overlap : on a GPU, compute the shared expert on a stream of its own while tokens travel to the others.
    """

    dispatch: Dispatch

    def __init__(self, cfg: ModelConfig, number: int):
        super().__init__()
        assert cfg.moe is not None
        self.router = Router(cfg.moe, cfg.hidden_size, number)
        self.experts = Experts(cfg.moe, cfg.hidden_size, swiglu=cfg.swiglu)
        size = cfg.moe.shared_size
        self.shared_experts = SharedExperts(cfg.hidden_size, size, swiglu=cfg.swiglu) if size else None
        self.dispatch, self.overlap = dispatch_here, False

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x [T, H], normalised -> [T, H]. Padding tokens get nothing from the routed experts."""
        shared = self.shared_experts
        if shared is not None and self.overlap and x.is_cuda:
            return _beside(lambda: self._routed(x, routing), lambda: shared(x), x)
        out = self._routed(x, routing)
        return out if shared is None else out + shared(x)

    def _routed(self, x: Tensor, routing: Routing | None) -> Tensor:
        index = routing.index if routing is not None else None
        real = x if index is None else x.index_select(0, index)
        out = self.dispatch(real, self.router(real, routing), self.experts)
        return out if index is None else torch.zeros_like(x).index_copy(0, index, out)


def _beside(first: Callable[[], Tensor], second: Callable[[], Tensor], x: Tensor) -> Tensor:
    """first() + second(), the second on another stream. Autograd runs each backward on the stream of its forward."""
    here, beside = torch.cuda.current_stream(x.device), _side_stream(x.device)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        other = second()
    x.record_stream(beside)
    mine = first()
    here.wait_stream(beside)
    other.record_stream(here)
    return mine + other


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
