"""The built-in identity rows (data/assets/self_cognition.jsonl) keep what `swift/self-cognition` promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

import megatron_swift.data

ASSET = files(megatron_swift.data) / "assets" / "self_cognition.jsonl"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in ASSET.read_text(encoding="utf-8").splitlines()]


def test_counts_and_keys(rows: list[dict[str, str]]) -> None:
    assert len(rows) == 108
    assert Counter(row["tag"] for row in rows) == {"zh": 54, "en": 54}
    assert all(list(row) == ["query", "response", "tag"] for row in rows)
    assert all(row[key] and row[key] == row[key].strip() for row in rows for key in row)


def test_placeholders(rows: list[dict[str, str]]) -> None:
    texts = [row[key] for row in rows for key in ("query", "response")]
    assert {name for text in texts for name in PLACEHOLDER.findall(text)} == {"NAME", "AUTHOR"}
    assert not any(re.search("[{}]", PLACEHOLDER.sub("", text)) for text in texts), "a broken placeholder"
    assert all("{{NAME}}" in row["response"] for row in rows)
    assert sum("{{AUTHOR}}" in row["response"] for row in rows) > 100
    assert {row["tag"] for row in rows if "{{NAME}}" in row["query"]} == {"zh", "en"}


def test_no_row_twice(rows: list[dict[str, str]]) -> None:
    assert len({(row["query"], row["response"]) for row in rows}) == len(rows)


def test_language_is_what_the_tag_says(rows: list[dict[str, str]]) -> None:
    for row in rows:
        for text in (row["query"], row["response"]):
            chinese = re.search(r"[\u4e00-\u9fff]", text) is not None
            assert chinese == (row["tag"] == "zh"), text


def test_bytes_are_plain_utf8_lines() -> None:
    raw = ASSET.read_bytes()
    assert raw.endswith(b"\n")
    assert b"\r" not in raw
    assert b"\\u" not in raw
    assert not raw.startswith(b"\xef\xbb\xbf")
