from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data.messages import DEEPEST_TOOL, RowError, to_conversation, to_messages
from megatron_swift.data.types import Conversation, Message

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
        {"messages": [{"role": "user", "from": None, "content": "q", "value": None}, {"from": "gpt", "value": "r"}]},
        {"messages": [{"role": None, "from": "human", "content": None, "value": "q"}, {"role": "bot", "content": "r"}]},
        {"messages": [{"human": "q", "gpt": "r", "assistant": "r"}]},
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


TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "größe": [1.5]}}
TOOL_TEXT = json.dumps(TOOL, ensure_ascii=False)


@pytest.mark.parametrize(
    "tools", [[TOOL], [TOOL_TEXT], json.dumps([TOOL]), json.dumps([TOOL_TEXT]), repr([TOOL]), f" [{TOOL_TEXT}]"]
)
@pytest.mark.parametrize("form", [{"query": "q", "response": "r"}, {"messages": [{"human": "q", "assistant": "r"}]}])
def test_tools(tools, form):
    assert to_conversation({**form, "Tools": tools}) == Conversation(QA, (TOOL_TEXT,))


def test_a_tool_that_is_text_stays_as_it_is_written():
    text = '{"b":1,  "a": "\\u00fc"}'
    row = {"query": "q", "response": "r", "tools": [text, text]}
    assert to_conversation(row).tools == (text, text)


@pytest.mark.parametrize("tools", [None, [], "", "[]", {}])
def test_no_tools(tools):
    assert to_conversation({"query": "q", "response": "r", "tools": tools}).tools == ()


def nested(depth: int) -> dict:
    tool: dict = {}
    for _ in range(depth - 1):
        tool = {"a": tool}
    return tool


@pytest.mark.parametrize(
    ("tools", "kind"),
    [
        ([5], "malformed tools"),
        (["no json"], "malformed tools"),
        (["[1]"], "malformed tools"),
        (["[" * 100_000], "malformed tools"),
        ([nested(DEEPEST_TOOL + 1)], "malformed tools"),
        ([nested(500)], "malformed tools"),
        ([{"a": float("nan")}], "malformed tools"),
        ([{"a": b"x"}], "malformed tools"),
        ([{"a": "\ud800"}], "lone surrogate"),
        (['{"a": "\x00"}'], "NUL character"),
        ({"name": "add"}, "malformed column"),
        ("add", "malformed column"),
    ],
)
def test_malformed_tools(tools, kind):
    with pytest.raises(RowError) as caught:
        to_conversation({"query": "q", "response": "r", "tools": tools})
    assert caught.value.kind == kind
    assert to_conversation({"query": "q", "response": "r", "tools": [nested(DEEPEST_TOOL)]}).tools


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"loss": True}, (True, None)),
        ({"loss": False}, (False, None)),
        ({"loss": None, "loss_scale": None}, (None, None)),
        ({"loss_scale": 2}, (None, 2.0)),
        ({"loss_scale": 0}, (None, 0.0)),
        ({"loss": True, "loss_scale": 0.5}, (True, 0.5)),
        ({"loss": False, "loss_scale": 0}, (False, 0.0)),
    ],
)
@pytest.mark.parametrize("role", ["assistant", "tool_call"])
def test_loss_of_a_message(keys, expected, role):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": "r", **keys}]}
    message = to_messages(row)[1]
    assert (message.train, message.loss_scale) == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": 1},
        {"loss": "true"},
        {"loss_scale": True},
        {"loss_scale": "2"},
        {"loss_scale": -1},
        {"loss_scale": float("inf")},
        {"loss_scale": float("nan")},
        {"loss": True, "loss_scale": 0},
        {"loss": False, "loss_scale": 1},
    ],
)
def test_malformed_loss(keys):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", **keys}]}
    with pytest.raises(RowError, match="malformed message: loss"):
        to_messages(row)


@pytest.mark.parametrize("role", ["system", "user", "tool_response"])
def test_only_replies_have_a_loss(role):
    def row(**keys: object) -> dict:
        return {"messages": [{"role": role, "content": "x", **keys}, *turns("assistant")["messages"]]}

    assert to_messages(row(loss=False, loss_scale=0))[0].train is False
    for keys in ({"loss": True}, {"loss_scale": 0.5}):
        with pytest.raises(RowError, match=f"of role {role}: only replies"):
            to_messages(row(**keys))


def test_every_reason_says_what_to_do():
    with pytest.raises(RowError) as caught:
        to_messages(turns("wizard"))
    assert "assistant" in caught.value.do
    with pytest.raises(RowError) as caught:
        to_messages(turns("user"))
    assert caught.value.do


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
        ({"query": "q", "response": ["a", 5]}, "content is not text"),
        ({"query": "q", "response": [[["a"]]]}, "content is not text"),
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
            st.sampled_from(["role", "from", "content", "value", "loss", "loss_scale", "human", "assistant", "type"]),
            inner,
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
    "tools",
]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), JSON))
def test_any_row_gives_messages_or_a_reason(row):
    try:
        conversation = to_conversation(row)
    except RowError:
        return
    assert conversation.messages[-1].role != "user"
    assert all(isinstance(message.content, str) for message in conversation.messages)
    assert all(isinstance(json.loads(tool), dict) for tool in conversation.tools)
