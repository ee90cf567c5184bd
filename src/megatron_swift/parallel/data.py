"""Data parallelism with a sharded optimizer: torch's FSDP2, its gradients SUMMED, never averaged.

The loss is divided by the global token count beforehand, so the sum over ranks is the gradient of the global loss. Each setting below
must be made on every wrapped module: torch does not pass them down.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_swift.models.decoder import Decoder


def shard(model: Decoder, mesh: DeviceMesh, *, compute_dtype: torch.dtype, master_dtype: torch.dtype) -> None:
    """Wrap layer by layer and the rest as the root. Parameters stay in master_dtype, one shard per rank; compute runs in compute_dtype.

    Gradients are accumulated and reduced in master_dtype, as Megatron does.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype, cast_forward_inputs=False)
    for layer in model.decoder.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in wrapped(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def wrapped(model: nn.Module) -> Iterator[FSDPModule]:
    """The FSDP modules of a model."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def before_backward(model: nn.Module, *, last: bool) -> None:
    """ZeRO-1: gradients are reduced, and parameters resharded, only in the last backward pass of a step."""
    for module in wrapped(model):
        module.set_requires_gradient_sync(last, recurse=False)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last, recurse=False)


def reshard(model: nn.Module) -> None:
    """Give back the gathered parameters after a pass without backward; until then the optimizer's shards are out of sight."""
    for module in wrapped(model):
        module.reshard()
