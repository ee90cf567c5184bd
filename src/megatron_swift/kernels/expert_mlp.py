"""SwiGLU experts and the sum of their answers as one function, which keeps little for the backward pass.

Written as separate functions, each of a token's k choices keeps four rows: the expert's input, the pair gate and up, their SwiGLU product and
the answer. Here the pair alone is kept. The inputs are gathered again; the product is formed again by the kernel that reads the pair anyway;
and the answers are not needed: with y = W a, the gradient g of the sum gives the weight p of a choice g . y = (W^T g) . a, and W^T g is formed
for the gradient of a in any case.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_swift.kernels.permute import Order, gather_back, weighted_sum
from megatron_swift.kernels.triton_runs import triton_takes


def plain_weighted_swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of weight * swiglu(gate_up), gate_up [N, 2F], weight [N]: (gradient of gate_up, the weighted product, gradient of the weight).

    grad [N, F] is the gradient of the weighted product. Computed in weight's dtype where that is the wider one.
    """
    wide = torch.promote_types(weight.dtype, gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    activated, grad, weight = gate * share, grad.to(wide), weight.to(wide)[:, None]
    product, weighted = activated * up, grad * weight
    d_gate = weighted * up * share * (1 + gate * (1 - share))
    d_gate_up = torch.cat([d_gate, weighted * activated], dim=-1)
    return d_gate_up.to(gate_up.dtype), (product * weight).to(gate_up.dtype), (grad * product).sum(1)


def _swiglu(gate_up: Tensor) -> Tensor:
    if triton_takes(gate_up):
        from megatron_swift.kernels.fused.swiglu import swiglu_forward

        return swiglu_forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if triton_takes(gate_up):
        from megatron_swift.kernels.fused.swiglu import weighted_swiglu_backward

        return weighted_swiglu_backward(gate_up, grad.contiguous(), weight)
    return plain_weighted_swiglu_backward(gate_up, grad, weight)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, probs: Tensor, order: Order) -> Tensor:
        ends = order.counts.cumsum(0, dtype=torch.int32)
        gate_up = F.grouped_mm(x.index_select(0, order.tokens), first.transpose(1, 2), offs=ends)
        y = F.grouped_mm(_swiglu(gate_up), second.transpose(1, 2), offs=ends)
        ctx.save_for_backward(x, first, second, probs, gate_up, order.choices, order.tokens, order.back, ends)
        return weighted_sum(y, order.back, probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, first, second, probs, gate_up, choices, tokens, back, ends = ctx.saved_tensors
        sent = grad.index_select(0, tokens)
        weight = probs.reshape(-1).index_select(0, choices)
        # W^T g, before its weight: both gradients behind it are made of it.
        d_inner, product, d_weight = _swiglu_backward(gate_up, F.grouped_mm(sent, second, offs=ends), weight)
        d_second = F.grouped_mm(sent.t(), product, offs=ends)
        del sent, product  # two of the largest tensors of a step, at its highest point
        d_first = F.grouped_mm(d_inner.t(), x.index_select(0, tokens), offs=ends)
        d_rows = F.grouped_mm(d_inner, first, offs=ends)
        del d_inner
        d_probs = gather_back(d_weight[:, None].to(probs.dtype), back).view(probs.shape)
        return weighted_sum(d_rows, back, None, k=probs.shape[1]), d_first, d_second, d_probs, None


def expert_mlp(x: Tensor, first: Tensor, second: Tensor, probs: Tensor, order: Order) -> Tensor:
    """Each token's experts, weighted by probs [T, k] and added up: x [T, H] -> [T, H].

    first [E, 2F, H] and second [E, H, F] are the experts' matrices, in a type that torch's grouped product takes. The values are those of
    `Permuted.combine` over grouped products, and the gradients too but for rounding.
    """
    return _ExpertMLP.apply(x, first, second, probs, order)  # type: ignore[no-any-return]
