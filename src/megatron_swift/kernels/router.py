"""What a router makes of its logits: each token's experts with their weights, and the sums that losses and the log are made of.

T tokens, E experts, k of them for each token. The plain form is for every device and dtype; `choose_gate` picks Triton's where that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_swift.kernels.triton_runs import why_no_triton

WIDEST = 512  # experts of a row that the Triton kernels hold in registers


class Sums(NamedTuple):
    """Sums over tokens. load and entropy carry no gradient.

    load    : [E], tokens that chose each expert.  scores: [E], the sum of their probabilities over all experts.
    squares : 0-dim, of logsumexp(logits)^2, which the z-loss is made of: Zoph et al. 2022 (arXiv 2202.08906) eq. 5.
    entropy : 0-dim, of the entropy of a token's probabilities, in nats.
    """

    load: Tensor
    scores: Tensor
    squares: Tensor
    entropy: Tensor


class Gated(NamedTuple):
    """probs [T, k] in the logits' dtype, by falling logits; experts int64 [T, k]; sums: None where they are not asked for."""

    probs: Tensor
    experts: Tensor
    sums: Sums | None


# gate(logits [T, E], topk, pre_softmax, with_sums)
Gate = Callable[[Tensor, int, bool, bool], Gated]


def route(logits: Tensor, *, topk: int, pre_softmax: bool) -> tuple[Tensor, Tensor]:
    """(probabilities [T, k], experts int64 [T, k]) from logits [T, E], in their dtype.

    The k largest logits, of equal ones those of the lowest numbers: torch's topk leaves that open, and in 16 bits equal logits are common.
    """
    chosen, experts = (x[:, :topk] for x in logits.sort(dim=-1, descending=True, stable=True))
    if pre_softmax:
        return torch.softmax(logits, -1).gather(-1, experts), experts
    return torch.softmax(chosen, -1), experts


def sums_of(logits: Tensor, experts: Tensor) -> Sums:
    """The sums for logits [T, E] whose tokens chose experts int64 [T, k]."""
    scores = torch.softmax(logits, -1)
    with torch.no_grad():
        load = torch.zeros_like(scores).scatter_(1, experts, 1.0).sum(0)
        entropy = torch.special.entr(scores).sum()
    return Sums(load, scores.sum(0), torch.logsumexp(logits, -1).square().sum(), entropy)


def plain_gate(logits: Tensor, topk: int, pre_softmax: bool, with_sums: bool) -> Gated:
    """torch's own operators. The reference of the fused form."""
    probs, experts = route(logits, topk=topk, pre_softmax=pre_softmax)
    return Gated(probs, experts, sums_of(logits, experts) if with_sums else None)


def choose_gate(
    device: torch.device, dtypes: tuple[torch.dtype | None, torch.dtype], *, num_experts: int
) -> tuple[Gate, str]:
    """(gate, the words about it for the banner). dtypes: the router's, None for the model's, and the model's; logits have the wider one."""
    router, model = dtypes
    dtype = torch.promote_types(router or model, model)
    reason = why_no_triton(device)
    if not reason and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"the Triton kernel is not written for {dtype}"
    if not reason and num_experts > WIDEST:
        reason = f"the Triton kernel takes up to {WIDEST} experts"
    if reason:
        return plain_gate, f"router in torch's own operators ({reason})"
    from megatron_swift.kernels.fused.router import fused_gate

    return fused_gate, "router in one pass (Triton)"
