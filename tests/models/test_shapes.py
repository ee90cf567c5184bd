"""Every shape of model against the formulas, written out head by head and token by token; and what its parameters are called."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.config import ModelConfig
from shapes import SHAPES, random_decoder, shape

TOKENS = torch.from_numpy(np.random.default_rng(2).integers(0, 263, 19))
DENSE = [name for name in SHAPES if SHAPES[name].moe is None]


def by_formula(cfg: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of one sequence, with nothing but matrix products and elementwise functions."""
    length, d, groups = len(tokens), cfg.kv_channels, cfg.num_query_groups
    x = weights["embedding.word_embeddings.weight"][tokens]
    if cfg.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][:length]

    def norm(y: Tensor, name: str) -> Tensor:
        centred = y - y.mean(-1, keepdim=True) if cfg.normalization == "LayerNorm" else y
        scaled = (
            centred / (centred.square().mean(-1, keepdim=True) + cfg.norm_epsilon).sqrt() * weights[f"{name}weight"]
        )
        return scaled + weights[f"{name}bias"] if cfg.normalization == "LayerNorm" else scaled

    def linear(y: Tensor, name: str, *, bias: bool) -> Tensor:
        return y @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if bias else 0)

    def turned(y: Tensor) -> Tensor:
        size = int(d * cfg.rotary_percent)
        if cfg.position_embedding_type != "rope":
            return y
        parts = [y[:, size:]]
        first, second = y[:, : size // 2], y[:, size // 2 : size]
        frequency = torch.tensor([cfg.rotary_base ** (-2 * i / size) for i in range(size // 2)]).float()
        angle = (torch.arange(length).float()[:, None] * frequency).double()
        parts = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), *parts]
        return torch.cat(parts, 1)

    for layer in range(cfg.num_layers):
        at = f"decoder.layers.{layer}."
        inner = norm(x, f"{at}self_attention.linear_qkv.layer_norm_")
        qkv = linear(inner, f"{at}self_attention.linear_qkv", bias=cfg.qkv_bias).view(length, groups, -1, d)
        heads = []
        for head in range(cfg.num_attention_heads):
            group, place = divmod(head, cfg.num_attention_heads // groups)
            q, k, v = qkv[:, group, place], qkv[:, group, -2], qkv[:, group, -1]
            if cfg.qk_layernorm:
                q, k = norm(q, f"{at}self_attention.q_layernorm."), norm(k, f"{at}self_attention.k_layernorm.")
            scores = turned(q) @ turned(k).T / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf)
            heads.append(scores.softmax(1) @ v)
        x = x + linear(torch.cat(heads, 1), f"{at}self_attention.linear_proj", bias=cfg.linear_bias)
        inner = linear(norm(x, f"{at}mlp.linear_fc1.layer_norm_"), f"{at}mlp.linear_fc1", bias=cfg.linear_bias)
        if cfg.swiglu:
            gate, up = inner.chunk(2, 1)
            inner = gate / (1 + (-gate).exp()) * up
        else:
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, f"{at}mlp.linear_fc2", bias=cfg.linear_bias)
    x = norm(x, "decoder.final_layernorm.")
    return x @ weights["embedding.word_embeddings.weight" if cfg.tied_embeddings else "output_layer.weight"].T


@pytest.mark.parametrize("name", DENSE)
def test_logits_are_the_formulas(name):
    model = random_decoder(SHAPES[name])
    weights = {key: value.detach() for key, value in model.named_parameters()}
    expected = by_formula(model.cfg, weights, TOKENS)
    hidden = model.hidden_states(TOKENS, torch.arange(19), Segments.of([19], TOKENS.device))
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_table(name):
    found = {key: tuple(value.shape) for key, value in random_decoder(SHAPES[name]).named_parameters()}
    assert found == {key: spec.shape for key, spec in tensor_specs(SHAPES[name]).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_is_used(name):
    model = random_decoder(SHAPES[name])
    hidden = model.hidden_states(TOKENS, torch.arange(19), Segments.of([19], TOKENS.device))
    model.logits(hidden).square().sum().backward()
    idle = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


def test_active_parameters_are_the_matrices_of_a_layer():
    for cfg in (shape(), shape(swiglu=False, linear_bias=True, qkv_bias=True, normalization="LayerNorm")):
        layer = [s.shape for n, s in tensor_specs(cfg).items() if ".layers.0." in n and len(s.shape) == 2]
        assert cfg.active_parameters(0) == sum(math.prod(s) for s in layer)
