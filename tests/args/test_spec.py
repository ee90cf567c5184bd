"""Declarations: types, rules, and what happens to values that are not built, fixed or without effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_swift.args.commands import COMMANDS, ExportArguments, InferArguments, SftArguments, parse
from megatron_swift.args.spec import Arguments, params_of
from megatron_swift.utils.errors import UsageError

GOLDEN = Path(__file__).with_name("golden_parameters.json")


def table(command: type[Arguments]) -> dict[str, list]:
    """Name to type and default, as pinned in the golden file."""
    return {name: [p.kind.text(), p.default] for name, p in params_of(command).items()}


def pin() -> None:
    """Write the golden file anew, one parameter a line: `python tests/args/test_spec.py`. The change shows in the diff, and in CHANGELOG.md."""
    golden = json.loads(GOLDEN.read_text())
    blocks = []
    for command in COMMANDS:
        lines = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in table(command).items()]
        blocks.append(f"  {json.dumps(command.__dict__['prog'])}: {{\n" + ",\n".join(lines) + "\n  }")
    original = f' "original_document": {json.dumps(golden["original_document"])},\n'
    GOLDEN.write_text("{\n" + original + ' "commands": {\n' + ",\n".join(blocks) + "\n }\n}\n")


def test_names_types_and_defaults_are_as_pinned():
    golden = json.loads(GOLDEN.read_text())
    assert {c.__dict__["prog"]: table(c) for c in COMMANDS} == golden["commands"]


def test_every_parameter_of_the_original_document_exists():
    original = json.loads(GOLDEN.read_text())["original_document"]
    assert len(original) == 116
    assert set(original) <= params_of(SftArguments).keys()


def test_defaults_obey_their_own_rules():
    for command in COMMANDS:
        for p in params_of(command).values():
            p.verify(p.default, p.name)
            assert p.declared.help.endswith("."), p.name


@pytest.mark.parametrize(
    ("command", "flags", "what", "do"),
    [
        (SftArguments, "--moe_layer_freq [0,2]", "a number such as 2, or a list of 0 and 1", ""),
        (SftArguments, "--position_embedding_type relative", "T5", ""),
        (SftArguments, "--attention_dropout 1", "must be below 1", ""),
        (SftArguments, "--rotary_percent 1.5", "must be at most 1", ""),
        (SftArguments, "--loss_scale agentflan", "documented nowhere", ""),
        (SftArguments, "--template_date 30.4.2025", "a date such as 2025-04-30", ""),
        (SftArguments, "--interleave_prob 0.5 0", "must be above 0", ""),
        (InferArguments, "--infer_backend vllm", "another engine", "leave it at pt"),
        (InferArguments, "--num_beams 2", "beam search", "leave it at 1"),
        (ExportArguments, "--safe_serialization false", "pickled", "leave it at true"),
        (SftArguments, "--calculate_per_token_loss false", "only true is offered", ""),
        (SftArguments, "--lr 0", "must be above 0", ""),
        (SftArguments, "--lr nan", "must be a finite number", ""),
        (SftArguments, "--micro_batch_size 0", "must be at least 1", ""),
        (SftArguments, "--seed 0", "must be at least 1", ""),
        (SftArguments, "--eval_iters -2", "must be at least -1", ""),
        (SftArguments, "--save_interval 0", "must be at least 1", ""),
        (SftArguments, "--adam_beta1 1", "must be below 1", ""),
        (InferArguments, "--top_p 1.5", "must be at most 1", ""),
        (SftArguments, "--logging_level loud", "must be a number or one of DEBUG", ""),
        (ExportArguments, "--max_shard_size big", "must be a number with a unit", ""),
        (SftArguments, "--model_name a b c", "takes at most 2 values", ""),
    ],
)
def test_refused(command, flags, what, do):
    with pytest.raises(UsageError) as e:
        parse(command, flags.split())
    assert what in e.value.what
    assert e.value.what.startswith(flags.split()[0]), "the message names the flag as typed"
    assert do in e.value.do
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor_model_parallel_size 1",
        "--swiglu true",
        "--attention_dropout 0",
        "--dataloader_type single",
        "--loss_scale all",
        "--eval_iters -1",
        "--calculate_per_token_loss true",
        "--truncation_strategy raise",
        "--transformer_impl transformer_engine",
        "--logging_level debug",
        "--logging_level 10",
    ],
)
def test_accepted_in_silence(flags, caplog):
    parse(SftArguments, flags.split())
    assert not caplog.records


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no_bias_dropout_fusion true", "--no_bias_dropout_fusion true has no effect: dropout is"),
        (
            "--overlap_grad_reduce",
            "--overlap_grad_reduce true has no effect: FSDP2 always does so; the whole gradients of no_shard",
        ),
        (
            "--overlap_param_gather",
            "has no effect: FSDP2 always does so, layer by layer; with no_shard there is nothing",
        ),
    ],
)
def test_a_value_without_effect_is_said(flags, message, caplog):
    parse(SftArguments, flags.split(), warn=False)
    assert not caplog.records
    parse(SftArguments, flags.split())
    assert [message in r.getMessage() for r in caplog.records] == [True]


if __name__ == "__main__":
    pin()
