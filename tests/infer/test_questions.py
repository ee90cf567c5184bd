"""Rows to questions with their labels, in order, strictly or not."""

from __future__ import annotations

import json

import pytest

from megatron_swift.data.registry import Identity
from megatron_swift.infer.questions import QuestionOptions, read_questions
from megatron_swift.utils.errors import DataError


def read(path, rows, **options):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    options = {"datasets": (str(path),), "columns": {}, "identity": Identity()} | options
    return read_questions(QuestionOptions(**options))


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "roles", "labels"),
    [
        ({"query": "q", "response": "a"}, "user", "a"),
        ({"query": "q"}, "user", None),
        ({"query": "q", "response": ""}, "user", None),
        ({"instruction": "i", "input": "q", "output": "a", "system": "s"}, "system user", "a"),
        ({"messages": [U, A, U, A]}, "user assistant user", "a"),
        ({"messages": [U, A, U]}, "user assistant user", None),
        ({"messages": [U]}, "user", None),
        ({"messages": [U, A, A]}, "user", "aa"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "user", None),
    ],
)
def test_rows(tmp_path, row, roles, labels):
    (question,) = read(tmp_path / "d.jsonl", [row])
    assert " ".join(message.role for message in question.messages) == roles
    assert question.labels == labels
    assert question.messages[-1].content[-1] == "q"


@pytest.mark.parametrize("row", ["{broken\n", {"text": "only text"}, {"messages": []}, {"messages": [U, U]}])
def test_bad_rows(tmp_path, row, caplog):
    rows = [{"query": "1"}, row, {"query": "2"}]
    with pytest.raises(DataError, match=r"d\.jsonl:2: "):
        read(tmp_path / "d.jsonl", rows)
    assert [q.messages[0].content for q in read(tmp_path / "d.jsonl", rows, strict=False)] == ["1", "2"]
    assert "1 rows are left out" in caplog.text
    with pytest.raises(DataError, match="no row is left"):
        read(tmp_path / "d.jsonl", [row], strict=False)


def test_order_and_number(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"q": str(number), "a": "x"} for number in range(10)]
    columns = {"q": "query", "a": "response"}

    def contents(**options):
        return "".join(q.messages[0].content for q in read(path, rows, columns=columns, **options))

    assert contents() == "0123456789"
    assert contents(limit=3) == "012"
    assert contents(datasets=(f"{path}#4", f"{path}#12")) == "0123" + "0123456789" + "01"
    shuffled = contents(shuffle=True)
    assert shuffled == contents(shuffle=True) != contents(shuffle=True, data_seed=1)
    assert sorted(shuffled) == list("0123456789") != list(shuffled)
