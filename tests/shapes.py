"""Models described by flags alone, whatever their shape, with random weights: for the tests of models, parallel and checkpoint."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.models.decoder import Decoder, build_decoder
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.train.state import load_weights

LAYERS, VOCAB = 4, 263


def shape(**changes) -> ModelConfig:
    """A small model of Llama's kind, changed."""
    base = ModelConfig(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_layernorm=False,
        dtype="float32",
    )
    return base.replace(**changes)


def experts(**changes) -> MoEConfig:
    base = {"num_experts": 4, "topk": 2, "ffn_hidden_size": 24, "shared_size": 0, "pre_softmax": False}
    return MoEConfig(**{**base, "sparse_layers": (True,) * LAYERS, **changes})


BIASED = {"qkv_bias": True, "linear_bias": True}
SHAPES = {
    "gpt2": shape(
        normalization="LayerNorm",
        swiglu=False,
        position_embedding_type="learned_absolute",
        num_query_groups=4,
        tied_embeddings=True,
        **BIASED,
    ),
    "neox": shape(normalization="LayerNorm", swiglu=False, rotary_percent=0.25, qk_layernorm=True, **BIASED),
    "nowhere": shape(position_embedding_type="none", qk_layernorm=True, **BIASED),
    "partial": shape(rotary_percent=0.5, normalization="LayerNorm", tied_embeddings=True),
    "gelu": shape(swiglu=False, kv_channels=6, qkv_bias=True),
    "experts": shape(
        swiglu=False,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        moe=experts(shared_size=16, sparse_layers=(True, False, True, True)),
    ),
}


class RandomWeights:
    """A source of weights: norms near 1, biases and matrices random, each by the parameter's name alone."""

    def read(
        self, spec: TensorSpec, start: int = 0, stop: int | None = None, *, columns: tuple[int, int] | None = None
    ) -> Tensor:
        key = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:7], "little")
        whole = torch.randn(spec.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
        if len(spec.shape) == 1:
            whole = 0.3 * whole + (0 if spec.name.endswith("bias") else 1)
        else:
            whole = whole * (0.5 if spec.name.endswith("router.weight") else 0.15)
        rows = whole[start : spec.shape[0] if stop is None else stop]
        return rows if columns is None else rows[:, slice(*columns)]


def random_decoder(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    """The model with its random weights, in one process."""
    model, specs = build_decoder(cfg, dtype=dtype, device=torch.device("cpu")), tensor_specs(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(RandomWeights().read(specs[name]))
    return model


def random_engine(cfg: ModelConfig, mesh: Mesh | None = None, dtype: torch.dtype = torch.float64, **options) -> Engine:
    """An engine with the random weights, in one process unless a mesh is given."""
    mesh = mesh or mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = build_engine(cfg, mesh, EngineOptions(compute_dtype=dtype, **options))
    load_weights(engine.shards, tensor_specs(cfg), RandomWeights())
    return engine
