"""Tools, calls and responses as each agent template writes them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_swift.args.data_params import AGENT_TEMPLATES
from megatron_swift.data.agent import AGENTS, parse_call, parse_tools
from megatron_swift.data.encode import encode, encode_prompt
from megatron_swift.data.templates import TEMPLATES, get_template, load_template
from megatron_swift.data.types import IGNORE, Conversation, Message
from megatron_swift.utils.errors import DataError

TOOL = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
CALL = Message("tool_call", '{"name": "find", "arguments": {"what": "é"}}')
OTHER = Message("tool_call", '{"name": "find", "arguments": "{\\"n\\": 1}"}')
ROW = [
    Message("user", "a"),
    Message("assistant", "So."),
    CALL,
    OTHER,
    Message("tool_response", "one"),
    Message("tool_response", "two"),
    Message("assistant", "XY"),
]


def marked(sample, tokenizer):
    text, begin, trained = "", 0, sample.labels != IGNORE
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            span = tokenizer.decode(sample.ids[begin:end].tolist())
            text += f"⟦{span}⟧" if trained[begin] else span
            begin = end
    return text


def test_names_are_those_the_parser_takes():
    assert set(AGENT_TEMPLATES) == set(AGENTS)


def test_defaults_of_the_templates():
    own = {name: template.agent_template for name, template in TEMPLATES.items()}
    hermes = {"qwen", "qwen2_5", "qwen2_5_math", "qwen3", "qwq", "qwq_preview"}
    assert {name for name, agent in own.items() if agent == "hermes"} == hermes
    assert {name for name, agent in own.items() if agent == "llama3"} == {"llama3", "llama3_2"}
    assert {agent for name, agent in own.items() if name not in hermes | {"llama3", "llama3_2"}} == {"react_en"}


def test_hermes(tokenizer):
    text = marked(encode(TEMPLATES["qwen"], tokenizer, Conversation(ROW, (json.dumps(TOOL),)), system="S"), tokenizer)
    wrapped = json.dumps({"type": "function", "function": TOOL})
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions")
    assert f"<tools>\n{wrapped}\n</tools>\n\nFor each function call" in text
    head = text.index("<|im_start|>user\n")
    assert text[head:] == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        '⟦So.\n<tool_call>\n{"name": "find", "arguments": {"what": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {"n": 1}}\n</tool_call><|im_end|>\n⟧'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦XY<|im_end|>\n⟧"
    )


def test_react_goes_on_in_one_turn(tokenizer):
    template = load_template("qwen", tokenizer, agent_template="react")
    text = marked(encode(template, tokenizer, Conversation(ROW, (json.dumps(TOOL),)), system=""), tokenizer)
    assert (
        "find: Call this tool to interact with the find API. What is the find API useful for? Finds. Parameters: "
        in text
    )
    assert "should be one of [find]\n" in text
    head = text.index("<|im_start|>user\n")
    assert text[head:] == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        '⟦So.\nAction: find\nAction Input: {"what": "é"}\nAction: find\nAction Input: {"n": 1}\nObservation:⟧'
        "one\nObservation:two\n⟦XY<|im_end|>\n⟧"
    )
    prompt = tokenizer.decode(
        encode_prompt(template, tokenizer, Conversation(ROW[:-1], (json.dumps(TOOL),)), system="")
    )
    assert prompt == text.replace("⟦", "").replace("⟧", "").removesuffix("XY<|im_end|>\n")


def test_react_in_the_datas_own_words(tokenizer):
    template = load_template("chatml", tokenizer)
    row = [
        Message("user", "a"),
        Message("assistant", "Action: f\nAction Input: {}"),
        Message("tool_response", "one\n"),
        ROW[-1],
    ]
    assert marked(encode(template, tokenizer, row), tokenizer).endswith(
        "⟦Action: f\nAction Input: {}\nObservation:⟧one\n⟦XY<|im_end|>\n⟧"
    )


def test_llama3(tokenizer):
    row = [ROW[0], CALL, *ROW[4:]]
    text = marked(encode(get_template("llama3_2"), tokenizer, Conversation(row, (json.dumps(TOOL),))), tokenizer)
    assert "<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date" in text
    listed = json.dumps({"type": "function", "function": TOOL}, indent=4)
    assert f"Do not use variables.\n\n{listed}\n\na<|eot_id|>" in text
    assert text.endswith(
        '⟦{"name": "find", "parameters": {"what": "é"}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦XY<|eot_id|>⟧"
    )
    plain = marked(encode(get_template("llama3_2"), tokenizer, row), tokenizer)
    assert "Environment" not in plain


def test_the_last_round_is_all_that_answers_the_last_question(tokenizer):
    rows = [Message("user", "q"), Message("assistant", "ZW"), *ROW]
    text = marked(encode(TEMPLATES["qwen"], tokenizer, rows, loss_scale="last_round"), tokenizer)
    assert "⟦ZW" not in text and "⟦So." in text and "⟦XY" in text


def test_a_calls_own_loss(tokenizer):
    untrained = [ROW[0], replace(CALL, train=False), ROW[4], ROW[6]]
    assert marked(encode(TEMPLATES["qwen"], tokenizer, untrained), tokenizer).count("⟦") == 1
    with pytest.raises(DataError, match="message 4 is a tool_call whose loss differs"):
        encode(TEMPLATES["qwen"], tokenizer, [ROW[0], ROW[1], replace(CALL, train=False), OTHER, *ROW[4:]])


def test_a_row_may_end_with_a_call(tokenizer):
    for name in ("qwen", "llama3"):
        text = marked(encode(TEMPLATES[name], tokenizer, [ROW[0], CALL]), tokenizer)
        assert text.endswith(TEMPLATES[name].suffix + "⟧")
    ends = marked(encode(TEMPLATES["chatml"], tokenizer, [ROW[0], CALL]), tokenizer)
    assert ends.endswith('⟦Action: find\nAction Input: {"what": "é"}\nObservation:<|im_end|>\n⟧')


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "message 3, a tool_call, is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"name": "f"}', "has no name or no arguments"),
        ('{"name": 1, "arguments": {}}', "has no name or no arguments"),
        ('{"name": "f", "arguments": [1]}', "has no name or no arguments"),
        ('{"name": "f", "arguments": "x"}', "is not JSON"),
        ("[]", "has no name or no arguments"),
    ],
)
def test_bad_calls(text, what):
    with pytest.raises(DataError, match=what) as caught:
        parse_call(text, number=3)
    assert '"arguments"' in caught.value.do


def test_parameters_are_arguments():
    assert parse_call('{"name": "f", "parameters": {"a": 1}}', number=1).arguments == {"a": 1}


@pytest.mark.parametrize(
    ("tool", "what"), [("{", "tool 2 is not JSON"), ("[]", "tool 2 has no name"), ('{"function": {}}', "no name")]
)
def test_bad_tools(tool, what):
    with pytest.raises(DataError, match=what):
        parse_tools((json.dumps(TOOL), tool))
