"""The layers of a decoder on one device. Parameter names and fused layouts are Megatron-Core's.

Shapes: T tokens of a packed row, H hidden size, F feed-forward size, d kv_channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_swift.kernels.again import through
from megatron_swift.kernels.attention import AttentionCore, Segments, plain_attention
from megatron_swift.kernels.layers import PLAIN, no_rotation, rotate, rotate_first, split_qkv
from megatron_swift.models.config import ModelConfig

# The seams where tensor parallelism puts its collectives; on one device each is the identity.
Seam = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def new_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter: every weight is loaded or initialised afterwards."""
    return nn.Parameter(torch.empty(*shape))


class RMSNorm(nn.Module):
    """A norm of its own (q, k and the final one); the other norms live inside the linear layer they feed.

    `kernels`, here and below: the forms of what lies between the matrix products, and of the products of linear layers.
    """

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = new_parameter(size)
        self.epsilon, self.kernels = epsilon, PLAIN

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.weight, self.epsilon)

    def after_add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(x + added, forward of that)."""
        return self.kernels.add_norm(x, added, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """Like RMSNorm; besides, the mean is taken off and a bias added. torch's own kernel, on every device."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight, self.bias = new_parameter(size), new_parameter(size)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

    def after_add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(x + added, forward of that)."""
        x = x + added
        return x, self(x)


def make_norm(cfg: ModelConfig, size: int) -> RMSNorm | LayerNorm:
    """A norm of the model's kind over the last dim of `size`."""
    return (RMSNorm if cfg.normalization == "RMSNorm" else LayerNorm)(size, cfg.norm_epsilon)


class Linear(nn.Module):
    """y = x W^T (+ bias), W [out, in]. `leave` is applied to x W^T: the sum over ranks, where each holds some of the columns.

    `enter` is applied to x: where ranks hold some of the rows each, it makes the gradient of the input whole.
    """

    enter: Seam
    leave: Seam

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = new_parameter(out_features, in_features)
        self.bias = new_parameter(out_features) if bias else None
        self.enter = self.leave = identity
        self.kernels = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(self.leave(self.kernels.linear(self.enter(x), self.weight, None)))

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        """forward(silu(gate) * up), gate_up [T, 2 * in_features]: gates, then ups."""
        if self.enter is not identity:
            return self(self.kernels.swiglu(gate_up))
        return self.with_bias(self.leave(self.kernels.swiglu_linear(gate_up, self.weight)))

    def with_bias(self, y: Tensor) -> Tensor:
        """y, whole over the ranks, plus the bias."""
        return y if self.bias is None else y + self.bias


class NormLinear(nn.Module):
    """A linear layer that first applies its norm; one module, because Megatron-Core saves both under one name.

    `enter` stands between the two, as in Linear. The norm is a LayerNorm where there is a layer_norm_bias.
    norm_again : what enters the product is not kept for the backward pass but computed, and gathered, again.
    """

    enter: Seam

    def __init__(
        self, in_features: int, out_features: int, epsilon: float, *, bias: bool = False, layer_norm: bool = False
    ):
        super().__init__()
        self.layer_norm_weight = new_parameter(in_features)
        self.layer_norm_bias = new_parameter(in_features) if layer_norm else None
        self.weight = new_parameter(out_features, in_features)
        self.bias = new_parameter(out_features) if bias else None
        self.epsilon, self.kernels = epsilon, PLAIN
        self.enter, self.norm_again = identity, False

    def normalise(self, x: Tensor) -> Tensor:
        """The norm alone."""
        if self.layer_norm_bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.epsilon)
        return self.kernels.norm(x, self.layer_norm_weight, self.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        if self.at_once:
            return self.kernels.norm_linear(x, self.layer_norm_weight, self.weight, self.bias, self.epsilon)
        return through(
            self._entering, lambda y: self.kernels.linear(y, self.weight, self.bias), x, again=self.norm_again
        )

    def after_add(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + added, forward of that)."""
        if added is None:
            return x, self(x)
        if self.at_once:
            weights = (self.layer_norm_weight, self.weight, self.bias)
            return self.kernels.add_norm_linear(x, added, *weights, self.epsilon)
        x = x + added
        return x, self(x)

    @property
    def at_once(self) -> bool:
        """Whether norm and product are one function: nothing stands between them, and what the norm gives is not to be computed again.

        The fused form computes it again in any case.
        """
        forgets = self.kernels.norm_linear is not PLAIN.norm_linear
        return self.enter is identity and self.layer_norm_bias is None and (forgets or not self.norm_again)

    def _entering(self, x: Tensor) -> Tensor:
        return self.enter(self.normalise(x))


class Embedding(nn.Module):
    """Token vectors, weight [vocabulary, H]. `lookup(tokens, weight)` is replaced where ranks hold some of the rows each."""

    lookup: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, num_embeddings: int, size: int):
        super().__init__()
        self.weight = new_parameter(num_embeddings, size)
        self.lookup = F.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lookup(tokens, self.weight)


# turn(q or k [T, heads, d], cos and sin [T, 1, rotary dims]) -> the same shape
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def choose_turn(cfg: ModelConfig) -> Turn:
    """How queries and keys are turned by their positions: wholly, in their first dims, or not at all."""
    if cfg.rotary_dim == cfg.kv_channels:
        return rotate
    return rotate_first if cfg.rotary_dim else no_rotation


class Attention(nn.Module):
    """Grouped-query attention. `core` is the seam: a kernel, a context-parallel form or a KV cache is put there."""

    core: AttentionCore
    turn: Turn

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim, self.heads_per_group = cfg.kv_channels, cfg.heads_per_group
        self.linear_qkv = NormLinear(
            cfg.hidden_size,
            cfg.qkv_rows,
            cfg.norm_epsilon,
            bias=cfg.qkv_bias,
            layer_norm=cfg.normalization == "LayerNorm",
        )
        self.linear_proj = Linear(cfg.num_attention_heads * cfg.kv_channels, cfg.hidden_size, bias=cfg.linear_bias)
        self.q_layernorm = make_norm(cfg, cfg.kv_channels) if cfg.qk_layernorm else None
        self.k_layernorm = make_norm(cfg, cfg.kv_channels) if cfg.qk_layernorm else None
        self.core, self.kernels, self.turn = plain_attention, PLAIN, choose_turn(cfg)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] -> (x + added, the attention over that), both [T, H]. rotary: cos and sin [T, 1, dims]."""
        x, q, k, v = self.heads(x, *rotary, added)
        return x, self.linear_proj(self.core(q, k, v, segments).reshape(len(q), -1))

    def heads(
        self, x: Tensor, cos: Tensor, sin: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x + added, and what enters the core: q [T, heads, d], k and v [T, groups, d].

        Heads are counted from the weight: a rank may hold some of them.
        """
        x, qkv = self.linear_qkv.after_add(x, added)
        # Rows are ordered by query group: its query heads, then its key, then its value.
        grouped = qkv.view(qkv.shape[0], -1, self.heads_per_group + 2, self.head_dim)
        q_norm, k_norm = self.q_layernorm, self.k_layernorm
        if self.turn is rotate and q_norm is None:
            return x, *self.kernels.split_rotate(grouped, cos, sin)
        if self.turn is rotate and isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            weights = (q_norm.weight, k_norm.weight)
            return x, *self.kernels.split_norm_rotate(grouped, *weights, q_norm.epsilon, cos, sin)
        q, k, v = split_qkv(grouped)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return x, self.turn(q, cos, sin), self.turn(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: linear_fc2(silu(gate) * up), gate and up being the two halves of linear_fc1's rows."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.linear_fc1 = NormLinear(
            cfg.hidden_size,
            cfg.fc1_parts * cfg.ffn_hidden_size,
            cfg.norm_epsilon,
            bias=cfg.linear_bias,
            layer_norm=cfg.normalization == "LayerNorm",
        )
        self.linear_fc2 = Linear(cfg.ffn_hidden_size, cfg.hidden_size, bias=cfg.linear_bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, H] -> (x + added, the MLP of that), both [T, H]."""
        x, inner = self.linear_fc1.after_add(x, added)
        return x, self.linear_fc2.after_swiglu(inner)


class GeluMLP(MLP):
    """linear_fc2(gelu(linear_fc1)), the GELU by the error function."""

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, H] -> (x + added, the MLP of that), both [T, H]."""
        x, inner = self.linear_fc1.after_add(x, added)
        return x, self.linear_fc2(F.gelu(inner))


def make_mlp(cfg: ModelConfig) -> MLP:
    """The dense MLP of the model's kind."""
    return (MLP if cfg.swiglu else GeluMLP)(cfg)
