"""Rotary position embedding: frequencies (plain, linear, llama3, yarn) and their application to queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_swift.models.config import ModelConfig


def inverse_frequencies(cfg: ModelConfig) -> tuple[Tensor, float]:
    """(inverse frequencies float32 [rotary dims / 2], factor for cos and sin).

    The float32 arithmetic is the one of transformers, so that both give the same angles.
    """
    half = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / cfg.rotary_dim
    plain = 1.0 / (cfg.rotary_base**half)
    if cfg.rope_scaling is None:
        return plain, 1.0
    kind = cfg.rope_scaling["rope_type"]
    if kind == "linear":
        return plain / cfg.rope_scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, cfg.rope_scaling), 1.0
    assert kind == "yarn", kind
    return _yarn(plain, cfg)


def _llama3(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: wavelengths beyond the original context are divided by `factor`, short ones kept, a linear ramp between.

    Source: behaviour of config.json's rope_type llama3, spec section 2.10.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / factor, between)
    return torch.where(wavelength < original / high, plain, scaled)


def _yarn(plain: Tensor, cfg: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3): interpolate slow dimensions, keep fast ones, ramp between two rotation counts."""
    scaling = cfg.rope_scaling
    assert scaling is not None
    original = scaling.get("original_max_position_embeddings") or cfg.max_position_embeddings
    factor = scaling.get("factor") or cfg.max_position_embeddings / original

    def dimension(rotations: float) -> float:
        return cfg.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rotary_base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.rotary_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(cfg.rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_factor(scaling, factor)


def _yarn_factor(scaling: dict[str, Any], factor: float) -> float:
    """YaRN's attention temperature, applied to cos and sin: 0.1 * ln(factor) + 1 unless config.json says otherwise."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


class Rotary:
    """Angles for a packed row; of no dims where the model has no rotation.

    Not a module: the frequencies must stay float32 on a real device, whatever happens to the parameters (meta device, bfloat16).
    """

    def __init__(self, cfg: ModelConfig):
        self.inverse, self.factor = inverse_frequencies(cfg)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, sin [T, 1, rotary dims] in `dtype`; the angles are float32."""
        if self.inverse.device != positions.device:
            self.inverse = self.inverse.to(positions.device)
        angles = positions.to(torch.float32)[:, None] * self.inverse
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)
