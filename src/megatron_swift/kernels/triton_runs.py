"""Whether Triton kernels can be used."""

from __future__ import annotations

import functools
import importlib.util

import torch


def why_no_triton(device: torch.device) -> str:
    """Why Triton kernels do not run on `device`; "" where they do."""
    if device.type != "cuda":
        return f"Triton kernels need a GPU, not the {device.type}"
    if not torch.cuda.is_available():
        return "Triton kernels need a GPU, and torch sees none"
    if not _installed():
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton kernels in bfloat16 need compute capability 8.0"
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_takes(x: torch.Tensor) -> bool:
    """Whether Triton kernels can be used on x: where they run, for all but float64."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and not why_no_triton(x.device)
