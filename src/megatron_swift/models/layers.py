"""The layers of a decoder on one device. Parameter names and fused layouts are Megatron-Core's.

Shapes: T tokens of a packed row, H hidden size, F feed-forward size, d kv_channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_swift.kernels.attention import AttentionCore, Segments, plain_attention
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.rope import rotate

# The seams where tensor parallelism puts its collectives; on one device each is the identity.
Seam = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dim, computed in float32 (float64 stays float64), as transformers does it."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def new_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter: every weight is loaded or initialised afterwards."""
    return nn.Parameter(torch.empty(*shape))


class RMSNorm(nn.Module):
    """A norm of its own (q, k and the final one); the other norms live inside the linear layer they feed."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = new_parameter(size)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Linear(nn.Module):
    """y = x W^T, W [out, in]. `leave` is applied to y: the sum over ranks, where each holds some of the columns.

    `enter` is applied to x: where ranks hold some of the rows each, it makes the gradient of the input whole.
    """

    enter: Seam
    leave: Seam

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = new_parameter(out_features, in_features)
        self.enter = self.leave = identity

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(self.enter(x), self.weight))


class NormLinear(nn.Module):
    """A linear layer that first applies its RMSNorm; one module, because Megatron-Core saves both under one name.

    `enter` stands between the two, as in Linear.
    """

    enter: Seam

    def __init__(self, in_features: int, out_features: int, epsilon: float, *, bias: bool = False):
        super().__init__()
        self.layer_norm_weight = new_parameter(in_features)
        self.weight = new_parameter(out_features, in_features)
        self.bias = new_parameter(out_features) if bias else None
        self.epsilon = epsilon
        self.enter = identity

    def forward(self, x: Tensor) -> Tensor:
        normalised = rms_norm(x, self.layer_norm_weight, self.epsilon)
        return F.linear(self.enter(normalised), self.weight, self.bias)


class Embedding(nn.Module):
    """Token vectors, weight [vocabulary, H]. `lookup(tokens, weight)` is replaced where ranks hold some of the rows each."""

    lookup: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, num_embeddings: int, size: int):
        super().__init__()
        self.weight = new_parameter(num_embeddings, size)
        self.lookup = F.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lookup(tokens, self.weight)


class Attention(nn.Module):
    """Grouped-query attention. `core` is the seam: a kernel, a context-parallel form or a KV cache is put there."""

    core: AttentionCore

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim, self.heads_per_group = cfg.kv_channels, cfg.heads_per_group
        self.linear_qkv = NormLinear(cfg.hidden_size, cfg.qkv_rows, cfg.norm_epsilon, bias=cfg.qkv_bias)
        self.linear_proj = Linear(cfg.num_attention_heads * cfg.kv_channels, cfg.hidden_size)
        self.q_layernorm = RMSNorm(cfg.kv_channels, cfg.norm_epsilon) if cfg.qk_layernorm else None
        self.k_layernorm = RMSNorm(cfg.kv_channels, cfg.norm_epsilon) if cfg.qk_layernorm else None
        self.core = plain_attention

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x [T, H] -> [T, H]. rotary: cos and sin [T, 1, d]. Heads are counted from the weight: a rank may hold some of them."""
        qkv = self.linear_qkv(x)
        tokens = qkv.shape[0]
        # Rows are ordered by query group: its query heads, then its key, then its value.
        grouped = qkv.view(tokens, -1, self.heads_per_group + 2, self.head_dim)
        q, k, v = grouped.split((self.heads_per_group, 1, 1), dim=2)
        q, k, v = q.reshape(tokens, -1, self.head_dim), k.squeeze(2), v.squeeze(2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.linear_proj(self.core(q, k, v, segments).reshape(tokens, -1))


class MLP(nn.Module):
    """SwiGLU: linear_fc2(silu(gate) * up), gate and up being the two halves of linear_fc1's rows."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.linear_fc1 = NormLinear(cfg.hidden_size, 2 * cfg.ffn_hidden_size, cfg.norm_epsilon)
        self.linear_fc2 = Linear(cfg.ffn_hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        gate, up = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)
