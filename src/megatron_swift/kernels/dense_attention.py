"""Attention of a packed row whose segments are all of one length: a dense batch, for which cuDNN's kernel is the fastest on Hopper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN makes a plan for each shape, which takes tens of milliseconds: lengths that occur by accident must not reach it.
_GRAIN = 128


def flash_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's FlashAttention runs there on heads of this many dims."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def cudnn_is_fastest(device: torch.device) -> bool:
    """Whether this GPU is one for which cuDNN's attention was seen ahead of FlashAttention: Hopper and later."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def is_even(lengths: tuple[int, ...]) -> bool:
    """Whether these segments make a dense batch worth a plan of its own: one length, a multiple of 128."""
    return len(set(lengths)) == 1 and lengths[0] % _GRAIN == 0


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal attention within segments of one length; q [T, heads, d], k and v [T, groups, d] -> [T, heads, d]."""
    batch = len(lengths)
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2).flatten(0, 1)
