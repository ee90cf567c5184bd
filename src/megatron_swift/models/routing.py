"""Which experts a token goes to, and the losses that keep experts evenly used: the formulas of Megatron-Core's router.

T real tokens of a row (padding is never routed), E experts, k of them for each token. "Row" is a micro-batch: all of its tokens count,
also those that other tensor- or context-parallel ranks hold, so that no loss and no choice depends on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How tokens are routed in training.

    balancing       : one of BALANCING.  aux_coeff, z_coeff: weights of the balancing loss and of the z-loss, 0 for none.
    capacity_factor : an expert takes at most ceil(T k / E * factor) tokens of a row; None: all that come.
    drop_policy     : which of them stay: the most "probs"able, or the first by "position".
    pad_to_capacity : fill every expert's input up with zeros, so that its shape does not depend on the routing.
    dtype           : of the router's matrix product and softmax; None: the model's.  Never below the exact type in float64 models.
    """

    balancing: str = "none"
    aux_coeff: float = 0.0
    z_coeff: float = 0.0
    capacity_factor: float | None = None
    drop_policy: str = "probs"
    pad_to_capacity: bool = False
    dtype: torch.dtype | None = torch.float32


def alone(x: Tensor) -> Tensor:
    """x: what the ranks that share a row have between them, where there is one such rank."""
    return x


@dataclass(frozen=True)
class Sharers:
    """Collectives without gradient over ranks that see parts of the same tokens.

    total : the sum over the ranks that share a row.  gather: [n, ...] of each of them -> [ranks * n, ...], ordered by rank.
    rank  : my place in that order.  everywhere: the sum over all ranks that hold this layer, of every data-parallel rank.
    """

    total: Callable[[Tensor], Tensor] = alone
    gather: Callable[[Tensor], Tensor] = alone
    rank: int = 0
    everywhere: Callable[[Tensor], Tensor] = alone


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did with this rank's tokens of one row, for the log; nothing of it carries a gradient.

    load     : [E], tokens sent to each expert, dropped ones too.  dropped: 0-dim, how many were dropped.
    entropy  : 0-dim, the sum over tokens of the entropy of their probabilities.
    balance, z : 0-dim, this rank's share of the balancing loss and of the z-loss, without their weights.
    over_all : [E], the load over all data-parallel ranks; only for global_aux_loss.
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    balance: Tensor
    z: Tensor
    over_all: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """What routers need to know of a row.

    index    : int64 [N], this rank's real tokens among those it holds; None where all of them are.
    place    : int64 [N], where those lie in the whole row.  sequence: int64 [N], the number of their segment.
    lengths  : [S], real tokens of each segment of the whole row.  count: their sum.
    scale    : 0-dim, what the gradient of a loss of 1 is multiplied by; None where nothing is trained.
    records  : by layer, filled by the routers. Recomputation writes the same again, so nothing counts twice.
    earlier  : the rows of this step before this one, for global_aux_loss.
    """

    index: Tensor | None
    place: Tensor
    sequence: Tensor
    lengths: Tensor
    count: int
    scale: Tensor | None = None
    earlier: Sequence[Routing] = ()
    records: dict[int, LayerRecord] = field(default_factory=dict)


def sinkhorn_route(logits: Tensor, *, topk: int, routing: Routing | None, sharers: Sharers) -> tuple[Tensor, Tensor]:
    """Experts chosen on the Sinkhorn-normalised logits of the whole row (in training), weighted by the plain probabilities.

    Weights are a sigmoid for one expert per token, else the softmax over all experts, not renormalised (Megatron-Core's
    `sinkhorn` load balancing). In evaluation the choice is the plain top-k.
    """
    scores = torch.sigmoid(logits) if topk == 1 else torch.softmax(logits, -1)
    if routing is None or routing.scale is None:
        return scores.topk(topk, dim=-1)  # type: ignore[return-value]
    with torch.no_grad():
        whole, mine = _whole_row(logits.detach().exp(), routing, sharers)
        experts = sinkhorn(whole, routing.count)[mine].topk(topk, dim=-1).indices
    return scores.gather(-1, experts), experts


def sinkhorn(cost: Tensor, count: int, *, tolerance: float = 1e-4, passes: int = 100) -> Tensor:
    """Rows of sum 1/count and columns of sum 1/E, by alternate scaling until the column factors change by less than the tolerance.

    cost [T, E], positive; rows of zeros (of no token) stay zeros. Sinkhorn & Knopp 1967, with Megatron-Core's stopping rule, and an end
    after `passes`: where an expert's logits lie some 6 below the others', its factor is so large that rounding keeps it moving for ever.
    """
    tiny = 1e-8
    columns = rows = cost.new_ones(cost.shape[1])
    for _ in range(passes):
        rows = 1 / (max(count, 1) * (cost @ columns + tiny))
        new = 1 / (cost.shape[1] * (rows @ cost + tiny))
        change = (columns - new).abs().mean()
        columns = new
        if not change > tolerance:  # on a GPU each pass waits for this number
            break
    return columns * cost * rows[:, None]


def _whole_row(values: Tensor, routing: Routing, sharers: Sharers) -> tuple[Tensor, Tensor]:
    """(values [count, ...] of all ranks that share the row in the row's own order, where this rank's own [N] lie among them)."""
    if sharers.gather is alone:
        return values, torch.arange(len(values), device=values.device)
    sizes = sharers.gather(torch.tensor([len(values)], device=values.device))
    longest = int(sizes.max())
    padded = values.new_zeros((longest, *values.shape[1:]))
    padded[: len(values)] = values
    places = routing.place.new_full((longest,), torch.iinfo(torch.int64).max)
    places[: len(values)] = routing.place
    order = sharers.gather(places).argsort(stable=True)[: routing.count]
    whole = sharers.gather(padded)[order]
    back = torch.empty(len(sizes) * longest, dtype=torch.int64, device=values.device)
    back[order] = torch.arange(len(order), device=values.device)
    first = sharers.rank * longest
    return whole, back[first : first + len(values)]


def capacity(count: int, *, topk: int, experts: int, factor: float) -> int:
    """Tokens of a row that an expert takes at most."""
    return max(math.ceil(count * topk / experts * factor), 1)


def kept_within_capacity(
    probs: Tensor, experts: Tensor, *, num_experts: int, limit: int, policy: str, routing: Routing, sharers: Sharers
) -> Tensor:
    """bool [T, k]: which choices stay when every expert takes at most `limit` tokens of the whole row."""
    with torch.no_grad():
        whole, mine = _whole_row(torch.cat([probs.detach(), experts.to(probs.dtype)], -1), routing, sharers)
        values, chosen = whole.chunk(2, -1)
        chosen = chosen.to(torch.int64)
        if policy == "position":
            values = torch.arange(len(whole), 0, -1, device=probs.device)[:, None].expand_as(chosen)
        if len(whole) <= limit:
            return torch.ones_like(experts, dtype=torch.bool)
        # A token's own choices are different experts, so each entry is written at most once.
        table = torch.full((len(whole), num_experts), -1.0, dtype=torch.float64, device=probs.device)
        table.scatter_(1, chosen, values.double())
        best = torch.zeros_like(table, dtype=torch.bool).scatter_(0, table.topk(limit, dim=0).indices, True)
        return (best & (table >= 0)).gather(1, chosen)[mine]


def balancing_loss(summed: Tensor, load: Tensor, *, count: float | Tensor, tokens: int, topk: int) -> Tensor:
    """E / (k * count * tokens) * sum over experts of summed * load.

    summed [E]: probabilities over all experts, added up over this rank's tokens. load [E]: tokens per expert among `count` tokens.
    The shares of the ranks that share `tokens` tokens add up to the whole loss, which is 1 for an even load. Fedus et al. 2021
    (arXiv 2101.03961) eq. 4, for k experts as in Megatron-Core's switch_load_balancing_loss_func.
    """
    return torch.dot(summed, load) * (len(summed) / topk / (count * max(tokens, 1)))


def sequence_balancing_loss(scores: Tensor, chosen: Tensor, routing: Routing, sharers: Sharers, *, topk: int) -> Tensor:
    """The mean over the row's segments of each one's balancing loss. chosen [T, E]: ones where a token goes."""
    lengths = routing.lengths.to(scores.dtype).clamp(min=1)
    empty = scores.new_zeros((len(lengths), scores.shape[1]))
    load = sharers.total(empty.index_add(0, routing.sequence, chosen))
    summed = empty.index_add(0, routing.sequence, scores)
    each = (summed * load).sum(-1) * (scores.shape[1] / topk) / lengths.square()
    return each.sum() / max(int(routing.lengths.shape[0]), 1)


class AttachLoss(torch.autograd.Function):
    """x unchanged; in the backward pass `loss` gets the gradient `scale`, as if scale * loss had been added to the model's loss.

    This is how a loss of a middle pipeline stage is trained without travelling through the others.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def, override]
        (scale,) = ctx.saved_tensors
        return grad, scale.to(ctx.loss_dtype), None
