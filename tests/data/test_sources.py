from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_swift.data.messages import RowError
from megatron_swift.data.registry import Identity
from megatron_swift.data.sources import Table, find_source, hash_files, parse_dataset
from megatron_swift.utils.errors import DataError, SwiftError, UsageError

ALPACA = {"instruction": "a", "input": "", "output": "b"}


def open_table(value: object, *, names: tuple[str, ...] = (), authors: tuple[str, ...] = ()) -> Table:
    return Table(find_source(str(value)), identity=Identity(names, authors))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("value", "name", "subsets", "limit"),
    [
        ("org/name", "org/name", (), None),
        ("hf::org/name#500", "org/name", (), 500),
        ("ms::org/name:one/two#7", "org/name", ("one", "two"), 7),
        ("a#b#3", "a#b", (), 3),
        ("org/name:x:y", "org/name", ("x:y",), None),
    ],
)
def test_dataset_string(value, name, subsets, limit):
    assert parse_dataset(value)[1:] == (name, subsets, limit)


def test_existing_string_is_literal(tmp_path):
    path = write_lines(tmp_path / "odd:name#3", [ALPACA])
    assert parse_dataset(str(path)).name == str(path)
    assert parse_dataset(f"{path}#5")[1:] == (str(path), (), 5)


@pytest.mark.parametrize("value", ["org/name#", "org/name#x", "org/name#0", "org/name#-1", "org/name#1.5", " "])
def test_bad_dataset_string(value):
    with pytest.raises(UsageError):
        parse_dataset(value)


def test_lines_are_numbered_as_in_an_editor(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n   \n\n{"a": 2}\n{"a": "\xc3\xa9"}')
    table = open_table(path)
    assert [table.read(index) for index in range(len(table))] == [{"a": 1}, {"a": 2}, {"a": "é"}]
    assert [table.where(index) for index in range(len(table))] == [f"{path}:{line}" for line in (2, 5, 6)]


def test_array_elements_are_numbered_from_zero(tmp_path):
    rows = [{"a": "é😀"}, {"b": "\n[},{"}, {"c": [1, {"d": None}]}]
    path = tmp_path / "d.json"
    for indent, ascii_only in ((None, True), (None, False), (2, False)):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        table = open_table(path)
        assert [table.read(index) for index in range(len(table))] == rows
        assert table.where(2) == f"{path}[2]"


def test_json_file_of_lines(tmp_path):
    path = write_lines(tmp_path / "d.json", [{"a": 1}, {"a": 2}])
    table = open_table(path)
    assert len(table) == 2
    assert table.where(1) == f"{path}:2"


@pytest.mark.parametrize("text", ["[]", "[ ]\n", " "])
def test_empty_array(tmp_path, text):
    path = tmp_path / "d.json"
    path.write_text(text)
    assert len(open_table(path)) == 0


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b'[{"a": 1},\n{"a": 2', 2),
        (b'[{"a": 1}\n', 2),
        (b'[{"a": 1}\n{"a": 2}]', 2),
        (b'[{"a": 1},]', 1),
        (b'[{"a": 1}] x', 1),
        (b'[\n{"a": "\xff"}]', 2),
        (b'[{"a": "\x00"}]', 1),
        (b"[" * 100_000, 1),
    ],
)
def test_broken_array_names_the_line(tmp_path, raw, line):
    path = tmp_path / "d.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"d.json:{line}: "):
        open_table(path)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b'{"a": "b"', "bad JSON"),
        (b'{"a": NaN}', "bad JSON"),
        (b'{"a": -Infinity}', "bad JSON"),
        (b'{"a": 1, "a": 2}', "bad JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "bad JSON"),
        (b"{'a': 1}", "bad JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "bad JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": "\x00"}', "NUL character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
    ],
)
def test_malformed_row(tmp_path, raw, kind):
    good = b'{"a": 1}'
    path = tmp_path / "d.jsonl"
    path.write_bytes((b"" if kind == "byte order mark" else good + b"\n") + raw + b"\n" + good)
    table = open_table(path)
    bad = len(table) - 2
    with pytest.raises(RowError) as caught:
        table.read(bad)
    assert caught.value.kind == kind
    assert table.read(bad + 1) == {"a": 1}


@pytest.mark.parametrize("raw", [b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[1]", b"9" * 10_000])
def test_malformed_element(tmp_path, raw):
    path = tmp_path / "d.json"
    path.write_bytes(b'[{"a": 1}, ' + raw + b', {"a": 2}]')
    table = open_table(path)
    with pytest.raises(RowError):
        table.read(1)
    assert table.read(2) == {"a": 2}


def test_folder(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"n": 3}])
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": 2}]')
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("x")
    (tmp_path / "README.md").write_text("x")
    table = open_table(f"{tmp_path}/#2")
    assert [table.read(index)["n"] for index in range(len(table))] == [1, 2, 3]
    assert table.where(2) == f"{tmp_path / 'b.jsonl'}:1"
    assert table.source.request.limit == 2


def test_table_survives_pickling(tmp_path):
    table = open_table(write_lines(tmp_path / "d.jsonl", [{"n": 1}, {"n": 2}]))
    table.read(0)
    copy = pickle.loads(pickle.dumps(table))
    assert copy.read(1) == {"n": 2}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("/no/such/file", "does not exist"),
        ("nofile.jsonl", "does not exist"),
        ("./x/y", "does not exist"),
        ("some-org/some-set", "was not found"),
        ("some-org/self-cognition", "was not found"),
    ],
)
def test_missing(value, text):
    with pytest.raises(DataError, match=text) as caught:
        find_source(value)
    assert caught.value.do


def test_unknown_kind_and_empty_folder(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"")
    for value in (tmp_path / "d.parquet", tmp_path):
        with pytest.raises(SwiftError) as caught:
            find_source(str(value))
        assert caught.value.do


@pytest.mark.parametrize("name", ["swift/self-cognition", "ms::modelscope/self-cognition", "Swift/Self-Cognition#500"])
def test_self_cognition_is_shipped(name):
    table = open_table(name, names=("小黄", "Huang"), authors=("魔搭", "ModelScope"))
    assert len(table) == 108
    rows = [table.read(index) for index in range(108)]
    text = json.dumps(rows, ensure_ascii=False)
    assert "{{" not in text
    for row in rows:
        other = ("Huang", "ModelScope") if row["tag"] == "zh" else ("小黄", "魔搭")
        assert not any(word in row["response"] for word in other)
        assert table.source.needs_identity
    assert any("小黄" in row["response"] for row in rows)
    assert any("Huang" in row["response"] for row in rows)


def test_self_cognition_values():
    one = open_table("swift/self-cognition", names=("N",))
    texts = [one.read(index)["response"] for index in range(108)]
    assert not any("{{NAME}}" in text for text in texts)  # one value serves both languages
    assert any("{{AUTHOR}}" in text for text in texts)  # none leaves the placeholder


def test_self_cognition_qwen3():
    plain, qwen3 = open_table("swift/self-cognition"), open_table("swift/self-cognition:qwen3")
    assert qwen3.read(3)["query"] == plain.read(3)["query"] + " /no_think"
    assert qwen3.read(3)["response"] == "<think>\n\n</think>\n\n" + plain.read(3)["response"]
    assert len(open_table("swift/self-cognition:default/qwen3")) == 216
    with pytest.raises(UsageError, match="other"):
        find_source("swift/self-cognition:other")


def test_local_copy_inherits_the_fixup(tmp_path):
    row = {"instruction": "翻译", "input": "输入：早上好", "output": "x"}
    folder = tmp_path / "Alpaca-GPT4-data-zh"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [row])
    file = write_lines(tmp_path / "alpaca-gpt4-data-zh.jsonl", [row])
    other = write_lines(tmp_path / "other.jsonl", [row])
    assert open_table(folder).read(0)["input"] == "早上好"
    assert open_table(file).read(0)["input"] == "早上好"
    assert open_table(other).read(0)["input"] == "输入：早上好"
    with pytest.raises(UsageError, match="subset"):
        find_source(f"{other}:x")


def test_hash_follows_content_and_order(tmp_path):
    a, b = write_lines(tmp_path / "a.jsonl", [{"n": 1}]), write_lines(tmp_path / "b.jsonl", [{"n": 2}])
    copy = write_lines(tmp_path / "c.jsonl", [{"n": 1}])
    assert hash_files([a]) == hash_files([copy]) != hash_files([b])
    assert hash_files([a, b]) != hash_files([b, a])
    with pytest.raises(DataError, match="cannot be read"):
        hash_files([tmp_path / "gone.jsonl"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_reasons(tmp_path, data):
    """Any bytes: rows that can be read, RowErrors and DataErrors; nothing else."""
    raw = bytearray(b'[{"a": "b\xc3\xa9\\n"},\n {"a": [1.5, null, true]},\n\n{"c": {"d": {}}}]')
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'"[]{},:\\\n \x00\xff\xc3u9N'))
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"d{suffix}"
        path.write_bytes(raw)
        try:
            table = open_table(path)
        except DataError:
            continue
        for index in range(len(table)):
            assert table.where(index)
            with contextlib.suppress(RowError):
                assert isinstance(table.read(index), dict)
