"""One row of a data set to a conversation: `to_conversation` and the reasons why a row cannot be used."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_swift.data.types import Conversation, Message


class RowError(Exception):
    """A row that cannot be used.

    kind   : the reason in a few words, the same for all such rows, so that rows can be counted per reason.
    detail : what is special about this row, or "".
    do     : how to mend it.
    """

    def __init__(self, kind: str, detail: str = "", *, do: str = "mend or remove the row") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail, self.do = kind, detail, do

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool_response": "tool_response",
    "tool": "tool_response",
    "function_response": "tool_response",
    "observation": "tool_response",
    "observations": "tool_response",
}
TRAINABLE = ("assistant", "tool_call")
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
QUERY_COLUMNS = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE_COLUMNS = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
SYSTEM_COLUMNS = ("system", "system_prompt")
UNSUPPORTED_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
DEEPEST_TOOL = 64  # levels of nesting in the description of a tool


class _Plan(NamedTuple):
    """Which column of a row plays which part; "" where none does."""

    messages: str = ""
    instruction: str = ""
    query: str = ""
    response: str = ""
    system: str = ""
    history: str = ""
    tools: str = ""
    unsupported: tuple[str, ...] = ()
    error: tuple[str, str] | None = None


def to_conversation(row: Mapping[str, Any], *, columns: tuple[tuple[str, str], ...] = ()) -> Conversation:
    """The row's conversation: at least one reply, a system message only in front, no two user turns in a row.

    columns : (column in the data, name that we know) pairs of the user, matched without regard to case.
    Forms, by column names: messages (or conversations), else instruction + input (Alpaca), else query and response
    with their aliases; a row with a text column only is an assistant turn to pre-train on. A tools column goes with each
    form. RowError says why a row is unusable.
    """
    plan = _plan(tuple(row), columns)
    if plan.error:
        raise RowError(*plan.error)
    for name in plan.unsupported:
        if row[name]:
            raise RowError(f"column {name!r} is not supported", "this product trains on text", do="remove such rows")
    if plan.messages:
        messages = _from_messages(row[plan.messages], plan.messages)
    else:
        messages = _from_query(row, plan)
    system = _text(row[plan.system], plan.system) if plan.system and row[plan.system] is not None else ""
    if system and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    _check(messages)
    return Conversation(messages, _tools(row[plan.tools], plan.tools) if plan.tools else ())


def to_messages(row: Mapping[str, Any], *, columns: tuple[tuple[str, str], ...] = ()) -> list[Message]:
    """The messages of `to_conversation`, for who has no use for tools: a row with tools is a RowError, too."""
    conversation = to_conversation(row, columns=columns)
    if conversation.tools:
        raise RowError("column 'tools' is not supported", "tools have no place here")
    return list(conversation.messages)


@lru_cache(maxsize=1024)
def _plan(names: tuple[str, ...], columns: tuple[tuple[str, str], ...]) -> _Plan:
    """The parts that columns of these names play. Cached: the rows of a file share their names."""
    renamed = {source.lower(): target.lower() for source, target in columns}
    targets: dict[str, list[str]] = {}
    for name in names:
        targets.setdefault(renamed.get(name.lower(), name.lower()), []).append(name)
    for target, sources in targets.items():
        if len(sources) > 1:
            exact = [name for name in sources if name.lower() == target and name.lower() not in renamed]
            sources[:] = exact if len(exact) == 1 else sources
            if len(sources) > 1:
                return _Plan(error=("two columns have one meaning", f"{', '.join(sources)} all mean {target!r}"))
    known = {target: sources[0] for target, sources in targets.items()}
    unsupported = tuple(known[name] for name in UNSUPPORTED_COLUMNS if name in known)
    try:
        system = _pick(known, SYSTEM_COLUMNS)
        messages = _pick(known, MESSAGES_COLUMNS)
        if messages:
            return _Plan(messages=messages, system=system, tools=known.get("tools", ""), unsupported=unsupported)
        alpaca = "instruction" in known and "input" in known
        query = known["input"] if alpaca else _pick(known, QUERY_COLUMNS)
        # vicgalle/alpaca-gpt4 has both output and text (the whole prompt): in Alpaca's form, output is the response.
        response = known["output"] if alpaca and "output" in known else _pick(known, RESPONSE_COLUMNS)
    except RowError as error:
        return _Plan(error=(error.kind, error.detail))
    if not response:
        return _Plan(error=("no column to learn from", f"the row has {', '.join(names) or 'no columns'}"))
    return _Plan(
        instruction=known["instruction"] if alpaca else "",
        query=query,
        response=response,
        system=system,
        history=known.get("history", ""),
        tools=known.get("tools", ""),
        unsupported=unsupported,
    )


def _pick(known: Mapping[str, str], aliases: tuple[str, ...]) -> str:
    """The column for a part whose own name is aliases[0] and wins; two aliases side by side are an error."""
    found = [name for name in aliases if name in known]
    if len(found) > 1 and found[0] != aliases[0]:
        raise RowError("two columns have one meaning", f"{', '.join(found)} all mean {aliases[0]!r}: use --columns")
    return known[found[0]] if found else ""


def _from_query(row: Mapping[str, Any], plan: _Plan) -> list[Message]:
    query = _text(row[plan.query] or "", plan.query) if plan.query else ""
    if plan.instruction:
        instruction = _text(row[plan.instruction] or "", plan.instruction)
        query = f"{instruction}\n{query}" if instruction and query else instruction or query
    messages: list[Message] = []
    for pair in _list(row[plan.history] or [], plan.history) if plan.history else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("malformed history", "it must be a list of [query, response] pairs")
        messages += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    response = row[plan.response]
    if isinstance(response, list):
        response = _choose(response, plan.response)
    reply = Message("assistant", _text(response, plan.response))
    if query or plan.query or messages:
        messages.append(Message("user", query))
    return [*messages, reply]


def _choose(values: list, name: str) -> Any:
    """One of several responses, by a hash of them: the choice depends on the row alone and survives a restart."""
    if not values:
        raise RowError("empty response", f"{name!r} is an empty list")
    if not all(isinstance(value, str) for value in values):
        raise RowError("content is not text", f"{name} is a list of other things than texts")
    digest = hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return values[int.from_bytes(digest, "little") % len(values)]


def _from_messages(value: Any, name: str) -> list[Message]:
    messages: list[Message] = []
    for number, item in enumerate(_list(value, name)):
        if not isinstance(item, dict):
            raise RowError("malformed message", f"message {number} is {_kind(item)}, not an object")
        role = item.get("role")
        role = item.get("from") if role is None else role  # a Parquet row has every key, some of them null
        if role is None:
            messages += _pair(item, number)
            continue
        if not isinstance(role, str) or role.lower() not in ROLES:
            shown = role if isinstance(role, str) else _kind(role)
            raise RowError("unknown role", f"{shown!r} in message {number}", do=f"roles: {', '.join(ROLES)}")
        if item.get("tool_calls"):
            raise RowError("tool_calls is not supported", do="write a message of role tool_call instead")
        role = ROLES[role.lower()]
        content = item.get("content")
        text = _text(item.get("value") if content is None else content, f"message {number}")
        train, scale = item.get("loss"), item.get("loss_scale")
        if train is None and scale is None:
            messages.append(Message(role, text))
        else:
            messages.append(Message(role, text, *_weight(train, scale, role, number)))
    return messages


def _weight(train: Any, scale: Any, role: str, number: int) -> tuple[bool | None, float | None]:
    """`loss` and `loss_scale` of a message, checked."""
    if train is not None and not isinstance(train, bool):
        raise RowError("malformed message", f"loss of message {number} must be true or false")
    if scale is not None:
        numeric = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not numeric or not 0 <= scale < math.inf:
            raise RowError("malformed message", f"loss_scale of message {number} must be a number, at least 0")
        scale = float(scale)
    if role not in TRAINABLE and (train or scale):
        raise RowError("malformed message", f"loss of message {number}, of role {role}: only replies are trained so")
    if scale is not None and train is not None and train != (scale > 0):
        raise RowError("malformed message", f"loss and loss_scale of message {number} contradict each other")
    return train, scale


def _pair(item: dict, number: int) -> list[Message]:
    """{"human": ..., "assistant": ...} as two turns."""
    sides = {ROLES.get(str(key).lower()): key for key in item}
    if "user" not in sides or "assistant" not in sides:
        raise RowError("malformed message", f"message {number} has no role")
    return [Message(role, _text(item[sides[role]], f"message {number}")) for role in ("user", "assistant")]


def _tools(value: Any, name: str) -> tuple[str, ...]:
    """The tools as JSON texts; each may be given as an object or as JSON text, and the list as JSON text, too."""
    if not value:
        return ()
    tools = []
    for number, tool in enumerate(_list(value, name)):
        what = f"tool {number}"
        if isinstance(tool, str):
            text = _text(tool, what)
            try:
                tool = json.loads(text)
            except (ValueError, RecursionError):
                raise RowError("malformed tools", f"{what} is text that is no JSON") from None
        else:
            text = ""
        if not isinstance(tool, dict):
            raise RowError("malformed tools", f"{what} is {_kind(tool)}, not an object")
        if _depth(tool) > DEEPEST_TOOL:
            raise RowError("malformed tools", f"{what} is nested deeper than {DEEPEST_TOOL} levels")
        try:
            text = text or json.dumps(tool, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RowError("malformed tools", f"{what}: {error}") from None
        tools.append(_text(text, what))
    return tuple(tools)


def _depth(value: Any) -> int:
    """Levels of nesting of lists and objects, counted as far as DEEPEST_TOOL + 1."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST_TOOL:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        depth += 1
    return depth


def _list(value: Any, name: str) -> list:
    """`value` as a list; a string is read as JSON or as a Python literal."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise RowError("malformed column", f"{name!r} is text that is no list") from None
    if not isinstance(value, (list, tuple)):
        raise RowError("malformed column", f"{name!r} is {_kind(value)}, not a list")
    return list(value)


def _text(value: Any, name: str) -> str:
    """`value` as text that every tokenizer takes."""
    if isinstance(value, str):
        if "\x00" in value:
            raise RowError("NUL character", name)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("lone surrogate", f"{name} has half of a UTF-16 pair") from None
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        return "".join(_text(part.get("text"), name) for part in value)
    raise RowError("content is not text", f"{name} is {_kind(value)}")


def _kind(value: Any) -> str:
    """A JSON value's kind in the user's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _check(messages: list[Message]) -> None:
    previous = ""
    learnable = False
    if not messages:
        raise RowError("no messages")
    for number, message in enumerate(messages):
        if message.role == "system" and number:
            raise RowError("system message is not the first", f"message {number}")
        if message.role == "user" and previous == "user":
            raise RowError("two user turns in a row", f"message {number}")
        if message.role in TRAINABLE:
            learnable = True
            if not message.content.strip():
                raise RowError("empty response", f"message {number}")
        previous = message.role
    if not learnable:
        raise RowError("no assistant turn")
    if previous == "user":
        raise RowError("the last turn is a question", "there is no reply to train on")
