"""Input that strains the reader: Parquet of another schema, and folders with more files than a process may open."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_swift.data.prepare import DataOptions, prepare
from megatron_swift.data.sources import find_source
from megatron_swift.utils.errors import DataError


@pytest.fixture
def options(tmp_path) -> Callable[..., DataOptions]:
    def make(*dataset: object, **values: object) -> DataOptions:
        defaults = {"split_dataset_ratio": 0.0, "cache_dir": tmp_path / "cache", "max_length": 200, "strict": True}
        return DataOptions(tuple(map(str, dataset)), **{**defaults, **values})

    return make


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": [1, 2], "y": [3, 4]}, "no column to learn from: the row has x, y"),
        ({"query": [1, 2], "response": ["a", "b"]}, "query"),
        ({"messages": [1.5, 2.5]}, "messages"),
        ({"query": ["a", None], "response": ["b", None]}, r"\[1\]"),
        ({"text": [b"\xff\xfe", b"a"]}, "text"),
    ],
)
def test_parquet_of_another_schema(tmp_path, tokenizer, options, columns, said):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.table(columns), path)
    with pytest.raises(DataError, match=said) as caught:
        prepare(options(path), tokenizer)
    assert caught.value.exit_code == 3
    assert f"{path}[" in caught.value.what


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05} é.jsonl").write_text(json.dumps({"query": "q", "response": str(number)}) + "\n")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_more_files_than_may_be_open(tmp_path, tokenizer, options, processes):
    folder = write_folder(tmp_path / "many files", 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
    try:
        prepared = prepare(options(folder, dataset_num_proc=processes), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(prepared.train) == 300
    assert prepared.report.rows_read == {str(folder): 300}


def test_files_of_a_folder_are_not_compared_with_each_other(tmp_path, monkeypatch):
    """With 100,000 files it took hours; what is left is a few comparisons of a file, for sorting."""
    folder = write_folder(tmp_path / "d", 400)
    compared = 0
    equal = Path.__eq__

    def count(self: Path, other: object) -> bool:
        nonlocal compared
        compared += 1
        return equal(self, other)

    monkeypatch.setattr(Path, "__eq__", count)
    assert len(find_source(str(folder)).paths) == 400
    assert compared < 400 * 20
