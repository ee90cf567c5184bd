"""Mixtures of experts through the commands: what the arguments change, sft and resume in several layouts, export, infer."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
import torch
from runs import contents, differences, go, set_up, write_rows
from safetensors.torch import load_file

from megatron_swift.args.commands import ExportArguments, InferArguments, parse
from megatron_swift.checkpoint.huggingface import HuggingFaceWeights, write_hugging_face
from megatron_swift.checkpoint.publish import iteration_folder
from megatron_swift.commands import export, infer
from megatron_swift.models.families import describe
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import UsageError

MODELS = {
    "qwen3_moe": {"layers": 2},
    "qwen2_moe": {"layers": 3, "mlp_only_layers": [1], "dtype": "bfloat16"},
    "mixtral": {"layers": 2, "dtype": "bfloat16"},
    "qwen2": {"layers": 2},
}
EP2 = ("--expert_model_parallel_size", "2", "--moe_aux_loss_coeff", "0.01", "--moe_z_loss_coeff", "0.001")
ALONE = EP2[2:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    for family, config in MODELS.items():
        make_tiny_model(folder / family, family=family, tied=False, **config)
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def flags(place, tmp_path):
    """The arguments of a run of a model, saved below tmp_path."""

    def get(*more, family="qwen3_moe"):
        source = () if "--load" in more else ("--model", str(place / family))
        return (*source, "--dataset", str(place / "rows.jsonl"), "--save", str(tmp_path / "out"), *more)

    return get


# What the arguments change


def moe_of(flags, *more, family="qwen3_moe"):
    return set_up(*flags("--train_iters", "2", *more, family=family)).model.moe


def warnings_in(caplog):
    """Whatever level an earlier test has set, without the notes about the data cache."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("flag", "value", "field", "found"),
    [
        ("--num_experts", "6", "num_experts", 6),
        ("--moe_ffn_hidden_size", "48", "ffn_hidden_size", 48),
        ("--moe_shared_expert_intermediate_size", "16", "shared_size", 16),
        ("--moe_router_topk", "3", "topk", 3),
        ("--moe_router_pre_softmax", "true", "pre_softmax", True),
        ("--moe_layer_freq", "[0,1]", "sparse_layers", (False, True)),
        ("--moe_layer_freq", "2", "sparse_layers", (True, False)),
    ],
)
def test_parameters_win_over_config_json(flags, caplog, monkeypatch, flag, value, field, found):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    before = getattr(moe_of(flags), field)
    assert before != found and not warnings_in(caplog)
    assert getattr(moe_of(flags, flag, value), field) == found
    assert f"experts' {field}: {found!r} instead of config.json's {before!r}" in caplog.text


def test_what_config_json_says_already_is_no_warning(flags, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    moe_of(flags, "--num_experts", "4", "--moe_router_topk", "2", "--moe_layer_freq", "1")
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("more", "what", "do"),
    [
        (("--moe_layer_freq", "[1,0,1]"), "--moe_layer_freq [1,0,1]: 3 entries for 2 layers", "for each layer"),
        (("--moe_layer_freq", "[0,0]"), "--moe_layer_freq [0,0]: no layer has experts", "at least one 1"),
        (("--moe_layer_freq", "0"), "--moe_layer_freq", "such as 2, or a list"),
        (("--moe_layer_freq", "[2,1]"), "--moe_layer_freq", "such as 2, or a list"),
        (("--moe_router_topk", "5"), "moe_router_topk 5 is more than the 4 experts", "4 or less"),
        (("--expert_model_parallel_size", "2"), "1 processes cannot be split by expert_model_parallel_size 2", "of 1"),
    ],
)
def test_what_does_not_fit(flags, more, what, do):
    with pytest.raises(UsageError) as caught:
        moe_of(flags, *more)
    assert what in caught.value.what and do in caught.value.block()


def test_a_dense_model_gets_no_experts(flags):
    with pytest.raises(UsageError, match="--num_experts 8: the model has no experts") as caught:
        moe_of(flags, "--num_experts", "8", family="qwen2")
    assert caught.value.do == "leave --num_experts out"


def test_banner(flags, capsys):
    set_up(*flags("--train_iters", "2", family="qwen2_moe"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("experts ")]
    assert lines == [
        "experts        4 of inner width 24, 2 per token, in 2 of 3 layers, one of 40 shared by all tokens"
    ]


# Training and resuming


def test_resume_under_expert_parallelism_is_bitwise(flags):
    """6 iterations at once = 2 + 4: losses, weights, moments, random numbers."""
    both = (*EP2, "--lr_decay_iters", "6", "--train_iters")
    whole = go(*flags(*both, "6"), ranks=2)
    first = go(*flags(*both, "2"), ranks=2)
    rest = go(*flags(*both, "6", "--load", str(first.run_dir)), ranks=2)
    assert first.steps + rest.steps == whole.steps and len(set(whole.values(0))) == 6
    assert differences(contents(whole.run_dir, 6), contents(rest.run_dir, 6)) == []


OTHERS = [
    (1, ALONE),
    (2, (*ALONE, "--pipeline_model_parallel_size", "2")),
    (2, (*ALONE, "--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    (2, (*EP2, "--moe_token_dispatcher_type", "allgather", "--data_parallel_sharding_strategy", "optim_grads_params")),
]


@pytest.mark.parametrize(("ranks", "layout"), OTHERS, ids=lambda v: "-".join(v[4:]) if isinstance(v, tuple) else str(v))
def test_resume_in_another_layout(flags, ranks, layout):
    """Same rows, same state: the loss goes on as in one layout, but for the last bits of sums (test_resume's tolerance)."""
    common = ("--lr_decay_iters", "6", "--train_iters")
    whole = go(*flags(*EP2, *common, "6"), ranks=2)
    first = go(*flags(*EP2, *common, "3"), ranks=2)
    no_rng = ("--no_load_rng", "true") if ranks == 1 else ()
    rest = go(*flags(*layout, *common, "6", "--load", str(first.run_dir), *no_rng), ranks=ranks)
    for place, tolerance in ((0, 2e-5), (3, 0)):
        steps = [value for part in (first, rest) for value in part.values(place)]
        assert steps == pytest.approx(whole.values(place), rel=tolerance, abs=0)


def test_the_log_tells_of_the_routers(flags):
    run = go(*flags("--train_iters", "2", *EP2), ranks=2)
    lines = [json.loads(line) for line in (run.run_dir / "logging.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        assert 0.9 < line["load_balancing_loss"] < 2 and line["z_loss"] > 0
        assert 1 <= line["expert-load max/ideal"] <= 2 and line["idle experts"] in range(9)
        assert 0 < line["router-entropy"] < 1.3863  # ln 4


# Export and answers


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_export_there_and_back(place, family, stacked, tmp_path, monkeypatch):
    """Bit for bit, with a tensor per expert or one for all."""
    monkeypatch.chdir(tmp_path)
    source = place / family
    if stacked:
        plain, cfg, source = source, config_of(place / family), tmp_path / "stacked"
        source.mkdir()
        weights_of = HuggingFaceWeights(plain, cfg)
        write_hugging_face(
            weights_of, cfg, source, like=plain, dtype=cfg.dtype, max_shard_size=1 << 40, stacked_experts=True
        )
    export.run(parse(ExportArguments, ["--model", str(source), "--to_mcore", "true", "--output_dir", "mcore"]))
    export.run(parse(ExportArguments, ["--mcore_model", "mcore", "--to_hf", "true", "--output_dir", "hf"]))
    assert weights(tmp_path / "hf") == weights(source)
    others = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert {n: (tmp_path / "hf" / n).read_bytes() for n in others} == {n: (source / n).read_bytes() for n in others}


def config_of(folder):
    """The configuration of a folder."""
    return describe(folder, model_type=None, template="chatml", chat_template=None).config


def by_transformers(folder, prompts: list[str], tokens: int) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_infer_answers_like_transformers(flags, tmp_path, monkeypatch, capsys):
    """Trained under EP2, exported from its checkpoint, asked by both."""
    run = go(*flags("--train_iters", "8", *EP2), ranks=2)
    folder, prompts = tmp_path / "hf", ["the of", "and to in is", "you"]
    monkeypatch.chdir(tmp_path)
    export.run(
        parse(ExportArguments, ["--mcore_model", str(run.run_dir), "--to_hf", "true", "--output_dir", str(folder)])
    )
    rows = [json.dumps({"query": prompt, "response": ""}) + "\n" for prompt in prompts]
    (tmp_path / "val.jsonl").write_text("".join(rows))
    argv = ["--model", str(folder), "--val_dataset", "val.jsonl", "--temperature", "0", "--max_new_tokens", "12"]
    argv += ["--max_batch_size", "3", "--result_path", "r.jsonl", "--template", "chatml", "--system", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    infer.run(parse(InferArguments, argv))
    capsys.readouterr()
    answers = [json.loads(line)["response"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    expected = by_transformers(folder, prompts, 12)
    assert answers == expected and len(set(expected)) > 1 and all(expected)


def test_the_folder_of_a_run_is_that_of_export(flags, tmp_path):
    """`--save_safetensors` under expert parallelism."""
    run = go(*flags("--train_iters", "2", "--save_safetensors", "true", *EP2), ranks=2)
    out = tmp_path / "hf"
    export.run(parse(ExportArguments, ["--mcore_model", str(run.run_dir), "--to_hf", "true", "--output_dir", str(out)]))
    assert weights(iteration_folder(run.run_dir, 2) / "hf") == weights(out)
