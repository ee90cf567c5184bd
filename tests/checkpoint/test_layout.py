"""The table between our parameters, Hugging Face's and Megatron-Core's is a bijection in every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from tiny_weights import FAMILY_TRAITS, config, config_of, configs

from megatron_swift.checkpoint.layout import hugging_face_tensors, tensor_specs
from megatron_swift.checkpoint.safetensors_io import SafetensorsFolder
from megatron_swift.models.decoder import build_decoder
from megatron_swift.testing import make_tiny_model


@given(configs())
@settings(max_examples=60, deadline=None)
def test_every_row_exactly_once(cfg):
    specs = tensor_specs(cfg)
    tensors = hugging_face_tensors(specs.values())
    ours, theirs = [], []
    for name, tensor in tensors.items():
        next_row = 0
        for part in tensor.parts:
            assert part.hf_start == next_row  # in order, without hole or overlap
            next_row += part.rows
            assert specs[part.name].shape[1:] == tensor.shape[1:]
            ours += [(part.name, row) for row in range(part.start, part.start + part.rows)]
        assert next_row == tensor.shape[0]
        theirs += [(name, row) for row in range(tensor.shape[0])]
    assert sorted(ours) == sorted((name, row) for name, spec in specs.items() for row in range(spec.shape[0]))
    assert len(theirs) == len(ours)


@given(configs())
@settings(max_examples=40, deadline=None)
def test_interleave_of_queries_keys_values(cfg):
    """megatron_checkpoint.md: rows of linear_qkv are, for each group, its q heads, then k, then v."""
    g, d, per_group = cfg.num_query_groups, cfg.kv_channels, cfg.heads_per_group
    q = torch.arange(g * per_group * d).view(g, per_group * d)
    k, v = torch.arange(g * d).view(g, d) + 10_000, torch.arange(g * d).view(g, d) + 20_000
    expected = torch.cat([q, k, v], dim=1).flatten()
    base = {"q_proj": 0, "k_proj": 10_000, "v_proj": 20_000}
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        rows = [
            base[block.hf_name.split(".")[-2]] + block.start + row
            for block in tensor_specs(cfg)[f"decoder.layers.0.self_attention.linear_qkv.{kind}"].blocks
            for row in range(block.rows)
        ]
        assert rows == expected.tolist()


def test_megatron_keys_of_the_document():
    cfg = config(qk_layernorm=True)
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (8,),
        "self_attention.linear_qkv.weight": (2 * (2 + 2) * 2, 8),
        "self_attention.linear_qkv.bias": (2 * (2 + 2) * 2,),
        "self_attention.linear_proj.weight": (8, 8),
        "self_attention.q_layernorm.weight": (2,),
        "self_attention.k_layernorm.weight": (2,),
        "mlp.linear_fc1.layer_norm_weight": (8,),
        "mlp.linear_fc1.weight": (12, 8),
        "mlp.linear_fc2.weight": (8, 6),
    }
    expected = {f"decoder.layers.{name}": shape for name, shape in layer.items()}
    expected |= {"embedding.word_embeddings.weight": (11, 8), "output_layer.weight": (11, 8)}
    expected |= {"decoder.final_layernorm.weight": (8,)}
    specs = tensor_specs(cfg).values()
    assert {spec.megatron_key: spec.shape for spec in specs} == expected
    assert sorted(s.layer for s in specs if s.megatron_key.endswith("fc2.weight")) == [0, 1]
    assert "output_layer.weight" not in tensor_specs(cfg.replace(tied_embeddings=True))


@pytest.mark.parametrize("family", sorted(FAMILY_TRAITS))
@pytest.mark.parametrize("tied", [True, False])
def test_table_is_the_model_and_the_folder(family, tied, tmp_path):
    folder = make_tiny_model(tmp_path, family=family, tied=tied)
    cfg = config_of(folder)
    model = build_decoder(cfg, dtype=torch.float32, device=torch.device("meta"))
    specs = tensor_specs(cfg)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {n: s.shape for n, s in specs.items()}
    files = SafetensorsFolder(folder)
    theirs = {name: tensor.shape for name, tensor in hugging_face_tensors(specs.values()).items()}
    assert theirs == {name: files.shape(name) for name in files.file_of}
