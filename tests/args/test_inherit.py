"""What is taken over from args.json, and what is written into it."""

from __future__ import annotations

import json

import pytest

from megatron_swift.args.commands import ExportArguments, InferArguments, SftArguments, parse
from megatron_swift.args.dump import to_json
from megatron_swift.args.inherit import inherit
from megatron_swift.utils.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """Writes args.json and returns its folder."""

    def write(content) -> str:
        (tmp_path / "args.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path)

    return write


STORED = {
    "model": "org/name",
    "model_type": "qwen2_5",
    "template": "qwen2_5",
    "system": "Be brief.",
    "torch_dtype": "bfloat16",
    "max_length": 2048,
    "temperature": 0.5,
    "dataset": ["a.jsonl"],
    "val_dataset": [],
    "data_seed": 7,
    "model_name": [None, None],
    "use_chat_template": True,
    "hub_token": "secret",
    "lr": 1.0,
    "unknown_to_us": [1],
}


def test_fills_what_is_not_given(folder):
    path = folder(STORED)
    args, values, source = inherit(parse(SftArguments, ["--load", path, "--system", "Mine."]))
    assert values == {k: STORED[k] for k in ("model", "model_type", "template", "torch_dtype")}
    assert str(source) == path + "/args.json"
    assert (args.model, args.system, args.max_length, args.lr) == ("org/name", "Mine.", None, 1e-5)
    assert args.given == {"load", "system"}
    assert inherit(parse(ExportArguments, ["--mcore_model", path])).args.model == "org/name"


def test_data_settings_only_on_request(folder):
    path = folder(STORED)
    assert inherit(parse(InferArguments, ["--model", path])).args.dataset == []
    args = inherit(parse(InferArguments, ["--model", path, "--load_data_args"])).args
    assert (args.dataset, args.data_seed, args.temperature, args.model) == (["a.jsonl"], 7, None, path)


def test_nothing_to_take_over(folder, tmp_path):
    path = folder(STORED)
    off = parse(SftArguments, ["--load", path, "--load_args", "false"])
    assert inherit(off) == (off, {}, None)
    other = parse(SftArguments, ["--load", str(tmp_path / "nowhere"), "--model", "org/name"])
    assert inherit(other) == (other, {}, None)


def test_use_chat_template_is_always_taken_over_but_in_training(folder, caplog):
    path = folder({"use_chat_template": False})
    assert inherit(parse(InferArguments, ["--model", path])).args.use_chat_template is False
    assert not caplog.records
    typed = parse(InferArguments, ["--model", path, "--use_chat_template", "true"])
    assert inherit(typed).args.use_chat_template is False
    assert "--use_chat_template true is replaced by false" in caplog.text
    assert inherit(parse(SftArguments, ["--model", path])).args.use_chat_template is True


def test_a_setting_that_is_not_built_is_left_out(folder, caplog):
    path = folder({"agent_template": "toolbench", "template": "qwen2_5"})
    assert inherit(parse(InferArguments, ["--model", path])).values == {"template": "qwen2_5"}
    assert "agent_template toolbench: must be one of hermes" in caplog.text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not a JSON object"),
        ({"torch_dtype": "int3"}, "torch_dtype int3: must be one of"),
    ],
)
def test_malformed(folder, content, what):
    path = folder(content)
    with pytest.raises(CheckpointError) as e:
        inherit(parse(InferArguments, ["--model", path]))
    assert what in e.value.what
    assert f"{path}/args.json" in e.value.what
    assert "--load_args false" in e.value.do


def test_to_json_round_trip(folder):
    args = parse(SftArguments, ["--dataset", "a", "--hub_token", "abc", "--rope_scaling", '{"factor": 2}'])
    written = to_json(args)
    assert "abc" not in json.dumps(written) + repr(args)
    assert (written["hub_token"], written["rope_scaling"], written["lr"]) == ("[redacted]", {"factor": 2}, 1e-5)
    assert not written.keys() & {"given", "config_env"}
    assert inherit(parse(SftArguments, ["--load", folder(written)])).args.hub_token is None
    assert to_json(parse(SftArguments, []))["hub_token"] is None
