from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from megatron_swift.data.lazy import open_lazy
from megatron_swift.data.prepare import DataOptions, find_sources, prepare
from megatron_swift.data.templates import get_template
from megatron_swift.utils.errors import DataError


@pytest.fixture
def options(tmp_path):
    def make(*dataset, **values) -> DataOptions:
        defaults = {"split_dataset_ratio": 0.0, "cache_dir": tmp_path / "cache", "max_length": 200}
        return DataOptions(
            tuple(map(str, dataset)), template=get_template("chatml"), **{**defaults, "strict": True, **values}
        )

    return make


def write_rows(path: Path, count: int) -> Path:
    rows = [{"query": f"q{n}", "response": f"{n:03}" + "x" * (n % 40)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lazy(options, tokenizer):
    return open_lazy(options, tokenizer, *find_sources(options))


def ids(rows) -> list:
    return [[sample.ids.tolist() for sample in rows.row(index)] for index in range(len(rows))]


@pytest.mark.parametrize("values", [{}, {"split_dataset_ratio": 0.2}, {"dataset_shuffle": False}])
def test_the_rows_of_prepare_in_its_order(tmp_path, tokenizer, options, values):
    given = options(write_rows(tmp_path / "a.jsonl", 50), write_rows(tmp_path / "b.jsonl", 30), **values)
    found, eager = lazy(given, tokenizer), prepare(given, tokenizer)
    assert ids(found.train) == ids(eager.train)
    assert (ids(found.val) if found.val else None) == (ids(eager.val) if eager.val else None)
    assert found.val_rows == list(eager.val_rows)
    assert found.rows_read == eager.report.rows_read


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_the_index_is_mapped_in_another_process(tmp_path, tokenizer, options, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write_rows(path, 20)
    elif suffix == ".json":
        path.write_text(json.dumps([{"query": "q", "response": str(n)} for n in range(20)]))
    elif suffix == ".csv":
        path.write_text("query,response\n" + "".join(f"q,{n}\n" for n in range(20)))
    else:
        path.write_text("".join(f"text {n}\n" for n in range(20)))
    rows = lazy(options(path), tokenizer).train
    sent = pickle.dumps(rows)
    again = pickle.loads(sent)
    assert ids(again) == ids(rows)
    if suffix in (".csv", ".json"):  # the other ones have an index of few numbers
        spans = again.rows.tables[0].files[0].spans
        assert Path(spans.starts.filename) == Path(f"{spans.place}.starts.npy")
        assert not spans.starts.flags.writeable


def test_bad_rows(tmp_path, tokenizer, options, caplog):
    path = write_rows(tmp_path / "a.jsonl", 20)
    lines = path.read_text().splitlines()
    lines[7] = "{"
    path.write_text("\n".join(lines))
    plain = {"dataset_shuffle": False}
    strict = lazy(options(path, **plain), tokenizer).train
    assert strict.row(6)
    with pytest.raises(DataError) as caught:
        strict.row(7)
    assert f"{path}:8: bad JSON" in caught.value.what
    loose = lazy(options(path, strict=False, **plain), tokenizer).train
    assert ids(loose)[7] == ids(loose)[8]
    assert "the next row stands in for" in caplog.text
    short = lazy(options(path, strict=False, max_length=3, **plain), tokenizer).train
    with pytest.raises(DataError, match="no row of the data set is left"):
        short.row(0)


def test_the_fingerprint_sees_what_matters(tmp_path, tokenizer, options):
    path = write_rows(tmp_path / "a.jsonl", 20)
    same = lazy(options(path), tokenizer).fingerprint
    assert lazy(options(path), tokenizer).fingerprint == same
    assert lazy(options(path, max_length=100), tokenizer).fingerprint != same
    assert lazy(options(f"{path}#19"), tokenizer).fingerprint != same
    write_rows(path, 21)
    assert lazy(options(path), tokenizer).fingerprint != same
