from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data.interleave import sample, split
from megatron_swift.data.prepare import DataOptions, Prepared, open_prepared, prepare
from megatron_swift.data.report import Report
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE
from megatron_swift.data.workers import map_in_order
from megatron_swift.utils.errors import DataError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def options(tmp_path) -> Callable[..., DataOptions]:
    def make(*dataset: object, **values: object) -> DataOptions:
        defaults = {"split_dataset_ratio": 0.0, "cache_dir": tmp_path / "cache", "max_length": 200}
        return DataOptions(tuple(map(str, dataset)), **{**defaults, **values})

    return make


def write_data(path: Path, count: int, *, size: Callable[[int], int] = lambda n: 1 + n % 40) -> Path:
    rows = [{"query": f"q{number}", "response": f"{number:03}" + "x" * size(number)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prepared: Prepared, tokenizer: Tokenizer, *, val: bool = False) -> list[list[int]]:
    """The number that each sample's response begins with, per row."""
    rows = prepared.val if val else prepared.train
    found = []
    for index in range(len(rows)):
        decoded = [tokenizer.decode(s.labels[s.labels != IGNORE].tolist()) for s in rows.row(index)]
        found.append([int(text[:3]) for text in decoded])
    return found


def content(prepared: Prepared) -> list[bytes]:
    return [path.read_bytes() for path in sorted(prepared.folder.rglob("*")) if path.is_file()]


def test_rows_in_order(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 30)
    plain = prepare(options(data, dataset_shuffle=False), tokenizer)
    assert texts(plain, tokenizer) == [[number] for number in range(30)]
    assert plain.val is None
    assert not list(plain.val_rows)
    assert (plain.first.ids == plain.train.row(0)[0].ids).all()
    shuffled = texts(prepare(options(data), tokenizer), tokenizer)
    assert sorted(shuffled) == texts(plain, tokenizer) != shuffled
    assert texts(prepare(options(data, data_seed=1), tokenizer), tokenizer) != shuffled


def test_packing(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 300)
    prepared = prepare(options(data, packing=True, max_length=400), tokenizer)
    rows = texts(prepared, tokenizer)
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert prepared.train.row_tokens.max() <= 400
    part = prepared.report.train
    assert part.rows == len(prepared.train) == len(rows)
    tokens = sum(len(sample.ids) for index in range(len(rows)) for sample in prepared.train.row(index))
    assert part.tokens == prepared.train.num_tokens == tokens
    assert part.trained == prepared.train.num_trained
    assert part.efficiency == pytest.approx(part.tokens / 400 / len(rows))
    assert part.efficiency > 0.95
    assert "packs" in prepared.report.table()
    assert Report.from_json(json.loads(json.dumps(prepared.report.as_json()))) == prepared.report


def test_split(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 100)
    prepared = prepare(options(data, split_dataset_ratio=0.05), tokenizer)
    train, val = texts(prepared, tokenizer), texts(prepared, tokenizer, val=True)
    assert len(val) == 5
    assert sorted(train + val) == [[number] for number in range(100)]
    contents = [row["messages"][1]["content"][:3] for row in prepared.val_rows]
    assert [int(text) for text in contents] == [number for row in val for number in row]
    assert prepared.val_rows[0]["messages"][0]["role"] == "user"


def test_quick_start_numbers(tmp_path, tokenizer, options):
    """spec/behaviour.md 3.2: three sets of #500, the last of 108 rows, give 1489 training and 11 validation rows."""
    first, second = (write_data(tmp_path / name, 600) for name in ("a.jsonl", "b.jsonl"))
    identity = {"model_name": ("n",), "model_author": ("a",), "max_length": None}
    prepared = prepare(
        options(f"{first}#500", f"{second}#500", "swift/self-cognition#500", split_dataset_ratio=0.01, **identity),
        tokenizer,
    )
    assert (len(prepared.train), len(prepared.val)) == (1489, 11)
    assert prepared.report.rows_read["swift/self-cognition#500"] == 108


def test_sample_and_split():
    state = np.random.RandomState(0)
    rows = np.arange(10, 20)
    counts = np.bincount(sample(rows, 25, state=state, shuffle=True), minlength=20)[10:]
    assert sorted(counts) == [2] * 5 + [3] * 5
    assert sample(rows, 13, state=state, shuffle=False).tolist() == [*range(10, 20), 10, 11, 12]
    train, val = split(rows, limit=None, ratio=0.2, state=state, shuffle=False)
    assert (train.tolist(), val.tolist()) == (list(range(10, 18)), [18, 19])
    train, val = split(rows, limit=4, ratio=0.01, state=state, shuffle=True)
    assert (len(train), len(val)) == (3, 1)
    for limit, one in ((None, rows[:1]), (1, rows)):  # one row is for training
        train, val = split(one, limit=limit, ratio=0.5, state=state, shuffle=True)
        assert (len(train), len(val)) == (1, 0)


def test_val_dataset_switches_the_split_off(tmp_path, tokenizer, options):
    data, val = write_data(tmp_path / "d.jsonl", 20), write_data(tmp_path / "v.jsonl", 7)
    prepared = prepare(options(data, val_dataset=(f"{val}#3",), split_dataset_ratio=0.5), tokenizer)
    assert len(prepared.train) == 20
    assert len(prepared.val) == 3
    assert not list(prepared.val_rows)
    whole = prepare(options(data, val_dataset=(str(val),)), tokenizer)
    assert texts(whole, tokenizer, val=True) == [[number] for number in range(7)]


def test_number_of_processes_changes_nothing(tmp_path, tokenizer, options, monkeypatch):
    monkeypatch.setattr("megatron_swift.data.build.CHUNK", 7)
    data = write_data(tmp_path / "d.jsonl", 100)
    with data.open("a") as file:
        file.write('{"query": "q"}\n')
    base = options(f"{data}#150", packing=True, split_dataset_ratio=0.1, use_cache=False)
    reference = content(prepare(base, tokenizer))
    for method in ("fork", "spawn"):
        other = prepare(replace(base, dataset_num_proc=3, start_method=method), tokenizer)
        assert content(other) == reference


def test_warm_hit_encodes_nothing(tmp_path, tokenizer, options, monkeypatch):
    data = write_data(tmp_path / "d.jsonl", 1000)
    cold = prepare(options(data, packing=True), tokenizer)
    monkeypatch.setattr("megatron_swift.data.chunks.encode_many", pytest.fail)
    begin = time.process_time()
    warm = prepare(options(data, packing=True, dataset_num_proc=2), tokenizer)
    assert time.process_time() - begin < 0.5
    assert warm.folder == cold.folder
    assert warm.report == cold.report
    assert open_prepared(cold.folder).report == cold.report


def test_key_follows_what_matters(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 20)
    base = options(data)
    changes = [
        {"max_length": 100},
        {"system": "s"},
        {"template": "llama3"},
        {"packing": True},
        {"loss_scale": "all"},
        {"data_seed": 5},
        {"strict": True},
        {"columns": {"query": "instruction"}},
        {"split_dataset_ratio": 0.1},
        {"dataset": (f"{data}#5",)},
    ]
    folders = {prepare(replace(base, **change), tokenizer).folder for change in changes}
    assert len(folders | {prepare(base, tokenizer).folder}) == len(changes) + 1
    write_data(data, 21)
    assert prepare(base, tokenizer).folder not in folders
    copy = tmp_path / "renamed.jsonl"
    copy.write_bytes(data.read_bytes())
    assert prepare(options(copy), tokenizer).folder == prepare(base, tokenizer).folder


BAD = [
    '{"query": "q", "response": "half',
    '{"query": "q", "response": NaN}',
    '{"query": "q", "response": ""}',
    '{"messages": [{"role": "wizard", "content": "x"}]}',
    '{"query": "q", "response": "\\ud800"}',
]


@pytest.fixture
def bad_data(tmp_path) -> Path:
    path = write_data(tmp_path / "d.jsonl", 10)
    good = path.read_text().splitlines()
    path.write_text("\n".join([*good[:4], *BAD, *good[4:]]))
    return path


def test_strict_names_the_first_bad_line(bad_data, tokenizer, options):
    with pytest.raises(DataError, match=r"d\.jsonl:5: bad JSON: ") as caught:
        prepare(options(bad_data, strict=True, dataset_num_proc=2), tokenizer)
    assert caught.value.do
    assert caught.value.exit_code == 3


def test_bad_rows_are_counted_per_reason(bad_data, tokenizer, options):
    prepared = prepare(options(bad_data), tokenizer)
    assert len(prepared.train) == 10
    counts = {kind: reason.count for kind, reason in prepared.report.left_out.items()}
    assert counts == {"bad JSON": 2, "empty response": 1, "unknown role": 1, "lone surrogate": 1}
    assert prepared.report.left_out["bad JSON"].examples[1].startswith(f"{bad_data}:6: ")
    assert prepared.report.num_left_out == 5
    assert f"{bad_data}:7: " in prepared.report.table()


def test_long_rows(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 10, size=lambda number: 200 if number in (3, 4) else 1)
    deleted = prepare(options(data), tokenizer)
    assert len(deleted.train) == 8
    assert deleted.report.left_out["longer than max_length"].count == 2
    assert deleted.report.left_out["longer than max_length"].examples[0].startswith(f"{data}:4: ")
    cut = prepare(options(data, truncation="right"), tokenizer)
    assert len(cut.train) == 10
    assert cut.train.row_tokens.max() == 200
    with pytest.raises(DataError, match=r"d\.jsonl:4: ") as caught:
        prepare(options(data, truncation="raise"), tokenizer)
    assert "--max_length" in caught.value.do


def test_no_row_left(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 5)
    with pytest.raises(DataError, match="no row is left") as caught:
        prepare(options(data, max_length=3), tokenizer)
    assert caught.value.why == "longer than max_length: 5"
    data.write_text("{}\n[]\n")
    with pytest.raises(DataError, match="no usable row") as caught:
        prepare(options(data), tokenizer)
    assert "not a JSON object: 1" in caught.value.why
    data.write_text("\n")
    with pytest.raises(DataError, match="no usable row"):
        prepare(options(data), tokenizer)


def test_validation_of_long_rows_only(tmp_path, tokenizer, options, caplog):
    data = write_data(tmp_path / "d.jsonl", 5)
    long = write_data(tmp_path / "v.jsonl", 2, size=lambda number: 300)
    with pytest.raises(DataError, match="val_dataset"):
        prepare(options(data, val_dataset=(str(long),)), tokenizer)
    split_off = write_data(tmp_path / "s.jsonl", 10, size=lambda number: 300 if number == 9 else 1)
    prepared = prepare(options(split_off, split_dataset_ratio=0.1, dataset_shuffle=False), tokenizer)
    assert prepared.val is None
    assert "no evaluation" in caplog.text


def test_one_row(tmp_path, tokenizer, options):
    prepared = prepare(options(write_data(tmp_path / "d.jsonl", 1), split_dataset_ratio=0.01), tokenizer)
    assert len(prepared.train) == 1
    assert prepared.val is None


def test_repeated_rows_are_stored_once(tmp_path, tokenizer, options):
    data = write_data(tmp_path / "d.jsonl", 10)
    once, often = prepare(options(data), tokenizer), prepare(options(f"{data}#95"), tokenizer)
    assert len(often.train) == 95
    assert often.train.meta["samples"] == once.train.meta["samples"] == 10
    assert often.report.train.samples == often.report.train.rows_wanted == 95


def test_missing_identity_is_said(tokenizer, options, caplog):
    prepare(options("swift/self-cognition", model_name=("n",), max_length=None), tokenizer)
    assert "--model_author is not given" in caplog.text
    assert "--model_name" not in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"dataset": ()},
        {"split_dataset_ratio": 1.0},
        {"split_dataset_ratio": -0.1},
        {"packing": True, "max_length": None},
        {"dataset_num_proc": 0},
    ],
)
def test_options_that_cannot_work(tmp_path, tokenizer, options, values):
    data = write_data(tmp_path / "d.jsonl", 2)
    with pytest.raises(UsageError):
        prepare(replace(options(data), **values), tokenizer)


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("three", why="w")
    return number


def exit_at_three(number: int) -> int:
    if number == 3:
        raise SystemExit(1)
    return number


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    assert list(map_in_order(str, range(20), num_proc=3, start_method=method)) == [str(n) for n in range(20)]
    results = map_in_order(fail_at_three, range(20), num_proc=2, start_method=method)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="three"):
        next(results)
    with pytest.raises(DataError, match="died"):
        list(map_in_order(exit_at_three, range(20), num_proc=2, start_method=method))


def test_preparation_does_not_import_torch():
    code = "import megatron_swift.data.prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
def test_real_rows(tokenizer, options):
    names = ("alpaca_zh_demo.json#500", "alpaca_en_demo.json#500")
    values = {"packing": True, "max_length": 4096, "split_dataset_ratio": 0.01, "strict": True}
    prepared = prepare(options(*(SHARED / name for name in names), **values), tokenizer)
    assert set(prepared.report.left_out) <= {"longer than max_length"}
    assert prepared.report.train.rows_wanted == 990
    assert prepared.report.train.efficiency > 0.98
