from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data.messages import RowError, to_messages
from megatron_swift.data.types import Message

QA = [Message("user", "q"), Message("assistant", "r")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "id": 3},
        {"Conversation": [{"human": "q", "assistant": "r"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "bot", "content": "r"}]'},
        {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'r', 'loss': None}]"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "gpt", "content": "r"}]},
        {"instruction": "q", "input": "", "output": "r"},
        {"instruction": "", "input": "q", "output": "r"},
        {"instruction": "q", "input": None, "output": "r", "text": "the whole prompt"},
        {"query": "q", "response": "r"},
        {"Question": "q", "ANSWER": "r", "source": 5},
        {"prompt": "q", "completion": "r"},
        {"query": "q", "response": ["r"]},
        {"query": "q", "response": "r", "answer": "not this"},
        {"query": "q", "response": "r", "system": "", "history": [], "images": [], "tools": None},
    ],
)
def test_forms(row):
    assert to_messages(row) == QA


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "a", "input": "b", "output": "r", "system": "s"}
    assert to_messages(row) == [Message("system", "s"), Message("user", "a\nb"), Message("assistant", "r")]


@pytest.mark.parametrize("history", [[["a", "b"]], '[["a", "b"]]', "[('a', 'b')]"])
def test_history(history):
    row = {"query": "q", "response": "r", "history": history, "system_prompt": "s"}
    assert to_messages(row) == [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), *QA]


def test_text_to_pretrain_on():
    assert to_messages({"text": "t", "meta": {}}) == [Message("assistant", "t")]
    assert to_messages({"messages": [{"role": "assistant", "content": "t"}]}) == [Message("assistant", "t")]
    assert to_messages({"query": "", "response": "t"}) == [Message("user", ""), Message("assistant", "t")]


def test_system_column_gives_way_to_a_system_message():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert to_messages({"messages": turns, "system": "s"}) == [Message("system", "s"), *QA]
    own = [{"role": "system", "content": ""}, *turns]
    assert to_messages({"messages": own, "system": "s"}) == [Message("system", ""), *QA]


def test_roles_and_loss():
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "function_call", "content": "{}"},
            {"role": "observation", "content": "1"},
            {"role": "Assistant", "content": "r", "loss": False, "extra": 1},
        ]
    }
    assert [(message.role, message.train) for message in to_messages(row)] == [
        ("user", None),
        ("tool_call", None),
        ("tool_response", None),
        ("assistant", False),
    ]


def test_user_columns():
    row = {"Q1": "q", "text": "r", "response": "old"}
    columns = (("q1", "query"), ("response", "unused"))
    assert to_messages(row, columns=columns) == QA
    with pytest.raises(RowError, match="Q1, Query, query all mean"):
        to_messages({"Q1": "q", "Query": "exact", "query": "x", "response": "r"}, columns=columns)
    exact = to_messages({"Q1": "not this", "query": "q", "response": "r"}, columns=(("Q1", "query"),))
    assert exact == QA


def test_choice_among_responses_depends_on_the_row_alone():
    row = {"query": "q", "response": [f"r{number}" for number in range(50)]}
    assert to_messages(row) == to_messages(row)
    chosen = {to_messages({"query": "q", "response": [f"{n}a", f"{n}b"]})[1].content[-1] for n in range(20)}
    assert chosen == {"a", "b"}


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({}, "no column to learn from"),
        ({"query": "q"}, "no column to learn from"),
        ({"prompt": "a", "question": "b", "response": "r"}, "two columns have one meaning"),
        ({"query": "q", "answer": "a", "solution": "b"}, "two columns have one meaning"),
        ({"query": 5, "response": "r"}, "content is not text"),
        ({"query": "q", "response": None}, "content is not text"),
        ({"query": "q", "response": {"a": 1}}, "content is not text"),
        ({"query": "q", "response": []}, "empty response"),
        ({"query": "q", "response": ""}, "empty response"),
        ({"query": "q", "response": " \n"}, "empty response"),
        ({"query": "q", "response": "r", "history": [["a"]]}, "malformed history"),
        ({"query": "q", "response": "r", "history": "[["}, "malformed column"),
        ({"query": "q", "response": "r", "images": ["a.png"]}, "column 'images' is not supported"),
        ({"query": "q", "response": "r", "tools": ["{}"]}, "column 'tools' is not supported"),
        ({"query": "q", "response": "r", "system": 3}, "content is not text"),
        ({"query": "q\x00", "response": "r"}, "NUL character"),
        ({"query": "q", "response": "\ud800"}, "lone surrogate"),
        ({"messages": "[{'role': 'assistant', 'content': '\\ud800'}]"}, "lone surrogate"),
        ({"messages": "[{1: 2}]"}, "malformed message"),
        ({"messages": []}, "no messages"),
        ({"messages": None}, "malformed column"),
        ({"messages": "hello"}, "malformed column"),
        ({"messages": "[" * 100_000}, "malformed column"),
        ({"messages": ["hello"]}, "malformed message"),
        ({"messages": [{"content": "x"}]}, "malformed message"),
        ({"messages": [{"role": "user", "content": None}]}, "content is not text"),
        ({"messages": [{"role": "user"}]}, "content is not text"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "assistant", "content": "x", "loss": 0.5}]}, "malformed message"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls is not supported"),
        (turns("user", "system", "assistant"), "system message is not the first"),
        (turns("user", "user", "assistant"), "two user turns in a row"),
        (turns("user"), "no assistant turn"),
        (turns("system"), "no assistant turn"),
        (turns("user", "assistant", "user"), "the last turn is a question"),
    ],
)
def test_unusable_row(row, kind):
    with pytest.raises(RowError) as caught:
        to_messages(row)
    assert caught.value.kind == kind


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "loss", "human", "assistant", "type"]), inner
        )
    ),
    max_leaves=12,
)
COLUMNS = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "Query",
    "response",
    "text",
    "history",
    "system",
]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), JSON))
def test_any_row_gives_messages_or_a_reason(row):
    try:
        messages = to_messages(row)
    except RowError:
        return
    assert messages[-1].role != "user"
    assert all(isinstance(message.content, str) for message in messages)
