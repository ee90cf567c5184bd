"""AdamW and SGD over local shards: plain tensors, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from megatron_swift.kernels.adamw import AdamScalars, Updated, choose_adamw, plain_adamw
from megatron_swift.parallel.shards import Shard, Shards


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """kind: adam (decoupled weight decay, bias correction, eps outside the root) or sgd (momentum, coupled decay)."""

    kind: str
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9


def is_decayed(shard: Shard) -> bool:
    """Weight decay spares biases and one-dimensional parameters (all norms)."""
    return len(shard.shape) > 1 and not shard.name.endswith(".bias")


class Optimizer:
    """Steps the masters of `shards` with the gradients that lie in them.

    num_steps : updates made so far, for Adam's bias correction.  kernel: the sentence about the update for the banner.
    """

    def __init__(self, shards: Shards, options: OptimizerOptions):
        self.shards, self.options, self.num_steps = shards, options, 0
        self.decays = {s.name: options.weight_decay if is_decayed(s) else 0.0 for s in shards}
        self.names = ("exp_avg", "exp_avg_sq") if options.kind == "adam" else ("momentum_buffer",)
        self.states = {s.name: {name: torch.zeros_like(s.master) for name in self.names} for s in shards}
        self.adamw, self.kernel = choose_adamw(shards.mesh.device, shards.master_dtype)
        if options.kind != "adam":
            self.kernel = "torch's fused SGD"

    @property
    def scale_on_device(self) -> bool:
        """Whether `step` takes a scale that is still on the device."""
        return self.options.kind == "adam" and self.adamw is not plain_adamw

    def step(self, lr: float, *, scale: float | Tensor = 1.0) -> None:
        """One update at rate `lr` with the gradients times `scale` (the clip).

        The module's 16-bit copies are refreshed and the gradients freed. scale: 0-dim float32 where `scale_on_device`; if it turns out to be
        NaN, nothing was updated, and the caller says so by `take_back`.
        """
        if self.options.kind == "adam":
            self.num_steps += 1
            self._adamw(lr, scale)
        else:
            assert isinstance(scale, float)
            self._sgd(lr, scale)
        self.shards.drop_grads()

    def take_back(self) -> None:
        """The last step's scale was NaN: it did not count."""
        self.num_steps -= 1

    def _adamw(self, lr: float, scale: float | Tensor) -> None:
        options = self.options
        # One by one: the first is on its way before the second is looked at.
        tensors = (
            Updated(
                shard.master.detach(),
                shard.grad,
                **self.states[shard.name],
                copy=shard.param.detach() if shard.copied else None,
                weight_decay=self.decays[shard.name],
            )
            for shard in self.shards
            if shard.grad is not None and shard.master.numel()  # a rank may hold no row of a short parameter
        )
        self.adamw(
            tensors,
            AdamScalars(
                lr=lr,
                beta1=options.beta1,
                beta2=options.beta2,
                eps=options.eps,
                step=self.num_steps,
                scale=scale,
            ),
        )

    @torch.no_grad()
    def _sgd(self, lr: float, scale: float) -> None:
        for decay in sorted(set(self.decays.values())):
            group = [s for s in self.shards if self.decays[s.name] == decay and s.grad is not None and s.master.numel()]
            if not group:
                continue
            grads = [s.grad.to(s.master.dtype) for s in group if s.grad is not None]
            if scale != 1.0:
                torch._foreach_mul_(grads, scale)
            sgd(
                [s.master.detach() for s in group],
                grads,
                [self.states[s.name]["momentum_buffer"] for s in group],
                weight_decay=decay,
                momentum=self.options.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                fused=True,
            )
        self.shards.push()

    def state(self, shard: Shard, name: str) -> Tensor:
        """A shard's state tensor (exp_avg, exp_avg_sq or momentum_buffer), of the master's shape."""
        return self.states[shard.name][name]

    def set_num_steps(self, steps: int) -> None:
        """Resume the bias correction."""
        self.num_steps = steps
