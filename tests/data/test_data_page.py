"""docs/data.md: its examples are run, and what it lists is what there is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.messages import QUERY_COLUMNS, RESPONSE_COLUMNS, ROLES, to_conversation
from megatron_swift.data.prepare import DataOptions, prepare
from megatron_swift.data.readers import READERS
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The page's files: each block of code that names one."""
    blocks = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert {name for name, _ in blocks} == {"data.jsonl", "datasets.json", "sums.csv", "plugin.py", "reviews.jsonl"}
    for name, text in blocks:
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def options(folder) -> DataOptions:
    values = {"split_dataset_ratio": 0.0, "strict": True, "dataset_shuffle": False}
    return DataOptions(("d",), cache_dir=folder / "cache", **values)


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path / "tok"))


def texts(prepared, tokenizer) -> list[str]:
    rows = [prepared.train.row(index)[0] for index in range(len(prepared.train))]
    return [tokenizer.decode(row.ids.tolist()) for row in rows]


def test_rows(folder, options, tokenizer):
    template = replace(get_template("chatml"), agent_template="hermes")
    prepared = prepare(replace(options, dataset=(str(folder / "data.jsonl"),), template=template), tokenizer)
    found = texts(prepared, tokenizer)
    for text, words in zip(
        found,
        (
            ["2 + 2?", "Sure?"],
            ["Be brief.", "Goethe."],
            ["German\ngood"],
            ["Jupiter.", "Mercury."],
            ["<tools>"],
            ["A line"],
        ),
        strict=True,
    ):
        assert all(word in text for word in words), text
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert to_conversation(rows[0]).messages[1].train is False


def test_described_data_set(folder, options, tokenizer):
    named = replace(options, dataset=("school-sums#3",), custom_dataset_info=(str(folder / "datasets.json"),))
    found = texts(prepare(named, tokenizer), tokenizer)
    assert len(found) == 3
    assert "1,5 + 1" in found[1]


def test_data_set_in_python(folder, options, tokenizer):
    named = replace(options, dataset=("my/reviews",), custom_register_path=(str(folder / "plugin.py"),))
    prepared = prepare(named, tokenizer)
    [text] = texts(prepared, tokenizer)
    assert "How many stars? Too salty." in text
    assert prepared.report.num_left_out == 1


def test_what_is_listed_is_what_there_is():
    for name in (*READERS, *QUERY_COLUMNS, *RESPONSE_COLUMNS, *(set(ROLES) - {"observations"})):
        assert f"`{name}`" in PAGE, name
