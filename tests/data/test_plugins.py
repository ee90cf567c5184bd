"""A user's own data sets: Python files with DATASETS, and JSON files that describe them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_swift.data.messages import RowError
from megatron_swift.data.plugins import load_plugins
from megatron_swift.data.registry import Identity, Rename, Subset, read_dataset_info
from megatron_swift.data.sources import UNWANTED, Table, find_source, make_lookup
from megatron_swift.utils.errors import UsageError

PLUGIN = """
from megatron_swift.data.registry import Registered, Subset
from helper import heading

def poems(row, identity):
    if row["lines"] == "skip":
        return None
    return {"query": heading + row["title"], "response": "\\n".join(row["lines"])}

DATASETS = [
    Registered(aliases=("me/poems",), path="poems.jsonl", subsets=(Subset(fixup=poems), Subset("raw")), splits=("train",)),
    Registered("me/other"),
]
TEMPLATES = ["a template"]
"""


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


@pytest.fixture
def plugin(tmp_path) -> str:
    write(tmp_path / "helper.py", "heading = 'A poem: '\n")
    rows = [{"title": "t", "lines": ["a", "b"]}, {"title": "u", "lines": "skip"}, {"title": 5, "lines": ["c"]}]
    write(tmp_path / "poems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return write(tmp_path / "plugin.py", PLUGIN)


def test_the_lists_of_a_file(plugin, monkeypatch, tmp_path):
    path = list(sys.path)
    plugins = load_plugins([plugin])
    assert [entry.names[0] for entry in plugins.datasets] == ["me/poems", "me/other"]
    assert (plugins.templates, plugins.families) == (("a template",), ())
    assert sys.path == path
    assert load_plugins([]) == ((), (), (), "")
    changed = write(tmp_path / "second.py", "FAMILIES = (1, 2)")
    both = load_plugins([plugin, changed])
    assert (both.templates, both.families) == (("a template",), (1, 2))
    assert both.fingerprint != plugins.fingerprint


def test_a_data_set_of_a_file(plugin, tmp_path):
    lookup = make_lookup(custom_register_path=[plugin])
    table = Table(find_source("me/poems#2", lookup=lookup), identity=Identity())
    for rows in (table, pickle.loads(pickle.dumps(table))):
        assert rows.read(0) == {"query": "A poem: t", "response": "a\nb"}
        with pytest.raises(RowError) as caught:
            rows.read(1)
        assert caught.value.kind == UNWANTED
        with pytest.raises(RowError, match=r"the data set's fixup failed: TypeError: .*plugin\.py:8\)"):
            rows.read(2)
    raw = Table(find_source("me/poems:raw", lookup=lookup), identity=Identity())
    assert raw.read(0)["title"] == "t"
    by_path = Table(find_source(str(tmp_path / "poems.jsonl"), lookup=lookup), identity=Identity())
    assert by_path.read(0)["query"] == "A poem: t"
    with pytest.raises(UsageError, match="no subset 'x'"):
        find_source("me/poems:x", lookup=lookup)


def test_a_fixup_works_in_a_process_that_knows_nothing_of_the_file(plugin):
    table = Table(find_source("me/poems", lookup=make_lookup(custom_register_path=[plugin])), identity=Identity())
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(0)['query'])"
    shown = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(table), capture_output=True, check=True)
    assert shown.stdout.decode().strip() == "A poem: t"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1\n", "defines nothing"),
        ("DATASETS = 5\n", "DATASETS must be a list, not int"),
        ("DATASETS = ['a']\n", "item 0 of DATASETS is not a Registered"),
        ("from megatron_swift.data.registry import Registered\nDATASETS = [Registered()]\n", "with a name"),
        ("x = 1\n1 / 0\n", "fails in line 2"),
        ("x = 1\n\nx = (\n", "fails in line 3"),
        ("import no_such_module\n", "fails in line 1"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, why):
    path = write(tmp_path / "plugin.py", text)
    with pytest.raises(UsageError, match=why) as caught:
        load_plugins([path])
    assert caught.value.what.startswith(f"--custom_register_path {path}")
    with pytest.raises(UsageError, match="is not a file"):
        load_plugins([str(tmp_path / "gone.py")])


def test_the_flag_in_messages(tmp_path):
    with pytest.raises(UsageError, match=r"^--external_plugins .* is not a Python file"):
        load_plugins([write(tmp_path / "plugin.txt", "DATASETS = []")], flag="--external_plugins")


# --- descriptions in JSON --------------------------------------------------------------------------------------------


def test_a_description(tmp_path):
    info = [
        {
            "ms_dataset_id": "me/sums",
            "hf_dataset_id": "you/sums",
            "subsets": ["default", {"name": "hard", "subset": "h", "columns": {"q": "query"}, "is_weak_subset": True}],
            "split": ["train", "more"],
            "columns": {"Problem": "query", "result": "response"},
            "tags": ["math"],
            "help": "sums",
        },
        {"dataset_path": "sums.csv", "dataset_name": "my-sums", "columns": {"result": "response"}},
    ]
    file = write(tmp_path / "info.json", json.dumps(info))
    first, second = read_dataset_info(file)
    assert first.names == ("me/sums", "you/sums")
    assert first.splits == ("train", "more")
    assert first.subsets[1] == Subset("hard", Rename((("q", "query"),)), "h", weak=True)
    assert second.path == str(tmp_path / "sums.csv")
    assert first.fingerprint != second.fingerprint
    write(tmp_path / "sums.csv", "problem,result,answer\n1+1,2,no\n")
    lookup = make_lookup(custom_dataset_info=[file])
    for value in ("my-sums", str(tmp_path / "sums.csv"), "my-sums#3"):
        table = Table(find_source(value, lookup=lookup), identity=Identity())
        assert table.read(0) == {"problem": "1+1", "response": "2", "answer": "no"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Sums.csv").write_text("problem,result\n1+1,2\n")  # a copy of me/sums by its name
    copy = Table(find_source(str(tmp_path / "other" / "Sums.csv"), lookup=lookup), identity=Identity())
    assert copy.read(0) == {"query": "1+1", "response": "2"}


def test_columns_of_one_name():
    rename = Rename((("A", "query"), ("b", "-")))
    assert rename({"a": 1, "B": 2, "c": 3}, Identity()) == {"query": 1, "-": 2, "c": 3}
    assert rename({"a": 1, "Query": 2}, Identity()) == {"a": 1, "Query": 2}  # the exact name wins


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "must hold a list"),
        ("[5]", "entry 1 is not an object"),
        ('[{"tags": []}]', "no data set is named"),
        ('[{"ms_dataset_id": "a/b", "colums": {}}]', "unknown key colums"),
        ('[{"ms_dataset_id": "a/b", "messages": {}}]', "unknown key messages"),
        ('[{"ms_dataset_id": 5}]', "ms_dataset_id must be text"),
        ('[{"ms_dataset_id": "a/b", "columns": {"a": 1}}]', "columns must be an object of texts"),
        ('[{"ms_dataset_id": "a/b", "subsets": [{"naem": "x"}]}]', "unknown key naem"),
        ('[{"ms_dataset_id": "a/b", "split": 5}]', "split must be a list"),
    ],
)
def test_a_description_that_cannot_be_used(tmp_path, text, why):
    with pytest.raises(UsageError, match=why):
        read_dataset_info(write(tmp_path / "info.json", text))
    with pytest.raises(UsageError, match="cannot be read"):
        read_dataset_info(str(tmp_path / "gone.json"))


def test_the_users_own_come_first(tmp_path):
    file = write(tmp_path / "info.json", '[{"dataset_path": "x.txt", "dataset_name": "swift/self-cognition"}]')
    write(tmp_path / "x.txt", "mine\n")
    table = Table(
        find_source("swift/self-cognition", lookup=make_lookup(custom_dataset_info=[file])), identity=Identity()
    )
    assert table.read(0) == {"text": "mine"}
    assert not table.source.needs_identity
