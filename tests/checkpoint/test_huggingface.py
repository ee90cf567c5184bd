"""Hugging Face folders: read by rows, checked key by key, written in a form that transformers reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_weights import FAMILY_TRAITS, config_of, edit_json

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights, parse_size, write_hugging_face
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.safetensors_io import INDEX
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError

ONE_FILE = 5_000_000_000


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "qwen2", tied=False)


@pytest.fixture
def copy(qwen2, tmp_path):
    return shutil.copytree(qwen2, tmp_path / "copy")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_slices_of_the_whole(qwen2, data):
    cfg = config_of(qwen2)
    source, specs = HuggingFaceWeights(qwen2, cfg), tensor_specs(cfg)
    spec = specs[data.draw(st.sampled_from(sorted(specs)))]
    start = data.draw(st.integers(0, spec.shape[0]))
    stop = data.draw(st.integers(start, spec.shape[0]))
    whole = source.read(spec)
    assert tuple(whole.shape) == spec.shape
    part = source.read(spec, start, stop)
    assert part.shape[1:] == whole.shape[1:] and torch.equal(part, whole[start:stop])


def _change(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), ["1 missing", NORM]),
        (lambda t: t.update({"model.layers.9.mlp.gate_proj.weight": torch.ones(1)}), ["1 unexpected", "layers.9"]),
        (lambda t: t.update({NORM: torch.ones(3)}), ["1 wrongly shaped", NORM, "(3,) instead of (64,)"]),
        (lambda t: t.update({NORM: torch.ones(1, 64)}), ["1 wrongly shaped", "(1, 64) instead of (64,)"]),
        (lambda t: [t.pop(k) for k in list(t) if ".1." in k], ["12 missing", "and 2 more"]),
        (
            lambda t: (t.pop(NORM), t.update({"x": torch.ones(1)}), t.update({"lm_head.weight": torch.ones(2, 64)})),
            ["1 missing", "1 unexpected: x", "1 wrongly shaped: lm_head.weight"],
        ),
    ],
)
def test_keys_that_do_not_fit(copy, change, words):
    _change(copy, change)
    with pytest.raises(CheckpointError) as error:
        HuggingFaceWeights(copy, config_of(copy))
    assert error.value.exit_code == 4
    for word in words:
        assert word in error.value.block()


def test_redundant_keys_are_allowed(tmp_path):
    folder = make_tiny_model(tmp_path, tied=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    HuggingFaceWeights(_change(folder, add), config_of(folder))
    edit_json(folder / "config.json", tie_word_embeddings=False)
    HuggingFaceWeights(folder, config_of(folder))  # now the head is one of its own
    _change(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="do not fit") as error:
        HuggingFaceWeights(folder, config_of(folder))
    assert "1 missing: lm_head.weight" in error.value.why


def _write(source, out, *, dtype="float32", max_shard_size=ONE_FILE):
    out.mkdir()
    cfg = config_of(source)
    write_hugging_face(
        HuggingFaceWeights(source, cfg), cfg, out, like=source, dtype=dtype, max_shard_size=max_shard_size
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("family", sorted(FAMILY_TRAITS))
@pytest.mark.parametrize("tied", [True, False])
def test_written_folder(family, tied, tmp_path):
    source = make_tiny_model(tmp_path / "in", family=family, tied=tied)
    (source / "README.md").write_text("stays behind")
    (source / "LICENSE").write_text("goes along")
    (source / "modeling_evil.py").write_text("stays behind")
    first = _write(source, tmp_path / "a")
    assert first == _write(source, tmp_path / "b")
    companions = {p.name: p.read_bytes() for p in source.iterdir() if p.suffix not in (".safetensors", ".md", ".py")}
    assert {name: data for name, data in first.items() if name != "model.safetensors"} == companions
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_change_touches_only_dtype(qwen2, tmp_path, dtype):
    _write(qwen2, tmp_path / "a", dtype=dtype)
    before, after = (json.loads((f / "config.json").read_text()) for f in (qwen2, tmp_path / "a"))
    assert after == before | {"torch_dtype": dtype} and list(after) == list(before)
    weights, whole = load_file(tmp_path / "a" / "model.safetensors"), load_file(qwen2 / "model.safetensors")
    torch_dtype = getattr(torch, dtype)
    assert all(torch.equal(weights[name], whole[name].to(torch_dtype)) for name in whole)
    assert {w.dtype for w in weights.values()} == {torch_dtype}


def test_dtype_key_of_transformers_5(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    del config["torch_dtype"]
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    _write(copy, tmp_path / "a", dtype="bfloat16")
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == config | {"dtype": "bfloat16"}


def test_shards_and_index(qwen2, tmp_path):
    limit = 100_000
    files = _write(qwen2, tmp_path / "many", max_shard_size=limit)
    assert files == _write(qwen2, tmp_path / "again", max_shard_size=limit)
    names = sorted(name for name in files if name.endswith(".safetensors"))
    count = len(names)
    assert count > 2 and names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index, whole = json.loads(files[INDEX]), load_file(qwen2 / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    found = {}
    for name in names:
        part = load_file(tmp_path / "many" / name)
        assert {index["weight_map"][key] for key in part} == {name}
        assert sum(t.numel() * 4 for t in part.values()) <= limit or len(part) == 1
        found |= part
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    cfg = config_of(qwen2)
    one, many = HuggingFaceWeights(qwen2, cfg), HuggingFaceWeights(tmp_path / "many", cfg)
    assert all(torch.equal(one.read(spec), many.read(spec)) for spec in tensor_specs(cfg).values())
    big = files[max(names, key=lambda n: len(files[n]))]
    (tmp_path / "many" / names[1]).write_bytes(big[:50])
    with pytest.raises(CheckpointError, match=names[1]):
        HuggingFaceWeights(tmp_path / "many", cfg)


@pytest.mark.parametrize("family", sorted(FAMILY_TRAITS))
def test_transformers_gives_equal_logits(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_tiny_model(tmp_path / "in", family=family)
    _write(source, tmp_path / "out", max_shard_size=60_000)
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = []
    for folder in (source, tmp_path / "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode([1, 2, 3])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("1.5 MB", 1_500_000),
        ("200kb", 200_000),
        ("7", 7),
        ("1KiB", 1024),
        ("1.5GiB", 3 * 2**29),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1MB", "1e3"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
