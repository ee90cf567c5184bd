"""Why the cache has no entry: what differs from the last one for the same data sets."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.prepare import DataOptions, prepare
from megatron_swift.data.tokenizer import Tokenizer


def write(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps({"query": "q", "response": answer}) + "\n" for answer in answers))
    return path


@pytest.fixture
def told(tmp_path, tokenizer, caplog):
    """What is said about the cache when these options are prepared; the first time is done."""
    write(tmp_path / "b.jsonl", "one", "two")
    base = DataOptions(
        (str(write(tmp_path / "a.jsonl", "one", "two")), str(tmp_path / "b.jsonl")),
        split_dataset_ratio=0.0,
        cache_dir=tmp_path / "cache",
        max_length=100,
    )
    caplog.set_level(logging.INFO)

    def tell(tokenizer=tokenizer, **values) -> str:
        caplog.clear()
        prepare(replace(base, **values), tokenizer)
        return next(message for message in caplog.messages if message.startswith("data cache"))

    assert tell().endswith("there is no entry for this data yet")
    return tell


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_length": 200}, "--max_length (100 -> 200)"),
        ({"truncation": "left", "data_seed": 7}, '--data_seed (42 -> 7), --truncation_strategy ("delete" -> "left")'),
        ({"template": "qwen"}, "the template"),
        ({"columns": {"a": "b"}}, '--columns ([] -> [["a", "b"]])'),
    ],
)
def test_options(told, values, said):
    assert told(**values).endswith(f"compared with the last entry for this data, {said} changed")
    assert "hit" in told(**values)


def test_content(told, tmp_path):
    write(tmp_path / "b.jsonl", "one", "three")
    assert told().endswith(f"the content of {tmp_path / 'b.jsonl'} changed")


def test_tokenizer(told, tmp_path):
    other = Tokenizer.load(write_tokenizer(tmp_path / "other", eos="<|endoftext|>"))
    assert told(other).endswith(", the tokenizer changed")


def test_the_newest_entry_counts(told):
    told(max_length=200)
    assert "--max_length (200 -> 300)" in told(max_length=300)


def test_other_data_is_not_compared(told, tmp_path):
    assert told(dataset=(str(write(tmp_path / "c.jsonl", "x")),)).endswith("there is no entry for this data yet")


def test_a_damaged_description_is_passed_over(told, tmp_path):
    for path in (tmp_path / "cache").glob("*/ingredients.json"):
        path.write_text("x")
    assert told(max_length=200).endswith("there is no entry for this data yet")
