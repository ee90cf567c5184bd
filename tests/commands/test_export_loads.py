"""A folder that export has written is what transformers and vLLM expect, and `megatron export` is what it says it is."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from megatron_swift import cli
from megatron_swift import launch as launching
from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.commands import export
from megatron_swift.testing import make_tiny_model

FAMILIES = ("qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe", "mixtral")


def exported(tmp_path, family, *flags):
    """A model there and back; the model and the folder that came of it."""
    model = make_tiny_model(tmp_path / "model", family=family, tied=False, dtype="bfloat16", vocab_size=512)
    to_mcore = ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]
    to_hf = ["--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true", "--output_dir", str(tmp_path / "hf"), *flags]
    for argv in (to_mcore, to_hf):
        export.run(parse(ExportArguments, argv))
    return model, tmp_path / "hf"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_and_answers(tmp_path, family):
    """In several files, by AutoModelForCausalLM and AutoTokenizer alone: the same tokens as the original's."""
    transformers = pytest.importorskip("transformers")
    model, folder = exported(tmp_path, family, "--max_shard_size", "100KB")
    answers = []
    for place in (model, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        network, info = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        question = [{"role": "user", "content": "who are you"}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = network.generate(**ids, max_new_tokens=8, do_sample=False)
        assert found.shape[1] > ids["input_ids"].shape[1]
        answers.append(found.tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_what_vllm_asks_of_a_folder(tmp_path, family, shard_size):
    """docs/checkpoints.md, "Export", says where the list is from."""
    _, folder = exported(tmp_path, family, "--max_shard_size", shard_size)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family and len(config["architectures"]) == 1
    assert config["architectures"][0].endswith("ForCausalLM") and config["torch_dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).is_file()
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert not [path for pattern in ("*.bin", "*.pt", "*.pth", "*.py") for path in folder.glob(pattern)]
    weights = sorted(folder.glob("*.safetensors"))
    assert (len(weights) == 1) == (shard_size == "5GB")
    held = {}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), path.name)
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (len(weights) > 1)
    if index.is_file():  # vLLM loads all files that are there, and leaves out those that the index does not name
        assert json.loads(index.read_text())["weight_map"] == held
    if family == "qwen3_moe":  # expert by expert, as vLLM's loaders of mixtures have them
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in held


@pytest.mark.parametrize("program", ["megatron", "swift"])
def test_help_says_how_it_was_called(capsys, program):
    assert cli.main(program, ["export", "--help"]) == 0
    said = capsys.readouterr().out
    other = {"megatron": "swift", "swift": "megatron"}[program]
    assert said.startswith(f"usage: {program} export ") and f"\n  {program} export --model" in said
    assert f"{other} export" not in said


def test_more_ranks_than_gpus(tmp_path, monkeypatch):
    """Its work is on the CPU, and no rank may make a CUDA context."""
    model, found = make_tiny_model(tmp_path / "model"), []
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(launching, "visible_gpus", lambda env: 1)
    monkeypatch.setattr(cli, "launch", lambda *_, job: found.append((job, os.environ["CUDA_VISIBLE_DEVICES"])) or 0)
    flags = ["--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "out")]
    assert cli.main("megatron", ["export", *flags]) == 0
    assert found == [(launching.EXPORT, "")]
