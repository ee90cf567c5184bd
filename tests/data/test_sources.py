from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from megatron_swift.data.registry import Identity
from megatron_swift.data.sources import Table, find_source, parse_dataset
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
    assert parse_dataset(value)[1:4] == (name, subsets, limit)
    assert parse_dataset(value).prefix == (value[:4] if value[2:4] == "::" else "")


def test_existing_string_is_literal(tmp_path):
    path = write_lines(tmp_path / "odd:name#3", [ALPACA])
    assert parse_dataset(str(path)).name == str(path)
    assert parse_dataset(f"{path}#5")[1:4] == (str(path), (), 5)


@pytest.mark.parametrize("value", ["org/name#", "org/name#x", "org/name#0", "org/name#-1", "org/name#1.5", " "])
def test_bad_dataset_string(value):
    with pytest.raises(UsageError):
        parse_dataset(value)


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
        ("self-cognition", "does not exist"),
        ("org/name.csv", "does not exist"),
    ],
)
def test_missing(value, text):
    with pytest.raises(DataError, match=text) as caught:
        find_source(value)
    assert caught.value.do
    if value == "self-cognition":
        assert "swift/self-cognition" in caught.value.do


def test_unknown_kind_and_empty_folder(tmp_path):
    (tmp_path / "d.arrow").write_bytes(b"")
    for value in (tmp_path / "d.arrow", tmp_path):
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


def test_all_means_all_but_the_weak_ones():
    assert len(open_table("swift/self-cognition:all")) == 108


@pytest.mark.parametrize("name", ["data.csv", "data.txt", "data.json", "data.jsonl", "Data.JSONL"])
def test_kinds_of_files(tmp_path, name):
    rows = {"data.csv": "n,text\n1,a\n", "data.txt": "a\n", "data.json": '[{"text": "a"}]'}
    (tmp_path / name).write_text(rows.get(name, '{"text": "a"}\n'))
    for value in (tmp_path / name, tmp_path, f"{tmp_path / name}#3"):
        assert open_table(value).read(0)["text"] == "a"


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "d.jsonl", [ALPACA])
    assert open_table("~/d.jsonl#2").read(0) == ALPACA
    assert parse_dataset("~/d.jsonl").name == str(tmp_path / "d.jsonl")


def test_a_folder_named_like_a_set_of_many_subsets(tmp_path):
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    write_lines(folder / "mine.jsonl", [ALPACA])
    assert open_table(folder).read(0) == ALPACA
    assert open_table(folder / "mine.jsonl").read(0) == ALPACA


def test_names_with_spaces_and_other_scripts(tmp_path):
    folder = tmp_path / "мои данные"
    folder.mkdir()
    path = write_lines(folder / "数据 1.jsonl", [ALPACA] * 2)
    for value in (path, folder, f"{path}#7"):
        table = open_table(value)
        assert table.where(1) == f"{path}:2"
