"""Tensor and sequence parallelism whose communication runs beside its own matrix products (`--tp_comm_overlap`).

Under sequence parallelism a linear layer either gathers tokens before its product or scatters the sum of products after it. torch's
symmetric-memory operations cut such a pair into one piece per rank, so that a piece travels over NVLink while another is multiplied.
`FusedProducts` are the two pairs, once in that form and once written out; the layers on top of them do not know which they have.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_swift.models.decoder import TransformerLayer
from megatron_swift.models.layers import MLP, Linear, NormLinear
from megatron_swift.parallel.collectives import all_gather, reduce_scatter
from megatron_swift.parallel.mesh import Axis
from megatron_swift.utils.errors import UsageError

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class FusedProducts:
    """A collective over the ranks of a group and the matrix product next to it, along dim 0.

    gather_matmul  : a [n, k], b [k, m] -> the a of all ranks [size * n, k], and its product with b [size * n, m].
    matmul_scatter : a [size * n, k], b [k, m] -> this rank's rows [n, m] of the sum of all ranks' a b.
    """

    gather_matmul: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    matmul_scatter: Callable[[Tensor, Tensor], Tensor]


def written_out(group: dist.ProcessGroup) -> FusedProducts:
    """One after the other, on any device: the reference of the other form."""

    def gather_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        whole = all_gather(a, group)
        return whole, whole @ b

    def matmul_scatter(a: Tensor, b: Tensor) -> Tensor:
        return reduce_scatter(a @ b, group)

    return FusedProducts(gather_matmul, matmul_scatter)


def symmetric_memory(group: dist.ProcessGroup) -> FusedProducts:
    """torch's operations, for CUDA tensors of a group that `require_symmetric_memory` has let pass.

    They share one workspace per group that grows with the largest piece; all ranks of a group must call them in one order with one shape.
    """
    # The operations belong to this module and exist once it is imported.
    import torch.distributed._symmetric_memory

    name = group.group_name

    def gather_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        whole, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(a.contiguous(), [b], 0, name, return_A=True)
        return whole, product

    def matmul_scatter(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(a.contiguous(), b, "sum", 0, name)  # type: ignore[no-any-return]

    return FusedProducts(gather_matmul, matmul_scatter)


def require_symmetric_memory(axis: Axis, device: torch.device) -> None:
    """Raise UsageError unless the GPUs of the axis reach each other's memory. A collective call of the axis' ranks."""
    assert axis.group is not None
    if device.type != "cuda":
        raise _refusal(f"it works through the memory of NVIDIA GPUs, and this run is on the {device.type}")
    places: list[Any] = [None] * axis.size
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=axis.group)
    if len({host for host, _ in places}) > 1:
        raise _refusal(f"the tensor-parallel ranks are on several machines: {sorted({host for host, _ in places})}")
    for _, other in places:
        # With one visible GPU per process all have index 0, and only the attempt below can tell.
        if other not in (device.index, None) and not torch.cuda.can_device_access_peer(device, other):
            raise _refusal(f"GPU {device.index} cannot reach the memory of GPU {other} (no NVLink or peer access)")
    from torch.distributed._symmetric_memory import get_symm_mem_workspace

    try:
        get_symm_mem_workspace(axis.group.group_name, min_size=_PROBE_BYTES).barrier()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise _refusal(f"torch could not set up symmetric memory: {str(error).splitlines()[0]}") from error


def _refusal(why: str) -> UsageError:
    return UsageError("--tp_comm_overlap true cannot be used here", why=why, do="leave --tp_comm_overlap out")


class _Column(torch.autograd.Function):
    """all_gather(x) W^T, W holding some of the rows; in the backward pass the gradient of x is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: FusedProducts) -> Tensor:
        whole, y = products.gather_matmul(x, weight.t())
        ctx.save_for_backward(whole, weight)
        ctx.products, ctx.with_bias = products, bias is not None
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        whole, weight = ctx.saved_tensors
        grad_x = ctx.products.matmul_scatter(grad, weight)
        return grad_x, grad.t() @ whole, grad.sum(0) if ctx.with_bias else None, None


class _Row(torch.autograd.Function):
    """reduce_scatter(x W^T), W holding some of the columns; in the backward pass the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: FusedProducts) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return products.matmul_scatter(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        whole, grad_x = ctx.products.gather_matmul(grad, weight)
        return grad_x, whole.t() @ x, None


class OverlappedNormLinear(NormLinear):
    """A NormLinear, with its very parameters, that takes this rank's tokens and returns its features of all tokens."""

    def __init__(self, plain: NormLinear, products: FusedProducts):
        out_features, in_features = plain.weight.shape
        with torch.device("meta"):
            super().__init__(
                in_features,
                out_features,
                plain.epsilon,
                bias=plain.bias is not None,
                layer_norm=plain.layer_norm_bias is not None,
            )
        self.layer_norm_weight, self.layer_norm_bias = plain.layer_norm_weight, plain.layer_norm_bias
        self.weight, self.bias = plain.weight, plain.bias
        self.products, self.kernels = products, plain.kernels

    @property
    def at_once(self) -> bool:
        return False  # tokens are gathered between norm and product

    def forward(self, x: Tensor) -> Tensor:
        return _Column.apply(self.normalise(x), self.weight, self.bias, self.products)  # type: ignore[no-any-return]


class OverlappedLinear(Linear):
    """A Linear, with its very parameter, that takes its features of all tokens and returns the sum over ranks of this rank's tokens."""

    def __init__(self, plain: Linear, products: FusedProducts):
        out_features, in_features = plain.weight.shape
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=plain.bias is not None)
        self.weight, self.bias = plain.weight, plain.bias
        self.products, self.kernels = products, plain.kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(_Row.apply(x, self.weight, self.products))

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        return self(self.kernels.swiglu(gate_up))


def overlap(layer: TransformerLayer, products: FusedProducts) -> None:
    """Put overlapping linears, with the same parameters under the same names, in place of those of the attention and of a dense MLP."""
    attention, mlp = layer.self_attention, layer.mlp
    attention.linear_qkv = OverlappedNormLinear(attention.linear_qkv, products)
    attention.linear_proj = OverlappedLinear(attention.linear_proj, products)
    if isinstance(mlp, MLP):
        mlp.linear_fc1 = OverlappedNormLinear(mlp.linear_fc1, products)
        mlp.linear_fc2 = OverlappedLinear(mlp.linear_fc2, products)
