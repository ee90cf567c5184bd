"""The local shards: all that the optimizer, the clip and the checkpoint know of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_swift.parallel.mesh import Mesh


@dataclass
class Shard:
    """Rows [start, start + len(master)) of a parameter of global `shape`.

    master : the values the optimizer steps, in master precision; its .grad is the gradient of this step.
    param  : the module's parameter that they stand for.
    """

    name: str
    master: nn.Parameter
    param: nn.Parameter
    start: int
    shape: tuple[int, ...]

    @property
    def copied(self) -> bool:
        """Whether the module holds a 16-bit copy of the master, to be refreshed after each step."""
        return not isinstance(self.param, DTensor) and self.param.dtype != self.master.dtype


class Shards:
    """name -> Shard, for every parameter of the model.

    With FSDP the master is the local part of the sharded parameter itself. Without, it is the parameter, or for a 16-bit model a copy
    in master_dtype whose gradient is accumulated in master_dtype too.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, *, master_dtype: torch.dtype):
        self.mesh, self.master_dtype = mesh, master_dtype
        self.by_name = {name: self._shard(name, param) for name, param in model.named_parameters()}

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.by_name.values())

    def _shard(self, name: str, param: nn.Parameter) -> Shard:
        if isinstance(param, DTensor):
            _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            return Shard(name, nn.Parameter(param.to_local().detach()), param, int(offset[0]), tuple(param.shape))
        if param.dtype == self.master_dtype:
            return Shard(name, nn.Parameter(param.detach()), param, 0, tuple(param.shape))
        shard = Shard(name, nn.Parameter(param.detach().to(self.master_dtype)), param, 0, tuple(param.shape))
        param.register_post_accumulate_grad_hook(lambda p: _accumulate(shard.master, p))
        return shard

    def pull(self, factor: float = 1.0) -> None:
        """Take the gradients from the module, times `factor` (the inverse of the fp16 loss scale)."""
        for shard in self:
            if not shard.copied:
                grad = shard.param.grad
                assert grad is not None, f"{shard.name} got no gradient"
                shard.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad
                shard.param.grad = None
        if factor != 1.0:
            torch._foreach_mul_([g for s in self if (g := s.master.grad) is not None], factor)

    def push(self) -> None:
        """Refresh the module's 16-bit copies from the masters."""
        copied = [s for s in self if s.copied]
        if copied:
            with torch.no_grad():
                torch._foreach_copy_([s.param for s in copied], [s.master for s in copied])

    def drop_grads(self) -> None:
        """Free this step's gradients."""
        for shard in self:
            shard.master.grad = None

    def grad_norm(self) -> float:
        """The L2 norm of the whole model's gradient, each value counted once, summed in float64."""
        return self._norm([g for s in self if (g := s.master.grad) is not None])

    def params_norm(self) -> float:
        """The L2 norm of all parameters."""
        return self._norm([s.master.detach() for s in self])

    def _norm(self, tensors: list[Tensor]) -> float:
        squares = (
            torch.stack([n.double() for n in torch._foreach_norm([t for t in tensors if t.numel()])]).square().sum()
        )
        return float(self.mesh.sum_(squares).sqrt())

    def scale_grads(self, factor: float) -> None:
        """Multiply every gradient (the clip)."""
        torch._foreach_mul_([g for s in self if (g := s.master.grad) is not None], factor)

    def full(self, name: str) -> Tensor:
        """A whole parameter in master precision; with FSDP every rank must ask for it."""
        param = self.by_name[name].param
        return param.full_tensor().detach() if isinstance(param, DTensor) else self.by_name[name].master.detach()


def _accumulate(master: nn.Parameter, param: Tensor) -> None:
    """Add a 16-bit gradient to the master's: called once per micro-batch, so sums over micro-batches keep full precision."""
    assert param.grad is not None
    if master.grad is None:
        master.grad = param.grad.to(master.dtype)
    else:
        master.grad += param.grad
    param.grad = None
