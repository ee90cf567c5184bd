"""Tokens to text: what is shown when, where an answer ends, and that no character is ever torn."""

from __future__ import annotations

import random

import pytest

from megatron_swift.infer.answer import Answer, Stops


def make(decode, *, limit=1000, ids=(), cut=(), kept=(), prefix="") -> Answer:
    return Answer(
        [1], limit=limit, number=0, decode=decode, stops=Stops(frozenset(ids), tuple(cut), tuple(kept)), prefix=prefix
    )


def by_bytes(ids) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def pieces(answer: Answer, text: str) -> list[str]:
    """What is shown after each byte of the text, empty pieces left out, then what the end brings."""
    shown = []
    for byte in text.encode():
        if not answer.finish:
            answer.push(byte)
            shown.append(answer.take())
    if not answer.finish:
        answer.end("length")
    return [piece for piece in [*shown, answer.take()] if piece]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", ["one ", "two ", "three"]),
        ("line\nnext", ["line\n", "next"]),
        ("你好，ok", ["你", "好", "，", "ok"]),
        ("a你b c", ["a你", "b ", "c"]),
        ("naïve é😀 x", ["naïve ", "é😀 ", "x"]),
        ("", []),
    ],
)
def test_flush_rule(text, expected):
    assert pieces(make(by_bytes), text) == expected


@pytest.mark.parametrize(
    ("stops", "text", "expected", "finish"),
    [
        ({"ids": [ord("!")]}, "no more! than", "no more", "stop"),
        ({"cut": ["<end>"]}, "an answer<end>\n", "an answer", "stop"),
        ({"cut": ["<end>"]}, "a <en d", "a <en d", "length"),
        ({"cut": ["END OF IT"]}, "all END OF IT", "all ", "stop"),
        ({"kept": ["STOP"]}, "please STOP now", "please STOP", "stop"),
        ({"kept": ["。"]}, "好。好", "好。", "stop"),
        ({"kept": ["b"], "cut": ["ab"]}, "xab", "x", "stop"),
        ({"limit": 3}, "abcdef", "abc", "length"),
        ({"prefix": "<think>\n", "kept": ["think"]}, "I think so", "<think>\nI think", "stop"),
    ],
)
def test_ends(stops, text, expected, finish):
    answer = make(by_bytes, **stops)
    assert "".join(pieces(answer, text)) == answer.text == expected
    assert answer.finish == finish


def test_unfinished_character_at_the_end():
    answer = make(by_bytes)
    answer.push("é".encode()[0])
    assert (answer.text, answer.take()) == ("", "")
    answer.end("length")
    assert answer.take() == "\ufffd"


def test_pieces_are_the_text_of_all_tokens(tokenizer):
    draw = random.Random(5)
    for _ in range(20):
        words = tokenizer.encode("the point 好 of 😀 and\nthis")
        ids = [draw.choice(words) if draw.random() < 0.7 else draw.randrange(tokenizer.vocab_size) for _ in range(40)]
        answer = make(tokenizer.decode, limit=40)
        shown = []
        for token in ids:
            answer.push(token)
            shown.append(answer.take())
        assert "".join(shown) == answer.text == tokenizer.decode(ids)
        assert answer.num_tokens == 40
