"""Values of the host, handed to the device without waiting for what it still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the CPU on `device`. From page-locked memory: a copy from ordinary memory waits for all that is queued on a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
