"""config.json in its old and new spellings, and what is refused."""

from __future__ import annotations

import json

import pytest

from megatron_swift.models.config import read_dtype, read_rope
from megatron_swift.models.families import FAMILIES, describe
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, UsageError

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture
def folder(tmp_path):
    return make_tiny_model(tmp_path / "model", vocab_size=263, hidden_size=32, intermediate_size=32)


def change(folder, **changes) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}
    path.write_text(json.dumps(config))


def read(folder):
    return describe(folder, model_type=None, template="chatml", chat_template=None).config


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5}, (5.0, None)),
        ({"rope_theta": 5, "rope_scaling": None}, (5.0, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, (7.0, None)),
        ({"rope_theta": 5, "rope_scaling": {"type": "yarn", "factor": 4.0}}, (5.0, YARN)),
        ({"rope_parameters": {**YARN, "rope_theta": 7.0}}, (7.0, YARN)),
    ],
)
def test_rope(hf, expected):
    assert read_rope(hf) == expected


@pytest.mark.parametrize(
    ("hf", "expected"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "torch.float16"}, "float16"), ({}, "float32")],
)
def test_dtype(hf, expected):
    assert read_dtype(hf) == expected


def test_fields(folder):
    cfg = read(folder)
    assert (cfg.num_layers, cfg.hidden_size, cfg.num_attention_heads, cfg.num_query_groups) == (2, 32, 4, 2)
    assert (cfg.kv_channels, cfg.heads_per_group, cfg.qkv_rows) == (8, 2, 64)
    assert cfg.tied_embeddings and cfg.qkv_bias and not cfg.qk_layernorm
    change(folder, num_key_value_heads=None, max_position_embeddings=None, tie_word_embeddings=None)
    assert (read(folder).num_query_groups, read(folder).max_position_embeddings) == (4, 2048)
    assert not read(folder).tied_embeddings


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "not supported"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
    ],
)
def test_what_cannot_be_computed_is_refused(folder, changes, word):
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=word):
        read(folder)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_broken_config(folder, text):
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "family", "model_type", "template"),
    [
        ("Qwen2.5-7B-Instruct", "qwen2", "qwen2_5", "qwen2_5"),
        ("Qwen2.5-Math-7B", "qwen2", "qwen2_5_math", "qwen2_5_math"),
        ("QwQ-32B", "qwen2", "qwq", "qwq"),
        ("DeepSeek-R1-Distill-Qwen-7B", "qwen2", "deepseek_r1_distill", "deepseek_r1"),
        ("Qwen3-8B", "qwen3", "qwen3", "qwen3"),
        ("Llama-3.1-8B-Instruct", "llama", "llama3_1", "llama3_2"),
        ("Meta-Llama-3-8B", "llama", "llama3", "llama3"),
        ("SmolLM2-135M-Instruct", "llama", "smollm", "chatml"),
    ],
)
def test_model_type_from_the_folder_name(folder, name, family, model_type, template):
    change(folder, architectures=list(FAMILIES[family].architectures))
    moved = folder.rename(folder.with_name(name))
    found = describe(moved, model_type=None, template=None, chat_template=None)
    assert (found.family.name, found.model_type, found.template) == (family, model_type, template)


def test_an_unknown_folder_name_is_asked_about(folder):
    with pytest.raises(UsageError, match="cannot tell which chat template"):
        describe(folder, model_type=None, template=None, chat_template=None)
    found = describe(folder, model_type=None, template=None, chat_template="x <|im_start|> y")
    assert found.template == "chatml"
    with pytest.raises(UsageError, match="nonsense"):
        describe(folder, model_type="nonsense", template=None, chat_template=None)
