"""AdamW and SGD over local shards: plain tensors, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Steps the masters of `shards` with the gradients that lie in them."""

    def __init__(self, shards: Shards, options: OptimizerOptions):
        self.shards, self.options = shards, options
        self.names = ("exp_avg", "exp_avg_sq") if options.kind == "adam" else ("momentum_buffer",)
        mine = [s for s in shards if s.master.numel()]  # a rank may hold no row of a short parameter
        groups = [
            {"params": [s.master for s in mine if is_decayed(s)], "weight_decay": options.weight_decay},
            {"params": [s.master for s in mine if not is_decayed(s)], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if options.kind == "adam":
            betas = (options.beta1, options.beta2)
            self.inner: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=betas, eps=options.eps, fused=True
            )
        else:
            self.inner = torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, fused=True)
        for shard in mine:
            state = {name: torch.zeros_like(shard.master) for name in self.names}
            if options.kind == "adam":
                state["step"] = torch.zeros((), dtype=torch.float32, device=shard.master.device)
            self.inner.state[shard.master] = state

    def step(self, lr: float) -> None:
        """One update at rate `lr`; the module's 16-bit copies are refreshed and the gradients freed."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.shards.push()
        self.shards.drop_grads()

    def state(self, shard: Shard, name: str) -> Tensor:
        """A shard's state tensor (exp_avg, exp_avg_sq or momentum_buffer), of the master's shape."""
        if not shard.master.numel():
            return torch.zeros_like(shard.master)
        return self.inner.state[shard.master][name]

    @property
    def num_steps(self) -> int:
        """Updates made so far, for Adam's bias correction."""
        for state in self.inner.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def set_num_steps(self, steps: int) -> None:
        """Resume the bias correction."""
        for state in self.inner.state.values():
            if "step" in state:
                state["step"].fill_(steps)
