"""New models as config.json: the architecture that takes them, the way back, and transformers as the judge of what is written."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_swift.checkpoint.huggingface import write_hugging_face
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.families import FAMILIES, NATIVE, family_of
from megatron_swift.testing import make_tiny_model
from shapes import BIASED, LAYERS, SHAPES, RandomWeights, experts, random_decoder, shape

LAYER_NORM = {"normalization": "LayerNorm"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
MIXED = tuple(i % 2 == 0 for i in range(LAYERS))
# What the flags describe, and the architecture that takes it.
FITS = {
    "llama": shape(),
    "llama-biased-scaled": shape(**BIASED, rope_scaling=LLAMA3),
    "llama-heads": shape(kv_channels=12, tied_embeddings=True),
    "qwen2": shape(qkv_bias=True),
    "qwen3": shape(qk_layernorm=True, kv_channels=16),
    "qwen3_moe": shape(qk_layernorm=True, moe=experts(sparse_layers=MIXED)),
    "qwen3_moe-pre": shape(qk_layernorm=True, moe=experts(pre_softmax=True)),
    "qwen2_moe": shape(qkv_bias=True, moe=experts(shared_size=16, pre_softmax=True)),
    "mixtral": shape(ffn_hidden_size=24, moe=experts()),
    "phi3": shape(rotary_percent=0.5),
    "stablelm": shape(**LAYER_NORM, rotary_percent=0.25, qkv_bias=True),
    "stablelm-whole": shape(**LAYER_NORM),
    "stablelm-tied": SHAPES["partial"],
    "starcoder2": shape(**LAYER_NORM, **BIASED, swiglu=False),
    "starcoder2-plain": shape(**LAYER_NORM, swiglu=False, tied_embeddings=True),
}
MISFITS = {
    **{name: cfg for name, cfg in SHAPES.items() if name != "partial"},
    "no-shared": shape(qkv_bias=True, moe=experts()),
    "odd-heads": shape(rotary_percent=0.5, kv_channels=12),
    "norms": shape(**LAYER_NORM, qk_layernorm=True),
    "rms-gelu": shape(swiglu=False),
}


@pytest.mark.parametrize("name", FITS)
def test_the_architecture_that_fits(name):
    family, cfg, written = family_of(FITS[name])
    assert family.name == name.split("-")[0]
    assert family.read_config(json.loads(json.dumps(written))) == cfg


@pytest.mark.parametrize("name", MISFITS)
def test_no_architecture_fits(name):
    family, cfg, written = family_of(MISFITS[name])
    assert family is NATIVE and cfg == MISFITS[name]
    assert NATIVE.read_config(json.loads(json.dumps(written))) == cfg


def test_a_family_that_fits_stays():
    assert family_of(shape(qkv_bias=False), FAMILIES["llama"])[0].name == "llama"
    assert family_of(shape(qkv_bias=True), FAMILIES["llama"])[0].name == "qwen2"
    assert family_of(shape(), FAMILIES["phi3"])[0].name == "phi3"


@pytest.mark.parametrize("name", FITS)
def test_transformers_computes_the_same(name, tmp_path):
    from transformers import AutoModelForCausalLM

    _, cfg, written = family_of(FITS[name])
    like, out = make_tiny_model(tmp_path / "like"), tmp_path / "out"
    (like / "config.json").write_text(json.dumps(written))
    out.mkdir()
    write_hugging_face(RandomWeights(), cfg, out, like=like, dtype="float32", max_shard_size=10**9)
    exact = torch.float32 if cfg.moe else torch.float64  # transformers' grouped experts know no float64
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=exact, attn_implementation="eager").eval()
    ours = random_decoder(cfg, torch.float32).to(exact)
    tokens = torch.randint(0, cfg.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours.logits(ours.hidden_states(tokens, torch.arange(40), Segments.of([40], tokens.device)))
        expected = theirs(tokens[None], use_cache=False).logits[0]
    tolerance = 2e-5 if cfg.moe else 2e-6  # the angles of rope are float32 on both sides
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)
