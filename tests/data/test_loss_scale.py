"""The weight of each part of a reply."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_swift.args.data_params import UNDOCUMENTED as REFUSED
from megatron_swift.args.data_params import LossScale as Choices
from megatron_swift.data.encode import encode, encode_many
from megatron_swift.data.loss_scale import NAMES, UNDOCUMENTED, weigh
from megatron_swift.data.show import weights_of
from megatron_swift.data.templates import TEMPLATES, get_template
from megatron_swift.data.types import IGNORE, Message

CHATML = TEMPLATES["chatml"]


def parts(sample, tokenizer):
    """[(text, weight)] of the trained spans."""
    weights = weights_of(sample)
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
    spans = [(tokenizer.decode(sample.ids[a:b].tolist()), float(weights[a])) for a, b in itertools.pairwise(cuts)]
    return [span for span in spans if span[1]]


def test_names_are_those_the_parser_takes():
    assert set(Choices.__args__) == {*NAMES, *UNDOCUMENTED}
    assert REFUSED == UNDOCUMENTED


REACT = "Hm.\nThought: look\nAction: find\nAction Input: {}\nObservation: 3\nThought: so\nFinal Answer: 3"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "react",
            REACT,
            [
                ("Hm.\nThought: look\n", 1),
                ("Action: find\nAction Input: {}\nObservation:", 2),
                (" 3\n", 0),
                ("Thought: so\nFinal Answer: 3", 1),
            ],
        ),
        ("react", "no keyword", [("no keyword", 1)]),
        ("react", "Observation:", [("Observation:", 2)]),
        (
            "qwen",
            "a✿FUNCTION✿: f✿ARGS✿: {}✿RESULT✿: r✿RETURN✿: b",
            [("a", 1), ("✿FUNCTION✿: f✿ARGS✿: {}✿RESULT✿:", 2), (" r", 0), ("✿RETURN✿: b", 1)],
        ),
        (
            "hermes",
            "so\n<tool_call>\n{}\n</tool_call>\n<tool_call>\n1\n</tool_call> end",
            [
                ("so\n", 1),
                ("<tool_call>\n{}\n</tool_call>", 2),
                ("\n", 1),
                ("<tool_call>\n1\n</tool_call>", 2),
                (" end", 1),
            ],
        ),
        ("hermes", "<tool_call> not closed", [("<tool_call> not closed", 1)]),
        ("ignore_empty_think", "<think>\n\n</think>\n\nXY", [("<think>\n\n</think>\n\n", 0), ("XY", 1)]),
        ("ignore_empty_think", "</think>\n\nXY", [("</think>\n\n", 0), ("XY", 1)]),
        ("ignore_empty_think", "<think>\nx\n</think>XY", [("<think>\nx\n</think>XY", 1)]),
        ("ignore_empty_think", "XY<think></think>", [("XY<think></think>", 1)]),
        *[
            (
                name,
                "<think></think>Action: x<tool_call>y</tool_call>",
                [("<think></think>Action: x<tool_call>y</tool_call>", 1)],
            )
            for name in ("default", "last_round", "all")
        ],
    ],
)
def test_weights(name, text, expected):
    merged = []
    for part, weight in weigh(text, name):
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + part, weight)
        else:
            merged.append((part, weight))
    assert merged == expected


def test_an_empty_thinking_part_is_looked_for_only_where_the_reply_begins():
    assert weigh("<think></think>x", "ignore_empty_think", begins=False) == [("<think></think>x", 1)]


@given(
    text=st.lists(
        st.sampled_from(
            ["Action:", "Observation:", "<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "x", "✿ARGS✿:"]
        )
    ).map("".join),
    name=st.sampled_from(NAMES),
)
def test_parts_are_the_whole_text(text, name):
    found = weigh(text, name)
    assert "".join(part for part, _ in found) == text
    assert all(part and weight in (0, 1, 2) for part, weight in found)


def test_weights_reach_the_sample(tokenizer):
    turns = [Message("user", "a"), Message("assistant", REACT)]
    sample = encode(CHATML, tokenizer, turns, loss_scale="react")
    assert parts(sample, tokenizer) == [
        ("Hm.\nThought: look\n", 1),
        ("Action: find\nAction Input: {}\nObservation:", 2),
        ("Thought: so\nFinal Answer: 3<|im_end|>\n", 1),
    ]
    assert sample.weights.dtype == np.float32
    assert np.array_equal(sample.weights > 0, sample.labels != IGNORE)
    assert encode(CHATML, tokenizer, [turns[0], Message("assistant", "XY")], loss_scale="react").weights is None


def test_weights_only_where_they_say_more_than_the_labels(tokenizer):
    rows = [[Message("user", "a"), Message("assistant", text)] for text in ("XY", REACT, "ZW")]
    plain, weighted, last = (outcome[0] for outcome in encode_many(CHATML, tokenizer, rows, loss_scale="react"))
    assert plain.weights is None and last.weights is None
    assert set(weighted.weights.tolist()) == {0.0, 1.0, 2.0}


def test_ignore_empty_think_masks_the_rows_own_empty_part(tokenizer):
    turns = [Message("user", "a"), Message("assistant", "<think>\n\n</think>\n\nXY")]
    for name in ("qwen3", "chatml"):
        masked = encode(get_template(name), tokenizer, turns, loss_scale="ignore_empty_think")
        assert parts(masked, tokenizer) == [("XY<|im_end|>\n", 1)]
        assert masked.weights is None
        assert parts(encode(get_template(name), tokenizer, turns), tokenizer)[0][0].startswith("<think>")


@pytest.mark.parametrize(
    ("changes", "loss_scale", "expected"),
    [
        ({"loss_scale": 0.5}, "default", [("XY<|im_end|>\n", 0.5), ("PQ<|im_end|>\n", 1)]),
        ({"loss_scale": 0.5}, "last_round", [("XY<|im_end|>\n", 0.5), ("PQ<|im_end|>\n", 1)]),
        ({"loss_scale": 0.0}, "default", [("PQ<|im_end|>\n", 1)]),
        ({"loss_scale": 0.0, "train": True}, "default", [("PQ<|im_end|>\n", 1)]),
        ({"loss_scale": 3.0, "train": False}, "default", [("PQ<|im_end|>\n", 1)]),
        ({"loss_scale": 3.0, "train": True}, "last_round", [("XY<|im_end|>\n", 3), ("PQ<|im_end|>\n", 1)]),
        ({"train": True}, "last_round", [("XY<|im_end|>\n", 1), ("PQ<|im_end|>\n", 1)]),
    ],
)
def test_a_messages_own_weight(tokenizer, changes, loss_scale, expected):
    turns = [Message(r, t) for r, t in (("user", "a"), ("assistant", "XY"), ("user", "b"), ("assistant", "PQ"))]
    turns[1] = replace(turns[1], **changes)
    assert parts(encode(CHATML, tokenizer, turns, loss_scale=loss_scale), tokenizer) == expected
