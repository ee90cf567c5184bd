"""`prepare` on rows of every kind and in every state: malformed, weighted, with tools, drawn in turn, of users' own sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data import build, chunks
from megatron_swift.data import prepare as module
from megatron_swift.data.prepare import DataOptions, Prepared, prepare
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import DataError, UsageError


@pytest.fixture
def options(tmp_path) -> Callable[..., DataOptions]:
    def make(*dataset: object, **values: object) -> DataOptions:
        defaults = {"split_dataset_ratio": 0.0, "cache_dir": tmp_path / "cache", "max_length": 400}
        return DataOptions(tuple(map(str, dataset)), **{**defaults, **values})

    return make


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def qa(*names: object) -> list[dict]:
    return [{"query": "q", "response": f"{name}"} for name in names]


def replies(prepared: Prepared, tokenizer: Tokenizer) -> list[str]:
    """The trained text of each row, without the end marker."""
    found = []
    for index in range(len(prepared.train)):
        for sample in prepared.train.row(index):
            text = tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist())
            found.append(text.replace("<|im_end|>", "").strip())
    return found


# --- malformed rows (F43) --------------------------------------------------------------------------------------------

SKIP = "--strict false"
MALFORMED = [
    (b'{"query": "q", "response": "half', "bad JSON"),
    (b'\xef\xbb\xbf{"query": "q", "response": "r"}', "byte order mark"),
    (b'{"query": "q", "response": "r\x00"}', "NUL character"),
    (b'{"query": "q", "response": "r\\u0000"}', "NUL character"),
    (b'{"query": "q", "response": "\\ud800"}', "lone surrogate"),
    (b'{"query": "q", "response": NaN}', "bad JSON"),
    (b'{"query": "q", "query": "p", "response": "r"}', "bad JSON"),
    (b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b', "response": "r"}', "bad JSON"),
    (b'{"query": "q", "response": [' + b"[" * 800 + b"]" * 800 + b"]}", "content is not text"),
    (b'{"query": "q", "response": "r", "tools": [' + b'{"a":' * 800 + b"1" + b"}" * 800 + b"]}", "malformed tools"),
    (b'{"query": 5, "response": "r"}', "content is not text"),
    (b'{"query": "q", "response": {"a": 1}}', "content is not text"),
    (b'{"messages": {"role": "user"}}', "malformed column"),
    (b'{"messages": [5]}', "malformed message"),
    (b'{"messages": [{"role": "wizard", "content": "x"}]}', "unknown role"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}', "empty response"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    (
        b'{"messages": [{"role": "system", "content": "s"}, {"role": "system", "content": "t"},'
        b' {"role": "assistant", "content": "r"}]}',
        "system message is not the first",
    ),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"},'
        b' {"role": "assistant", "content": "r"}]}',
        "two user turns in a row",
    ),
    (b'{"query": "q", "response": "r", "images": ["a.png"]}', "column 'images' is not supported"),
    (b"[1, 2]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"query": "\xff", "response": "r"}', "not UTF-8"),
    (b'{"number": 1}', "no column to learn from"),
    (b'{"question": "q", "problem": "q", "response": "r"}', "two columns have one meaning"),
]


@pytest.mark.parametrize(("raw", "kind"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_row(tmp_path, tokenizer, options, raw, kind):
    """Strict: an error of exit code 3 that names file, line and reason and says what to do. Otherwise: left out, counted."""
    good = b'{"query": "q", "response": "good"}'
    path = tmp_path / "d.jsonl"
    path.write_bytes((b"" if kind == "byte order mark" else good + b"\n") + raw + b"\n" + good)
    line = 1 if kind == "byte order mark" else 2
    with pytest.raises(DataError) as caught:
        prepare(options(path, strict=True), tokenizer)
    assert caught.value.what.startswith(f"{path}:{line}: {kind}")
    assert len(caught.value.what) < len(str(path)) + 200
    assert SKIP in caught.value.do
    assert caught.value.exit_code == 3
    prepared = prepare(options(path), tokenizer)
    assert {reason: found.count for reason, found in prepared.report.left_out.items()} == {kind: 1}
    assert replies(prepared, tokenizer) == ["good"] * (line)


def test_all_of_them_at_once(tmp_path, tokenizer, options):
    """Exact counts per reason, in the report and in the table, however many processes."""
    path = tmp_path / "d.jsonl"
    lines = [raw for raw, kind in MALFORMED if kind != "byte order mark"]
    path.write_bytes(b"\n".join([json.dumps(row).encode() for row in qa(*range(30))] + lines))
    expected: dict[str, int] = {}
    for _, kind in MALFORMED:
        if kind != "byte order mark":
            expected[kind] = expected.get(kind, 0) + 1
    for num_proc in (1, 2):
        report = prepare(options(path, dataset_num_proc=num_proc, use_cache=False), tokenizer).report
        assert {kind: reason.count for kind, reason in report.left_out.items()} == expected
        assert report.train.samples == 30
        table = report.table()
        assert f"{30 + len(lines)} rows read, {len(lines)} left out" in table
        for kind, count in expected.items():
            share = f"{100 * count / (30 + len(lines)):.2f} %"
            assert any(kind in line and line.split()[:3] == [str(count), *share.split()] for line in table.splitlines())


def test_a_row_of_ten_megabytes(tmp_path, tokenizer, options):
    path = write_rows(tmp_path / "d.jsonl", [*qa("a"), {"query": "q", "response": "long " * 2_000_000}, *qa("b")])

    def prepared(_):
        """In a process of its own: it takes a gigabyte and a half that is not given back, and that every later fork would carry."""
        found = prepare(options(path, strict=True, dataset_shuffle=False), tokenizer)
        return replies(found, tokenizer), found.report.left_out["longer than max_length"], found.report.table()

    [(answers, reason, table)] = run_ranks(prepared, 1)
    assert answers == ["a", "b"]
    assert reason.count == 1
    assert reason.examples[0].startswith(f"{path}:2: ")
    assert len(table) < 2000


def test_data_that_would_steer_the_terminal(tmp_path, tokenizer, options):
    rows = [*qa("a"), {"messages": [{"role": "\x1b[2J\n", "content": "x"}]}]
    report = prepare(options(write_rows(tmp_path / "d.jsonl", rows)), tokenizer).report
    assert "\x1b" not in report.table()


@pytest.mark.parametrize("raw", ["", "\n\n", "[]"])
def test_no_rows(tmp_path, tokenizer, options, raw):
    path = tmp_path / "d.json"
    path.write_text(raw)
    with pytest.raises(DataError, match="has no usable row") as caught:
        prepare(options(path), tokenizer)
    assert (caught.value.why, caught.value.do) == ("it is empty", f"look into {path}")
    good = write_rows(tmp_path / "good.jsonl", qa(1))
    with pytest.raises(DataError, match=r"^--val_dataset .* has no usable row"):
        prepare(options(good, val_dataset=(str(path),)), tokenizer)


def test_a_file_that_changes_between_its_hash_and_its_rows(tmp_path, tokenizer, options, monkeypatch):
    path = write_rows(tmp_path / "d.jsonl", qa(1, 2))

    def hash_then_append(paths: tuple[Path, ...], **memory: Path) -> str:
        result = hash_files(paths, **memory)
        with path.open("a") as file:
            file.write(json.dumps(qa(3)[0]))
        return result

    hash_files = module.hash_files
    monkeypatch.setattr(module, "hash_files", hash_then_append)
    with pytest.raises(DataError, match="has changed while it was read"):
        prepare(options(path), tokenizer)
    assert not list((tmp_path / "cache").glob("[!.]*/"))  # nothing is kept under the hash of the old content


def test_columns_must_be_names(tmp_path, tokenizer, options):
    path = write_rows(tmp_path / "d.jsonl", [{"problem": "q", "result": "r"}])
    assert replies(prepare(options(path, columns={"Result": "response"}), tokenizer), tokenizer) == ["r"]
    with pytest.raises(UsageError, match="--columns: 'result' must become a name, not 5"):
        prepare(options(path, columns={"result": 5}), tokenizer)


# --- kinds of files and rows -----------------------------------------------------------------------------------------


def test_every_kind_of_file_together(tmp_path, tokenizer, options):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    write_rows(tmp_path / "a.jsonl", qa("jsonl"))
    (tmp_path / "b.json").write_text(json.dumps(qa("json")))
    (tmp_path / "c.csv").write_text('query,response\nq,"c\nsv"\n')
    (tmp_path / "d.txt").write_text("text\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(qa("parquet")), tmp_path / "e.parquet")
    files = [tmp_path / name for name in ("a.jsonl", "b.json", "c.csv", "d.txt", "e.parquet")]
    prepared = prepare(options(*files, dataset_shuffle=False, strict=True), tokenizer)
    assert replies(prepared, tokenizer) == ["jsonl", "json", "c\nsv", "text", "parquet"]
    folder = prepare(options(tmp_path, dataset_shuffle=False, strict=True), tokenizer)
    assert replies(folder, tokenizer) == ["jsonl", "json", "c\nsv", "parquet"]  # plain text only where nothing else is
    twice = prepare(options(f"{files[2]}#2", files[2], dataset_shuffle=False), tokenizer)
    assert replies(twice, tokenizer) == ["c\nsv"] * 3


def test_weights_reach_the_rows(tmp_path, tokenizer, options):
    def row(**keys: object) -> dict:
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "XY", **keys}]}

    plain = [row(), row(loss=True)]
    weighted = prepare(
        options(write_rows(tmp_path / "d.jsonl", [*plain, row(loss_scale=0.5)]), dataset_shuffle=False), tokenizer
    )
    for index, weight in enumerate((1, 1, 0.5)):
        [sample] = weighted.train.row(index)
        assert (sample.weights == np.where(sample.labels != IGNORE, np.float32(weight), 0)).all()
    alone = prepare(options(write_rows(tmp_path / "e.jsonl", plain)), tokenizer)
    assert alone.train.row(0)[0].weights is None


def test_tools_and_weights_of_split_rows_are_kept(tmp_path, tokenizer, options):
    """val_dataset.jsonl is read back as the rows that it holds."""
    tool = {"name": "add", "description": "a", "parameters": {"type": "object", "properties": {}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {}}'},
        {"role": "tool_response", "content": "5"},
        {"role": "assistant", "content": "five", "loss_scale": 2.0, "loss": True},
    ]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": turns, "tools": [tool]}] * 2)
    template = replace(get_template("chatml"), agent_template="hermes")
    base = options(path, split_dataset_ratio=0.5, template=template, max_length=None, strict=True)
    prepared = prepare(base, tokenizer)
    assert prepared.val_rows[0]["messages"][3] == turns[3]
    assert prepared.val_rows[0]["tools"] == [json.dumps(tool)]
    text = tokenizer.decode(prepared.train.row(0)[0].ids.tolist())
    assert "<tools>" in text
    assert "five" in text
    again = prepare(
        replace(base, dataset=(str(write_rows(tmp_path / "val.jsonl", prepared.val_rows)),), split_dataset_ratio=0.0),
        tokenizer,
    )
    assert (again.train.row(0)[0].ids == prepared.train.row(0)[0].ids).all()


def test_long_rows_in_pieces(tmp_path, tokenizer, options):
    path = write_rows(tmp_path / "d.jsonl", [*qa("short"), {"text": "".join(chr(97 + n % 26) for n in range(100))}])
    for packing in (False, True):
        prepared = prepare(
            options(f"{path}#4", truncation="split", max_length=40, packing=packing, template="generation"), tokenizer
        )
        assert prepared.train.row_tokens.max() <= 40
        assert prepared.report.train.rows_wanted == 4
        assert prepared.report.train.samples == 2 * (1 + 3)
        texts = sorted(replies(prepared, tokenizer))
        assert texts.count("".join(chr(97 + n % 26) for n in range(100))[80:]) == 2
        assert not prepared.report.left_out


# --- several data sets -----------------------------------------------------------------------------------------------


def test_interleaving(tmp_path, tokenizer, options):
    first = write_rows(tmp_path / "a.jsonl", qa(*(f"a{n}" for n in range(5))))
    second = write_rows(tmp_path / "b.jsonl", qa(*(f"b{n}" for n in range(60))))
    base = options(first, second, interleave_prob=(0.5, 0.5), dataset_shuffle=False)
    drawn = replies(prepare(base, tokenizer), tokenizer)
    assert [text for text in drawn if text[0] == "a"] == [f"a{n}" for n in range(5)]
    assert drawn[-1] == "a4"
    prepared = prepare(replace(base, stopping_strategy="all_exhausted"), tokenizer)
    every = replies(prepared, tokenizer)
    assert every[: len(drawn)] == drawn
    assert every[-1] == "b59"
    assert prepared.report.rows_train == {str(first): len(every) - 60, str(second): 60}
    table = prepared.report.table()
    assert f"{5:>9} {len(every) - 60:>9} {0:>9}  {first}" in table
    assert replies(prepare(replace(base, data_seed=1), tokenizer), tokenizer) != drawn
    shuffled = replies(prepare(replace(base, dataset_shuffle=True), tokenizer), tokenizer)
    assert shuffled != sorted(shuffled)


def test_interleaving_leaves_validation_alone(tmp_path, tokenizer, options):
    first, second = (write_rows(tmp_path / name, qa(*range(50))) for name in ("a.jsonl", "b.jsonl"))
    val = write_rows(tmp_path / "v.jsonl", qa(*range(7)))
    base = options(first, second, interleave_prob=(0.9, 0.1))
    assert len(prepare(replace(base, split_dataset_ratio=0.1), tokenizer).val) == 10
    assert len(prepare(replace(base, val_dataset=(str(val),)), tokenizer).val) == 7


@pytest.mark.parametrize(("prob", "why"), [((0.5, 0.5, 0.0), "3 probabilities for 2"), ((0.5, 0.4), "not 1")])
def test_interleaving_that_cannot_be(tmp_path, tokenizer, options, prob, why):
    path = write_rows(tmp_path / "a.jsonl", qa(1))
    with pytest.raises(UsageError, match=why):
        prepare(options(path, path, interleave_prob=prob), tokenizer)


def test_a_strategy_without_probabilities_is_said(tmp_path, tokenizer, options, caplog):
    prepare(options(write_rows(tmp_path / "a.jsonl", qa(1)), stopping_strategy="all_exhausted"), tokenizer)
    assert "--stopping_strategy is not used" in caplog.text


# --- users' own data sets --------------------------------------------------------------------------------------------

PLUGIN = """
from megatron_swift.data.registry import Registered, Subset

def fix(row, identity):
    return {"query": row["q"], "response": row["r"] + "!"} if row["r"] != "no" else None

DATASETS = [Registered(aliases=("me/mine",), path="mine.jsonl", subsets=(Subset(fixup=fix),))]
"""


@pytest.fixture
def plugin(tmp_path) -> Path:
    write_rows(tmp_path / "mine.jsonl", [{"q": "q", "r": text} for text in ("a", "no", "b", "c")])
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return tmp_path / "plugin.py"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_plugin_in_processes(tokenizer, options, plugin, monkeypatch, method):
    monkeypatch.setattr(build, "CHUNK", 1)
    base = options("me/mine", custom_register_path=(str(plugin),), dataset_num_proc=2, start_method=method, strict=True)
    prepared = prepare(replace(base, dataset_shuffle=False), tokenizer)
    assert replies(prepared, tokenizer) == ["a!", "b!", "c!"]
    assert prepared.report.left_out["not wanted by its data set"].count == 1  # though strict: nothing is wrong with it


def test_the_cache_follows_the_users_code(tmp_path, tokenizer, options, plugin):
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"dataset_path": "mine.jsonl", "columns": {"q": "query", "r": "response"}}]))
    named = options("me/mine", custom_register_path=(str(plugin),))
    described = options(str(tmp_path / "mine.jsonl"), custom_dataset_info=(str(info),))
    folders = {prepare(named, tokenizer).folder, prepare(described, tokenizer).folder}
    assert len(folders) == 2
    second = (
        tmp_path / "second.py"
    )  # a file that was run stays as it was for the process: another one stands for a change
    second.write_text(PLUGIN.replace('"!"', '"?"'))
    changed = prepare(options("me/mine", custom_register_path=(str(second),)), tokenizer)
    assert changed.folder not in folders
    info.write_text(info.read_text().replace('"q"', '"Q"'))
    assert prepare(described, tokenizer).folder not in folders


def test_a_fickle_fixup(tmp_path, tokenizer, options):
    write_rows(tmp_path / "mine.jsonl", [{"q": "q", "r": text} for text in "abc"])
    plugin = tmp_path / "fickle.py"
    plugin.write_text(
        PLUGIN.replace("def fix", "SEEN = []\n\ndef fix").replace(
            "    return", "    SEEN.append(row)\n    assert len(SEEN) != 5\n    return"
        )
    )
    base = options("me/mine", custom_register_path=(str(plugin),), use_cache=False)
    report = prepare(base, tokenizer).report
    assert report.left_out["the data set's fixup failed"].count == 1
    assert report.train.samples == 2


@pytest.mark.parametrize(
    "change",
    [
        {"interleave_prob": (0.4, 0.6)},
        {"interleave_prob": (0.4, 0.6), "stopping_strategy": "all_exhausted"},
        {"truncation": "split"},
        {"template": get_template("qwen2_5")},
    ],
)
def test_the_cache_follows_the_options(tmp_path, tokenizer, options, change):
    path = write_rows(tmp_path / "a.jsonl", qa(1, 2))
    base = options(path, path)
    assert prepare(replace(base, **change), tokenizer).folder != prepare(base, tokenizer).folder


def test_reuse_cache_encodes_anew(tmp_path, tokenizer, options, monkeypatch):
    class Encoded(Exception):
        pass

    def encode(*args: object, **options: object) -> None:
        raise Encoded

    base = options(write_rows(tmp_path / "a.jsonl", qa(1)))
    prepare(base, tokenizer)
    monkeypatch.setattr(chunks, "encode_many", encode)
    prepare(base, tokenizer)
    with pytest.raises(Encoded):
        prepare(replace(base, download_mode="reuse_cache_if_exists"), tokenizer)
