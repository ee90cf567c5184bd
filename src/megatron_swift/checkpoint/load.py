"""A whole model from a folder of weights, in one process."""

from __future__ import annotations

import torch

from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.weights import WeightSource
from megatron_swift.kernels.grouped_linear import choose_grouped
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder, build_decoder


def load_decoder(source: WeightSource, cfg: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A Decoder with the source's weights, cast to `dtype`; one tensor is in memory twice at a time."""
    model = build_decoder(cfg, dtype=dtype, device=device)
    if cfg.moe is not None:
        sizes = (cfg.hidden_size, cfg.moe.ffn_hidden_size)
        product, _ = choose_grouped(True, dtype=dtype, device=device, sizes=sizes)
        for layer in model.sparse:
            layer.experts.product = product
    specs = tensor_specs(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(specs[name]))
    return model.requires_grad_(False)
