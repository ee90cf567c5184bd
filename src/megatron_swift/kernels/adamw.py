"""The AdamW update (Loshchilov & Hutter 2019): torch's own operator as the plain form, one Triton pass on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_swift.kernels.triton_runs import why_no_triton


@dataclass(frozen=True)
class Updated:
    """A parameter to step, all of one shape and contiguous.

    master, exp_avg, exp_avg_sq : updated in place.  copy : takes the new master in its own 16-bit type; None without one.
    grad : may be of another type than the master.
    """

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class AdamScalars:
    """Decoupled decay, bias correction, eps outside the root. step: counted from 1. scale: of the gradients (the clip).

    The fused form takes a scale that is still on the device, 0-dim float32, too; where that is NaN it leaves everything as it was.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    scale: float | Tensor = 1.0

    @property
    def correction1(self) -> float:
        """Of the first moment's bias."""
        return 1.0 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """Of the second moment's bias."""
        return 1.0 - self.beta2**self.step


AdamUpdate = Callable[[Iterable[Updated], AdamScalars], None]


@torch.no_grad()
def plain_adamw(tensors: Iterable[Updated], scalars: AdamScalars) -> None:
    """Any device and type. The gradients of the masters' own type are scaled in place."""
    assert isinstance(scalars.scale, float)
    tensors = list(tensors)
    for decay in sorted({one.weight_decay for one in tensors}):
        group = [one for one in tensors if one.weight_decay == decay]
        grads = [one.grad.to(one.master.dtype) for one in group]
        if scalars.scale != 1.0:
            torch._foreach_mul_(grads, scalars.scale)
        steps = [torch.full((), float(scalars.step), device=one.master.device) for one in group]
        torch._fused_adamw_(
            [one.master for one in group],
            grads,
            [one.exp_avg for one in group],
            [one.exp_avg_sq for one in group],
            [],
            steps,
            lr=scalars.lr,
            beta1=scalars.beta1,
            beta2=scalars.beta2,
            weight_decay=decay,
            eps=scalars.eps,
            amsgrad=False,
            maximize=False,
        )
    copied = [(one.copy, one.master) for one in tensors if one.copy is not None]
    if copied:
        torch._foreach_copy_([copy for copy, _ in copied], [master for _, master in copied])


def choose_adamw(device: torch.device, master_dtype: torch.dtype) -> tuple[AdamUpdate, str]:
    """(the update, the sentence about it for the banner)."""
    reason = why_no_triton(device)
    if not reason and master_dtype is torch.float32:
        from megatron_swift.kernels.fused.adamw import fused_adamw

        return fused_adamw, "AdamW in one pass (Triton), the clip and the 16-bit copy folded in"
    return plain_adamw, "torch's fused AdamW" + (f" ({reason})" if device.type == "cuda" and reason else "")
