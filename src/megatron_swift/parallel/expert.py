"""Expert parallelism: which experts a rank holds, and how tokens travel to them.

The ranks of a pipeline stage form a second grid, edp x ep x etp: experts are spread over ep, each expert's rows and columns over etp, and
edp ranks hold the same. It is independent of the first one (dp x cp x tp), because a token is routed by itself, wherever it lies. So every
rank must hold other tokens: with tensor parallelism that takes sequence parallelism.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_swift.kernels.grouped_linear import GroupedLinear, grouped_linear
from megatron_swift.kernels.permute import permute
from megatron_swift.kernels.router import Gate
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder
from megatron_swift.models.moe import Choice, Dispatch, Experts, dispatch_at_once, dispatch_here
from megatron_swift.models.routing import RouterOptions, Sharers
from megatron_swift.parallel.collectives import (
    AllToAll,
    GatherUneven,
    ScatterUneven,
    all_gather,
    all_reduce,
    all_to_all,
    gather_uneven,
)
from megatron_swift.parallel.mesh import Axis, Mesh
from megatron_swift.parallel.tensor import Placement, Span


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts, so that it lies on the second grid."""
    return ".mlp.experts." in name


def local_config(cfg: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The sizes of one rank's experts."""
    if cfg.moe is None:
        return cfg
    here, inner = cfg.moe.num_experts // mesh.ep.size, cfg.moe.ffn_hidden_size // mesh.etp.size
    return cfg.replace(moe=dataclasses.replace(cfg.moe, experts_here=here, ffn_hidden_size=inner))


def placement(name: str, shape: tuple[int, ...], cfg: ModelConfig, mesh: Mesh) -> Placement:
    """What a rank holds of the experts' parameter `name` of global `shape`: the rows of its experts, one expert after the other."""
    assert cfg.moe is not None
    ep, etp, number = mesh.ep, mesh.etp, cfg.moe.num_experts // mesh.ep.size
    rows = shape[0] // ep.size
    first = ep.rank * rows
    if name.endswith("linear_fc2.weight"):
        width = shape[1] // etp.size
        columns = (etp.rank * width, (etp.rank + 1) * width) if etp.size > 1 else None
        return Placement((Span(0, first, rows),), columns)
    if etp.size == 1:
        return Placement((Span(0, first, rows),))
    inner = cfg.moe.ffn_hidden_size
    part = inner // etp.size
    halves = range(cfg.fc1_parts * number)  # the gate and the up rows of each expert
    return Placement(tuple(Span(i * part, first + i * inner + etp.rank * part, part) for i in halves))


def install(
    model: Decoder,
    mesh: Mesh,
    *,
    dispatcher: str,
    router: RouterOptions,
    gate: Gate,
    product: GroupedLinear,
    fused: bool,
    overlap: bool,
) -> None:
    """Set routers, kernels and dispatchers of a model's sparse layers.

    dispatcher : allgather, alltoall or alltoall_seq (as alltoall).
    fused      : experts may be one function from their inputs to the weighted sum of their answers.
    """
    dispatch: Dispatch = dispatch_here
    if mesh.ep.size * mesh.etp.size > 1:
        dispatch = (
            _by_gathering(mesh.ep, mesh.experts) if dispatcher == "allgather" else _by_exchange(mesh.ep, mesh.etp)
        )
    elif product is grouped_linear and model.cfg.swiglu and fused:
        dispatch = dispatch_at_once
    sharers = _sharers(mesh)
    for layer in model.sparse:
        layer.router.options, layer.router.sharers, layer.router.gate = router, sharers, gate
        layer.dispatch, layer.experts.product, layer.overlap = dispatch, product, overlap


def _sharers(mesh: Mesh) -> Sharers:
    row, stage = mesh.row.group, mesh.stage.group
    found = Sharers()
    if row is not None:
        found = Sharers(lambda x: all_reduce(x, row), lambda x: all_gather(x, row), mesh.row.rank)
    if stage is not None:
        found = dataclasses.replace(found, everywhere=lambda x: all_reduce(x, stage))
    return found


def _by_exchange(ep: Axis, etp: Axis) -> Dispatch:
    """Each token's vector goes to the ranks that hold its experts, and their answers come back.

    One host synchronisation: how many rows go where is known on the device only, and must be told to the collective.
    """

    def dispatch(x: Tensor, choice: Choice, experts: Experts) -> Tensor:
        total = experts.number * ep.size
        sent = permute(x, choice.experts, num_experts=total, kept=choice.kept, limit=choice.limit)
        mine = sent.counts.view(ep.size, experts.number)
        counts = mine if ep.group is None else _exchanged(mine, ep)  # [source, expert here]
        everyone = counts[None] if etp.group is None else all_gather(counts[None], etp.group)
        sends, *sources = torch.cat([mine[None], everyone]).sum(-1).tolist()  # the synchronisation
        receives = sources[etp.rank]
        rows = sent.x if ep.group is None else AllToAll.apply(sent.x, receives, sends, ep.group)
        sizes = [sum(source) for source in sources]
        if etp.group is not None:
            rows = GatherUneven.apply(rows, sizes, etp.group)
        y = _in_order(rows, everyone.reshape(-1, experts.number), sum(sizes), experts)
        if etp.group is not None:
            y = ScatterUneven.apply(y, sizes, etp.group)
        if ep.group is not None:
            y = AllToAll.apply(y, sends, receives, ep.group)
        return sent.combine(y, choice.probs)

    return dispatch


def _exchanged(counts: Tensor, ep: Axis) -> Tensor:
    assert ep.group is not None
    ones = [1] * ep.size
    return all_to_all(counts, ones, ones, ep.group)


def _in_order(rows: Tensor, counts: Tensor, number: int, experts: Experts) -> Tensor:
    """The experts on rows that came source by source, counts [source, expert] of them each; the answers in the rows' order."""
    owners = torch.arange(experts.number, device=rows.device).repeat(len(counts))
    expert = owners.repeat_interleave(counts.reshape(-1), output_size=number)
    sorted_rows = permute(rows, expert[:, None], num_experts=experts.number)
    return experts(sorted_rows.x, sorted_rows.counts).index_select(0, sorted_rows.back)


def _by_gathering(ep: Axis, everyone: Axis) -> Dispatch:
    """Every rank of the group sees all tokens, answers for its own experts, and the answers are summed.

    everyone : the ep x etp ranks. Two host synchronisations: how many tokens each rank has, and how many are for this one.
    """
    group = everyone.group
    assert group is not None

    def dispatch(x: Tensor, choice: Choice, experts: Experts) -> Tensor:
        sizes = all_gather(torch.tensor([len(x)], device=x.device), group).tolist()
        chosen = choice.experts
        if choice.kept is not None:
            chosen = chosen.masked_fill(~choice.kept, -1)  # below every rank's range
        tokens, probs = (GatherUneven.apply(t, sizes, group) for t in (x, choice.probs))
        chosen = gather_uneven(chosen, sizes, group) - ep.rank * experts.number
        here = (chosen >= 0) & (chosen < experts.number)
        sent = permute(tokens, chosen, num_experts=experts.number, kept=here)
        out = ScatterUneven.apply(sent.combine(experts(sent.x, sent.counts), probs), sizes, group)
        return _Reached.apply(out)  # type: ignore[no-any-return]

    return dispatch


class _Reached(torch.autograd.Function):
    """x unchanged: where recomputation begins, and how far it goes at least, on every rank alike.

    torch's checkpoint computes a layer again when its backward pass first asks for something saved, and stops when it has again all that
    was. After the last collective only ranks that hold padding save something (where real tokens lie): they alone would start before
    that collective's backward and go beyond it, while the others wait for them in another one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        _ = ctx.saved_tensors  # recomputes, where that is on
        return grad
