"""`megatron pt` and models from scratch: what is made, saved, resumed, exported, and how inference goes on with it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from runs import WORDS, Result, _rank, contents, differences

from megatron_swift.args.commands import (
    ExportArguments,
    InferArguments,
    PtArguments,
    SftArguments,
    TrainArguments,
    parse,
)
from megatron_swift.commands import export, infer
from megatron_swift.commands.setup import RunSetup, prepare_run
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.utils.errors import CheckpointError, UsageError

SIZES = ("--num_layers", "4", "--hidden_size", "32", "--num_attention_heads", "4", "--num_query_groups", "2")
BASE = ("--train_iters", "3", "--global_batch_size", "4", "--lr", "1e-2", "--max_length", "64", "--report_to", "none")
BASE += ("--num_workers", "0", "--log_interval", "1", "--split_dataset_ratio", "0", "--no_initialization", "false")
GPT2 = (
    "--normalization",
    "LayerNorm",
    "--swiglu",
    "false",
    "--disable_bias_linear",
    "false",
    "--hidden_dropout",
    "0.1",
)
GPT2 += ("--position_embedding_type", "learned_absolute", "--untie_embeddings_and_output_weights", "false")
GPT2 += ("--num_query_groups", "4", "--attention_dropout", "0.2")
EXPERTS = ("--num_experts", "4", "--moe_ffn_hidden_size", "16", "--moe_shared_expert_intermediate_size", "24")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer and nothing else."""
    folder = make_tiny_model(tmp_path_factory.mktemp("t") / "tokenizer")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("d") / "texts.jsonl"
    rows = [{"text": " ".join(WORDS[(i * 5 + j) % 16] for j in range(5 + 37 * i % 150))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settle(tokenizer, texts, tmp_path):
    """prepare_run of `megatron pt` (or another kind) with flags; later flags replace earlier ones."""

    def start(*flags: str, kind: type[TrainArguments] = PtArguments, ranks: int = 1, base=(*BASE, *SIZES)) -> RunSetup:
        given = ("--model", str(tokenizer), "--dataset", str(texts), "--save", str(tmp_path / "out"), *base, *flags)
        env = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
        return prepare_run(parse(kind, given, warn=False), env)

    return start


def train(setup: RunSetup, ranks: int = 1) -> Result:
    (steps, error), *_ = run_ranks(_rank, ranks, setup, timeout=100)
    if error is not None:
        raise error
    assert setup.run_dir is not None
    return Result(setup.run_dir, steps)


def test_defaults_without_a_config(settle, tokenizer):
    setup = settle()
    model = setup.model
    assert (model.ffn_hidden_size, model.kv_channels, model.norm_epsilon, model.rotary_base) == (64, 8, 1e-5, 1e4)
    assert (model.qkv_bias, model.tied_embeddings, model.qk_layernorm, model.linear_bias) == (True, False, False, False)
    assert model.vocab_size == 384 and model.max_position_embeddings == 64 and model.dtype == "float32"
    assert setup.scratch and setup.template == "generation" and setup.args.packing
    carried = json.loads((setup.run_dir / "huggingface" / "config.json").read_text())
    assert carried["architectures"] == ["Qwen2ForCausalLM"] and carried["eos_token_id"] is not None
    args = json.loads((setup.run_dir / "args.json").read_text())
    assert args["model"] == str(setup.run_dir / "huggingface") and args["use_chat_template"] is False


FLAGS = {
    "--ffn_hidden_size 48": {"ffn_hidden_size": 48},
    "--swiglu false": {"swiglu": False, "ffn_hidden_size": 128},
    "--kv_channels 10": {"kv_channels": 10},
    "--group_query_attention true --num_query_groups 1": {"num_query_groups": 1},
    "--max_position_embeddings 100": {"max_position_embeddings": 100},
    "--position_embedding_type none": {"position_embedding_type": "none"},
    "--position_embedding_type learned_absolute": {"position_embedding_type": "learned_absolute"},
    "--rotary_base 500": {"rotary_base": 500.0},
    "--rotary_percent 0.25": {"rotary_percent": 0.25, "rotary_dim": 2},
    '--rope_scaling {"rope_type":"linear","factor":2.0}': {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "--normalization LayerNorm": {"normalization": "LayerNorm"},
    "--norm_epsilon 1e-3": {"norm_epsilon": 1e-3},
    "--disable_bias_linear false": {"linear_bias": True, "qkv_bias": True},
    "--add_qkv_bias false": {"qkv_bias": False},
    "--qk_layernorm true": {"qk_layernorm": True},
    "--untie_embeddings_and_output_weights false": {"tied_embeddings": True},
    "--padded_vocab_size 600": {"vocab_size": 600},
    "--torch_dtype bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_describes_the_model(settle, flags):
    model = settle(*flags.split()).model
    assert {name: getattr(model, name) for name in FLAGS[flags]} == FLAGS[flags]


def test_group_query_attention_false_is_one_key_for_each_query(settle):
    base = (*BASE, *SIZES[:-2])
    assert settle("--group_query_attention", "false", base=base).model.num_query_groups == 4
    assert settle(base=base).model.num_query_groups == 4


def test_experts_by_flags(settle):
    moe = settle(*EXPERTS, "--moe_layer_freq", "[1,0,1,1]", "--moe_router_topk", "3").model.moe
    assert (moe.num_experts, moe.ffn_hidden_size, moe.shared_size, moe.topk) == (4, 16, 24, 3)
    assert moe.sparse_layers == (True, False, True, True) and not moe.pre_softmax


REFUSED = {
    "--rotary_percent 0.4": "turned in pairs",
    "--disable_bias_linear false --add_qkv_bias false": "contradicts",
    "--disable_bias_linear false --num_experts 4": "experts have no bias",
    "--group_query_attention false": "contradicts --num_query_groups 2",
    "--num_query_groups 3": "not a multiple",
    "--hidden_size 62": "--hidden_size 62 is not a multiple of --num_attention_heads",
    "--attention_dropout 0.1 --attention_backend flash": "excludes --attention_backend flash",
    "--attention_dropout 0.1 --attention_backend cudnn": "excludes --attention_backend cudnn",
    "--moe_router_topk 2": "needs --num_experts",
    '--rope_scaling {"rope_type":"llama3"}': "needs factor",
    '--rope_scaling {"rope_type":"dynamic"}': "is not one of",
    "--max_length 128 --max_position_embeddings 64": "more than the model's 64",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_built(settle, flags):
    with pytest.raises(UsageError, match=REFUSED[flags]):
        settle(*flags.split())


def test_what_is_missing(settle):
    with pytest.raises(UsageError, match="--num_layers, --hidden_size, --num_attention_heads are not given"):
        settle(base=BASE)
    with pytest.raises(CheckpointError, match="holds no weights"):
        settle("--no_initialization", "true")


@pytest.mark.parametrize("flags", [(), GPT2, EXPERTS], ids=["llama", "gpt2", "experts"])
def test_layouts_begin_and_go_alike(settle, flags):
    """One process and four ranks: the same initial weights, losses and norms; dropout, where there is any, too."""
    one = train(settle(*flags))
    sizes = ("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2", "--sequence_parallel", "true")
    four = train(settle(*flags, *sizes, ranks=4), ranks=4)
    for place in (0, 1):
        assert four.values(place) == pytest.approx(one.values(place), rel=2e-5)
    assert one.values(0)[0] == pytest.approx(5.95, abs=0.1) and one.values(0)[-1] < one.values(0)[0] - 0.05


def test_dropout_resumes_bit_for_bit(settle):
    whole = train(settle(*GPT2))
    train(first := settle(*GPT2, "--train_iters", "2", "--lr_decay_iters", "3"))
    rest = train(settle(*GPT2, "--lr_decay_iters", "3", "--load", str(first.run_dir)))
    assert rest.steps == whole.steps[2:]
    assert not [
        n for n in differences(contents(rest.run_dir, 3), contents(whole.run_dir, 3)) if not n.endswith(".json")
    ]


def convert(run_dir: Path, out: Path) -> Path:
    export.run(parse(ExportArguments, ["--mcore_model", str(run_dir), "--to_hf", "true", "--output_dir", str(out)]))
    return out


def answers(folder: Path, texts: Path, results: Path) -> list[str]:
    flags = ["--model", str(folder), "--val_dataset", str(texts), "--result_path", str(results), "--temperature", "0"]
    infer.run(parse(InferArguments, [*flags, "--max_new_tokens", "5", "--val_dataset_sample", "3"]))
    return [json.loads(line)["response"] for line in results.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in ("the of", "you", "and to in is")))
    return path


def test_inference_continues_text_as_transformers_does(settle, tmp_path, prompts):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    folder = convert(train(settle()).run_dir, tmp_path / "hf")
    found = answers(folder, prompts, tmp_path / "r.jsonl")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line, text in zip(found, ("the of", "you", "and to in is"), strict=True):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert line == tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("flags", [GPT2, (*EXPERTS, "--position_embedding_type", "none")], ids=["gpt2", "experts"])
def test_a_model_that_transformers_does_not_know(settle, tmp_path, prompts, caplog, flags):
    """It is said at the start; the folder made of it answers, and trains on; a Megatron checkpoint comes of it again."""
    with caplog.at_level(logging.WARNING, "megatron_swift"):
        setup = settle(*flags)
    assert "transformers has no architecture" in caplog.text
    run = train(setup)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "megatron_swift"):
        folder = convert(run.run_dir, tmp_path / "hf")
    assert "transformers has no such architecture" in caplog.text
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MegatronSwiftForCausalLM"]
    assert len(answers(folder, prompts, tmp_path / "r.jsonl")) == 3
    flags = ["--model", str(folder), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]
    export.run(parse(ExportArguments, flags))
    again, trained = contents(tmp_path / "mcore", 1), contents(run.run_dir, 3)
    assert not {n for n in differences(again, trained) if n in again and not n.endswith(".json")}
    more = settle("--model", str(folder), "--no_initialization", "true", base=BASE)
    assert more.model == setup.model and not more.scratch
    train(more)


def test_a_run_is_known_by_its_own_folder(settle, tmp_path, texts):
    """Neither flags nor the first folder are needed again; sft takes the weights, and not the template of text."""
    run = train(setup := settle(*GPT2))
    args = ["--load", str(run.run_dir), "--dataset", str(texts), "--finetune", "true", "--save", str(tmp_path / "more")]
    args += [*BASE[:-2], "--template", "chatml"]
    more = prepare_run(parse(SftArguments, args, warn=False), {})
    assert more.model == setup.model and more.template == "chatml" and more.load == run.run_dir
    assert more.args.truncation_strategy is None
    text = prepare_run(parse(PtArguments, args[:-2], warn=False), {})
    assert text.template == "generation" and text.args.truncation_strategy == "split"
    moved = tmp_path / "moved"
    shutil.move(run.run_dir, moved)
    args[1] = str(moved)
    assert prepare_run(parse(PtArguments, args[:-2], warn=False), {}).model == setup.model


def test_a_config_without_weights(tmp_path, settle):
    """--no_initialization false with a model's folder: its config.json, with changes over it, and new weights."""
    folder = make_tiny_model(tmp_path / "qwen3", family="qwen3", layers=2)
    (folder / "model.safetensors").unlink()
    setup = settle("--model", str(folder), base=BASE)
    assert setup.model.qk_layernorm and setup.model.kv_channels == 32 and setup.scratch
    assert json.loads((setup.run_dir / "huggingface" / "config.json").read_bytes()) == json.loads(
        (folder / "config.json").read_bytes()
    )
    train(setup)
    changed = settle("--model", str(folder), "--num_layers", "3", "--qk_layernorm", "false", base=BASE)
    written = json.loads((changed.run_dir / "huggingface" / "config.json").read_text())
    assert changed.model.num_layers == written["num_hidden_layers"] == 3
    assert written["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match="holds no weights"):
        settle("--model", str(folder), "--no_initialization", "true", base=BASE)


def test_weights_in_the_folder_are_not_read(tmp_path, settle):
    folder = make_tiny_model(tmp_path / "llama", family="llama", layers=2)
    fresh = train(settle("--model", str(folder), base=BASE))
    further = train(settle("--model", str(folder), "--no_initialization", "true", base=BASE))
    assert fresh.values(0)[0] == pytest.approx(6.11, abs=0.1) != further.values(0)[0]
