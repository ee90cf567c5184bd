"""What Megatron-LM wants in a checkpoint folder besides the tensors: `common.pt` and empty extra states.

A Transformer-Engine model asks for an extra state of each of its modules, and by default an absent one is fatal while one too many is
ignored: so every module that any version may ask for gets an empty one. We read none of this.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import torch

from megatron_swift.models.config import ModelConfig

COMMON = "common.pt"
CHECKPOINT_VERSION = 3.0  # Megatron-LM's, of the layout of fused weights


def common_file(cfg: ModelConfig, *, iteration: int, consumed_samples: int) -> bytes:
    """`common.pt`: plain values only, which Megatron's restricted reader takes too."""
    return _saved(common_values(cfg, iteration=iteration, consumed_samples=consumed_samples))


def common_values(cfg: ModelConfig, *, iteration: int, consumed_samples: int, parallel_size: int = 0) -> dict[str, Any]:
    """What `common.pt` holds.

    A torch_dist folder belongs to no layout, so the parallel sizes are 0, which no run has: Megatron-LM asks a folder of its own layout for
    random states and (core_r0.11) for the state of its rerun machine, which we do not have, and says "mismatch, ignored" otherwise.
    """
    args = argparse.Namespace(
        tensor_model_parallel_size=parallel_size,
        pipeline_model_parallel_size=parallel_size,
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        ffn_hidden_size=cfg.ffn_hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_query_groups=cfg.num_query_groups,
        kv_channels=cfg.kv_channels,
        padded_vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.max_position_embeddings,
        untie_embeddings_and_output_weights=not cfg.tied_embeddings,
        num_experts=cfg.moe.num_experts if cfg.moe is not None else None,
        add_position_embedding=True,
        vocab_file=None,
        no_save_optim=True,  # ours stands under keys of its own
        no_save_rng=True,
        consumed_train_samples=consumed_samples,
        consumed_valid_samples=0,
    )
    return {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }


def extra_states(cfg: ModelConfig) -> dict[str, bytes]:
    """Key -> bytes of every object that Megatron may ask for; nothing is in them."""
    empty = _saved([None])
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    mixed = cfg.moe is not None and not all(cfg.moe.sparse_layers)
    layers = cfg.num_layers
    for i in range(layers):
        at, place = (f"decoder.layers.{i}.", "shard_0_1") if mixed else ("decoder.layers.", f"shard_{i}_{layers}")
        names += [f"{at}{module}._extra_state/{place}" for module in _modules(cfg, i)]
        if cfg.is_sparse(i):
            assert cfg.moe is not None
            number = cfg.moe.num_experts
            for e in range(number):
                where = f"shard_{e}_{number}" if mixed else f"shard_{i}.{e}_{layers}.{number}"
                names += [f"{at}mlp.experts.experts.linear_fc{n}._extra_state/{where}" for n in (1, 2)]
    return dict.fromkeys(names, empty)


def _modules(cfg: ModelConfig, layer: int) -> list[str]:
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    if cfg.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    if not cfg.is_sparse(layer):
        return [*modules, "mlp.linear_fc1", "mlp.linear_fc2"]
    assert cfg.moe is not None
    shared = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"] if cfg.moe.shared_size else []
    return [*modules, "pre_mlp_layernorm", *shared]


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
