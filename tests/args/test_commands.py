"""The parser: spellings, types, config files and what it says about mistakes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_swift.args.commands import COMMANDS, InferArguments, PtArguments, SftArguments, parse
from megatron_swift.args.flags import spellings, wants_help
from megatron_swift.args.spec import params_of
from megatron_swift.utils.errors import UsageError

QUICK_START = [
    *("--load", "mcore", "--dataset", "AI-ModelScope/alpaca-gpt4-data-zh#500", "swift/self-cognition#500"),
    *("--micro_batch_size", "4", "--recompute_granularity", "selective", "--finetune", "true", "--lr", "1e-5"),
    *("--cross_entropy_loss_fusion", "true", "--system", "You are a helpful assistant.", "--no_save_optim", "true"),
    *("--model_author", "swift", "--model_name", "swift-robot", "--max_length", "2048"),
]


def test_quick_start():
    args = parse(SftArguments, QUICK_START)
    assert args.dataset == ["AI-ModelScope/alpaca-gpt4-data-zh#500", "swift/self-cognition#500"]
    assert (args.micro_batch_size, args.lr, args.max_length) == (4, 1e-5, 2048)
    assert args.finetune is args.cross_entropy_loss_fusion is args.no_save_optim is True
    assert (args.system, args.model_name) == ("You are a helpful assistant.", ["swift-robot"])
    assert args.given == {q[2:] for q in QUICK_START if q.startswith("--")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.lr = 1.0


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--micro-batch-size 2", "micro_batch_size", 2),
        ("--micro_batch_size=2", "micro_batch_size", 2),
        ("--packing", "packing", True),
        ("--packing YES", "packing", True),
        ("--packing=0", "packing", False),
        ("--add_version f", "add_version", False),
        ("--no_add_version", "add_version", False),
        ("--no-add-version", "add_version", False),
        ("--no_add_version false", "add_version", True),
        ("--no_packing", "packing", False),
        ("--no_save_optim", "no_save_optim", True),
        ("--save_optim", "no_save_optim", False),
        ("--rope_fusion false", "no_rope_fusion", True),
        ("--bf16", "bf16", True),
        ("--bf16 none", "bf16", None),
        ("--bf16 false", "bf16", False),
        ("--eval_iters -1", "eval_iters", -1),
        ("--lr 1E-5", "lr", 1e-5),
        ("--train_iters 1e3", "train_iters", 1000),
        ("--save None", "save", None),
        ("--position_embedding_type rope", "position_embedding_type", "rope"),
        ("--report_to wandb swanlab", "report_to", ["wandb", "swanlab"]),
        ('--rope_scaling {"rope_type":"linear","factor":2}', "rope_scaling", {"rope_type": "linear", "factor": 2}),
        ("--save_steps 7", "save_interval", 7),
        ("--output_dir out", "save", "out"),
        ("--mcore_model m", "load", "m"),
        ("--num_train_epochs 3", "max_epochs", 3),
        ("--enable_cache true", "load_from_cache_file", True),
        ("--micro_b 2", "micro_batch_size", 2),
        ("--lr_decay_s linear", "lr_decay_style", "linear"),
        ("--seed 1 --seed 2", "seed", 2),
    ],
)
def test_spellings(typed, name, value):
    args = parse(SftArguments, typed.split())
    assert getattr(args, name) == value
    assert args.given == {name}


def test_texts_that_look_like_flags(tmp_path):
    args = parse(SftArguments, ["--system", "- be brief", "--response_prefix=--x", "--columns", '{"a": "b"}'])
    assert (args.system, args.response_prefix, args.columns) == ("- be brief", "--x", {"a": "b"})
    file = tmp_path / "rope.json"
    file.write_text('{"factor": 2}')
    assert parse(SftArguments, ["--rope_scaling", str(file)]).rope_scaling == {"factor": 2}
    assert parse(SftArguments, ["--system", ""]).system == ""


def test_lists_are_not_shared_between_instances():
    one, two = parse(SftArguments, []), parse(SftArguments, [])
    one.report_to.append("none")
    assert two.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("typed", "what", "do"),
    [
        ("--lrr 1", "unknown parameter --lrr", "did you mean --lr"),
        ("--learning_rate 1", "unknown parameter --learning_rate", ""),
        ("--micro_batchsize 1", "unknown parameter --micro_batchsize", "--micro_batch_size"),
        ("--lrr 1 --loadd x", "unknown parameters --lrr, --loadd", "--loadd: did you mean --load"),
        ("-lr 1", "unknown parameter -lr", "did you mean --lr"),
        ("--lr_d 1", "--lr_d is ambiguous", "--lr_decay_iters, --lr_decay_style"),
        ("--lr", "--lr needs a value", "--lr NUMBER"),
        ("--lr 1 2", "--lr takes one value, got 2: 1 2", "quote"),
        ("--lr fast", "--lr fast: must be a number", ""),
        ("--train_iters 1.5", "--train_iters 1.5: must be a whole number", ""),
        ("--packing maybe", "--packing maybe: must be true or false", ""),
        ("--optimizer lion", "--optimizer lion: must be one of adam, sgd", ""),
        ("--report_to wandb paper", "--report_to paper: must be one of tensorboard", ""),
        ("--dataset a --dataset b", "--dataset is given twice", "--dataset A B C once"),
        ("--dataset", "--dataset needs a value", "--dataset TEXT"),
        ("--rope_scaling nowhere.json", "neither a JSON object nor an existing file", ""),
        ("--rope_scaling {", "--rope_scaling: not valid JSON", ""),
        ('--rope_scaling {"a":1,"a":2}', "the key 'a' occurs twice", ""),
        ("train --lr 1", "unexpected argument 'train'", "--help"),
        ("--config", "--config takes one file", ""),
        ("nowhere.yaml", "nowhere.yaml: this config file cannot be read", ""),
    ],
)
def test_mistakes(typed, what, do):
    with pytest.raises(UsageError) as e:
        parse(SftArguments, typed.split())
    assert what in e.value.what
    assert do in e.value.do
    assert e.value.exit_code == 2


def test_unknown_can_be_ignored_and_repeats_are_said(caplog):
    args = parse(SftArguments, ["--lrr", "1", "--ignore_args_error", "true", "--seed", "1", "--seed", "3"])
    assert args.seed == 3
    messages = " ".join(r.getMessage() for r in caplog.records)
    assert "--lrr: ignored" in messages
    assert "--seed is given more than once; the last value, 3" in messages


YAML = """
# a comment
load: mcore
dataset: [a, b]
lr: 1e-5
train-iters: 100
save_steps: 10
packing: yes
eval_iters: -1
position_embedding_type: rope
system: |
  two
  lines
rope_scaling: {rope_type: linear, factor: 2}
val_dataset: one
ENV: {A: 1, B: text, C: true}
"""


def test_yaml_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    for argv in ([str(file), "--lr", "2e-5"], ["--config", str(file), "--lr", "2e-5"]):
        args = parse(SftArguments, argv)
        assert (args.lr, args.train_iters, args.save_interval, args.eval_iters) == (2e-5, 100, 10, -1)
        assert (args.dataset, args.val_dataset, args.packing) == (["a", "b"], ["one"], True)
        assert args.rope_scaling == {"rope_type": "linear", "factor": 2}
        assert args.config_env == {"A": "1", "B": "text", "C": "true"}
        assert {"load", "lr", "save_interval"} <= args.given
    assert parse(SftArguments, [str(file)]).lr == 1e-5, "YAML 1.1 reads 1e-5 as text"


def test_json_config(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"lr": 0.1, "micro-batch-size": 2.0, "bf16": None, "ENV": {"X": "y"}}))
    args = parse(SftArguments, [str(file)])
    assert (args.lr, args.micro_batch_size, args.bf16, args.config_env) == (0.1, 2, None, {"X": "y"})


@pytest.mark.parametrize(("text", "value"), [("true", "true"), ("auto", "auto"), ("'false'", "false")])
def test_a_choice_named_true_needs_no_quotes(tmp_path, text, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"torch_compile: {text}")
    assert parse(SftArguments, [str(file)]).torch_compile == value


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.yaml", "lr: 1\nlr: 2", "a.yaml:2: the key 'lr' occurs twice"),
        ("a.yaml", "save_interval: 1\nsave_steps: 2", "save_steps: the parameter save_interval occurs twice"),
        ("a.yaml", "lrr: 1", "a.yaml: lrr"),
        ("a.yaml", "lr: fast", "a.yaml: lr fast: must be a number"),
        ("a.yaml", "lr: -1", "a.yaml: lr -1.0: must be above 0"),
        ("a.yaml", "lr:", "a.yaml: lr: empty value"),
        ("a.yaml", "train_iters: true", "train_iters true: must be a whole number"),
        ("a.yaml", "model_revision: 1.10", "expected text, got 1.1"),
        ("a.yaml", "packing: 2", "packing 2: must be true or false"),
        ("a.yaml", "- lr", "a config file is one mapping"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "ENV: [1]", "ENV must map"),
        ("a.yaml", "model_kwargs: {a: 1}", "settings of special models is not built"),
        ("a.json", '{"lr": 1, "lr": 2}', "the key 'lr' occurs twice"),
        ("a.json", "{", "not valid JSON"),
    ],
)
def test_config_mistakes(tmp_path, name, text, what):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UsageError) as e:
        parse(SftArguments, [str(file)])
    assert what in e.value.what
    assert name in e.value.what


def test_unknown_config_key_gets_a_hint(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("micro_batchsize: 1")
    with pytest.raises(UsageError) as e:
        parse(SftArguments, [str(file)])
    assert e.value.do == "did you mean micro_batch_size?"


def test_pre_training_differs_in_four_defaults():
    sft, pt = params_of(SftArguments), params_of(PtArguments)
    assert {n for n in sft if sft[n].default != pt[n].default} == {
        "use_chat_template",
        "loss_scale",
        "truncation_strategy",
        "packing",
    }
    assert [*sft, "data_path"] == list(pt)
    args = parse(PtArguments, [])
    assert (args.use_chat_template, args.loss_scale) == (False, "all")


def test_every_name_is_typed_back():
    """Each parameter of each command accepts its own default in text form (lists and nones aside)."""
    for command in COMMANDS:
        for name, p in params_of(command).items():
            assert spellings(params_of(command))[name].param == p
            if p.default not in (None, []) and not p.kind.many:
                assert getattr(parse(command, [f"--{name}", str(p.default)]), name) == p.default


def test_help_is_recognised():
    assert wants_help(["--lr", "1", "--help"])
    assert wants_help(["-h"])
    assert not wants_help(["--stop_words", "help"])
    assert parse(InferArguments, ["--temperature", "0"]).temperature == 0
