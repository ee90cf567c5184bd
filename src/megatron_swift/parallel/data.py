"""Data parallelism: torch's FSDP2 with its gradients SUMMED, never averaged; or whole replicas whose gradients are all-reduced.

The loss is divided by the global token count beforehand, so the sum over ranks is the gradient of the global loss. Each setting below
must be made on every wrapped module: torch does not pass them down.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_swift.models.decoder import Decoder
from megatron_swift.parallel.mesh import Axis


class Sharding(Enum):
    """What the ranks that see different tokens share among them (Megatron-FSDP's names; ZeRO-0 to 3)."""

    NO_SHARD = "no_shard"
    OPTIM = "optim"
    OPTIM_GRADS = "optim_grads"
    OPTIM_GRADS_PARAMS = "optim_grads_params"


def shard(
    model: Decoder,
    axis: Axis,
    expert_axis: Axis,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    sharding: Sharding,
) -> None:
    """Wrap layer by layer and the rest as the root. Parameters stay in float32 (float64 for a float64 model), one shard per rank; compute runs
    in compute_dtype.

    Gradients are accumulated and reduced in the parameters' type, as Megatron does. Routed experts have ranks of their own to share with; where
    one of the two axes has a single rank, its parameters are left whole, in compute_dtype.
    """
    master_dtype = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype, cast_forward_inputs=False)
    reshard_after_forward = sharding is Sharding.OPTIM_GRADS_PARAMS
    kept_whole: set[nn.Parameter] = set()
    for sparse in model.sparse:
        module = sparse.experts
        module.to(master_dtype if expert_axis.size > 1 else compute_dtype)
        if expert_axis.size > 1:
            mesh = _device_mesh(expert_axis, device)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        else:
            kept_whole |= set(module.parameters())
    if axis.size > 1:
        mesh = _device_mesh(axis, device)
        for layer in model.layers:
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=reshard_after_forward,
                ignored_params=kept_whole,
            )
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=kept_whole)
    for one in wrapped(model):
        one.set_gradient_divide_factor(1.0)
        one.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _device_mesh(axis: Axis, device: torch.device) -> DeviceMesh:
    assert axis.group is not None
    return DeviceMesh.from_group(axis.group, device.type, mesh=torch.tensor(axis.ranks), mesh_dim_names=("shard",))


def wrapped(model: nn.Module) -> Iterator[FSDPModule]:
    """The FSDP modules of a model; none where it is not wrapped."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def before_backward(model: nn.Module, *, last: bool, sharding: Sharding) -> None:
    """Say what the coming backward pass does, the last one of a step or not.

    With OPTIM gradients stay whole until the last one; otherwise they are reduced each time. Parameters stay gathered until the last.
    """
    for module in wrapped(model):
        module.set_requires_gradient_sync(last or sharding is not Sharding.OPTIM, recurse=False)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last or sharding is Sharding.OPTIM_GRADS_PARAMS, recurse=False)


def reshard(model: nn.Module) -> None:
    """Give back the gathered parameters after a pass without backward; until then the optimizer's shards are out of sight."""
    for module in wrapped(model):
        module.reshard()
