"""Files of rows: each kind of file, its rows, their places, and what is said of files and rows that are damaged."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_swift.data.messages import RowError
from megatron_swift.data.readers import PARQUET_BLOCK, RowFile, open_file
from megatron_swift.utils.errors import DataError

SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]


def open_table(path: Path) -> RowFile:
    return open_file(Path(path))


def read_all(table: RowFile) -> list[dict]:
    return [table.read(index) for index in range(len(table))]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


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


def test_a_row_of_ten_megabytes(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"a": 1}, {"a": "é" * 5_000_000}, {"a": 2}])
    table = open_table(path)
    assert [len(str(row["a"])) for row in read_all(table)] == [1, 5_000_000, 1]


def test_names_with_spaces_and_other_scripts(tmp_path):
    folder = tmp_path / "мои данные"
    folder.mkdir()
    path = write_lines(folder / "数据 1.jsonl", [{"a": 1}])
    assert open_table(path).where(0) == f"{path}:1"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name):
    path = tmp_path / name
    text = {"d.json": '[{"a": 1}, {"a": 2}]', "d.csv": "a\n1\n2\n"}.get(name, '{"a": 1}\n{"a": 2}\n')
    path.write_text(text)
    table = open_table(path)
    table.read(0)
    with path.open("a") as file:
        file.write("\n")
    for rows in (table, pickle.loads(pickle.dumps(table))):
        with pytest.raises(DataError, match="has changed while it was read"):
            rows.read(1)


def test_a_file_that_is_replaced_is_still_the_old_one(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"a": 1}, {"a": 2}])
    table = open_table(path)
    table.read(0)
    os.replace(write_lines(tmp_path / "new.jsonl", [{"a": 3}]), path)
    assert table.read(1) == {"a": 2}  # an open file outlives its name
    with pytest.raises(DataError, match="has changed"):
        pickle.loads(pickle.dumps(table)).read(1)


def test_a_file_that_is_gone_or_a_placeholder(tmp_path):
    table = open_table(write_lines(tmp_path / "d.jsonl", [{"a": 1}]))
    (tmp_path / "d.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        table.read(0)
    with pytest.raises(DataError, match="cannot be read"):
        open_table(tmp_path / "d.jsonl")
    (tmp_path / "d.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(DataError, match="Git LFS"):
        open_table(tmp_path / "d.json")


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_is_one_row_per_line(tmp_path):
    path = tmp_path / "d.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  two \n{3}\n \nf\xc3\xbcnf")
    table = open_table(path)
    assert [row["text"] for row in read_all(table)] == ["one", "  two ", "{3}", "fünf"]
    assert [table.where(index).rsplit(":", 1)[1] for index in range(4)] == ["1", "3", "4", "6"]


@pytest.mark.parametrize(("raw", "kind"), [(b"a\xff", "not UTF-8"), (b"a\x00b", "NUL character")])
def test_text_that_is_none(tmp_path, raw, kind):
    (tmp_path / "d.txt").write_bytes(b"good\n" + raw)
    table = open_table(tmp_path / "d.txt")
    with pytest.raises(RowError) as caught:
        table.read(1)
    assert caught.value.kind == kind


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"query",response, tag\r\n'
        b"plain,text,\r\n"
        b'"a, ""b"" c","line one\r\nline two\n\nline four",x\r\n'
        b"\n"
        b'a 5" pipe,"",NA\n'
        b'"last",1,"2"'
    )
    table = open_table(path)
    assert [tuple(row.values()) for row in read_all(table)] == [
        ("plain", "text", ""),
        ('a, "b" c', "line one\r\nline two\n\nline four", "x"),
        ('a 5" pipe', "", "NA"),
        ("last", "1", "2"),
    ]
    assert list(table.read(0)) == ["query", "response", "tag"]
    assert [table.where(index) for index in range(4)] == [f"{path}:{line}" for line in (2, 3, 8, 9)]
    assert read_all(pickle.loads(pickle.dumps(table))) == read_all(table)


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"a,b\n", b"a,b", b'"a","b"\n\n'])
def test_csv_without_rows(tmp_path, raw):
    (tmp_path / "d.csv").write_bytes(raw)
    assert len(open_table(tmp_path / "d.csv")) == 0


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"1", "wrong number of columns: 1, but the header has 2"),
        (b"1,2,3", "wrong number of columns: 3"),
        (b'"1"x,2', "bad CSV: text follows the closing quote of column 1"),
        (b"1,\xff", "not UTF-8"),
        (b"1,\x00", "NUL character"),
    ],
)
def test_malformed_csv_row(tmp_path, raw, kind):
    (tmp_path / "d.csv").write_bytes(b"a,b\n1,2\n" + raw + b"\n3,4\n")
    table = open_table(tmp_path / "d.csv")
    with pytest.raises(RowError, match=kind):
        table.read(1)
    assert table.read(2) == {"a": "3", "b": "4"}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'a,b\n1,2\n3,"4\n5,6\n', r"d\.csv:3: a quoted field is never closed"),
        (b"a,a\n1,2\n", r"d\.csv:1: two columns have one name"),
        (b"\xff,a\n1,2\n", r"d\.csv:1: not UTF-8"),
    ],
)
def test_csv_file_that_cannot_be_read(tmp_path, raw, why):
    (tmp_path / "d.csv").write_bytes(raw)
    with pytest.raises(DataError, match=why) as caught:
        open_table(tmp_path / "d.csv")
    assert caught.value.do


FIELD = st.text(st.sampled_from('ab",\n é'), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(FIELD, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_csv_as_python_writes_it(tmp_path, rows):
    """Whatever Python's csv module writes is read back as it was, whichever fields it puts into quotes."""
    header = [f"c{number}" for number in range(len(rows[0]))]
    for quoting, end in ((csv.QUOTE_MINIMAL, "\n"), (csv.QUOTE_ALL, "\r\n")):
        path = tmp_path / "d.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=quoting, lineterminator=end).writerows([header, *rows])
        blank = [[" " * count] for count in range(1, 7)] if quoting == csv.QUOTE_MINIMAL else []
        kept = [row for row in rows if row not in blank]
        assert [list(row.values()) for row in read_all(open_table(path))] == kept


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(st.lists(st.sampled_from([b"a", b'"', b",", b"\n", b"\r", b"\xff", b"\x00"]), max_size=40).map(b"".join))
def test_any_csv(tmp_path, raw):
    """Any bytes: rows of the header's width or reasons, and the lines of all rows in order."""
    path = tmp_path / "d.csv"
    path.write_bytes(raw)
    try:
        table = open_table(path)
    except DataError:
        return
    lines = [int(table.where(index).rsplit(":", 1)[1]) for index in range(len(table))]
    assert lines == sorted(set(lines))
    for index in range(len(table)):
        with contextlib.suppress(RowError):
            assert table.read(index)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet_file(tmp_path) -> Path:
    """1000 rows in row groups of 300."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [
        [{"role": "user", "content": f"q{n}"}, {"from": "gpt", "value": f"a{n}", "loss": n % 2 == 0}]
        for n in range(1000)
    ]
    table = arrow.table({"messages": turns, "number": list(range(1000))})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=300)
    return tmp_path / "d.parquet"


def test_parquet(parquet_file):
    table = open_table(parquet_file)
    assert len(table) == 1000
    for index in (0, 1, PARQUET_BLOCK, 299, 300, 999, 5):
        assert table.read(index)["number"] == index
    assert table.read(7)["messages"][0]["content"] == "q7"
    assert table.where(299) == f"{parquet_file}[299]"
    assert pickle.loads(pickle.dumps(table)).read(999)["number"] == 999


def test_damaged_parquet(parquet_file):
    raw = bytearray(parquet_file.read_bytes())
    parquet_file.write_bytes(raw[:-100])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_table(parquet_file)
    raw[4:400] = bytes(396)
    parquet_file.write_bytes(raw)
    with pytest.raises(DataError, match="damaged in row group 0"):
        open_table(parquet_file).read(0)


def test_parquet_that_changes(parquet_file):
    table = open_table(parquet_file)
    table.read(0)
    with parquet_file.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="has changed"):
        table.read(999)


def test_parquet_needs_its_package(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from megatron_swift.data.readers import open_file\n"
        "from megatron_swift.utils.errors import UsageError\n"
        "try: open_file(Path(sys.argv[1]))\n"
        "except UsageError as error: print(error.block())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "d.parquet")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pyarrow is not installed" in shown
    assert "megatron-swift[parquet]" in shown
