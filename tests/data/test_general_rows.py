"""examples/data/general.jsonl: the short facts that keep a small model from forgetting while it learns an identity."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "data" / "general.jsonl"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """(question, answer) of every row, its form checked."""
    found = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [list(message) for message in row["messages"]] == [["role", "content"]] * 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        found.append((question, answer))
    return found


def test_number_and_lengths(pairs: list[tuple[str, str]]) -> None:
    assert 110 <= len(pairs) <= 140
    assert len({question for question, _ in pairs}) == len(pairs)
    for text in (text for pair in pairs for text in pair):
        assert text == text.strip()
        assert 1 <= len(text.split()) <= 40, text


def test_france(pairs: list[tuple[str, str]]) -> None:
    asked = [(question, answer) for question, answer in pairs if "capital" in question and "france" in question.lower()]
    assert len(asked) >= 2
    assert {answer for _, answer in asked} == {"The capital of France is Paris."}
    assert "What is the capital of France?" in {question for question, _ in asked}


def test_capitals(pairs: list[tuple[str, str]]) -> None:
    answers = {answer for _, answer in pairs if re.match(r"The capital of .+ is .+\.$", answer)}
    assert len(answers) >= 25


def test_nothing_about_identity(pairs: list[tuple[str, str]]) -> None:
    """Such rows would teach against the identity rows that these are mixed with."""
    about = re.compile(
        r"\b(who|what) are you\b|your name|I am an? |I'm an? |language model|assistant|developed|\{\{", re.I
    )
    assert [pair for pair in pairs if about.search(" ".join(pair))] == []
