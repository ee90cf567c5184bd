"""One row of a data set to a conversation: `to_messages` and the reasons why a row cannot be used."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_swift.data.types import Message


class RowError(Exception):
    """A row that cannot be used.

    kind   : the reason in a few words, the same for all such rows, so that rows can be counted per reason.
    detail : what is special about this row, or "".
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

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
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
QUERY_COLUMNS = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE_COLUMNS = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
SYSTEM_COLUMNS = ("system", "system_prompt")
UNSUPPORTED_COLUMNS = ("images", "image", "videos", "video", "audios", "audio", "tools")


class _Plan(NamedTuple):
    """Which column of a row plays which part; "" where none does."""

    messages: str = ""
    instruction: str = ""
    query: str = ""
    response: str = ""
    system: str = ""
    history: str = ""
    unsupported: tuple[str, ...] = ()
    error: tuple[str, str] | None = None


def to_messages(row: Mapping[str, Any], *, columns: tuple[tuple[str, str], ...] = ()) -> list[Message]:
    """The row's conversation: at least one assistant turn, a system message only in front, no two user turns in a row.

    columns : (column in the data, name that we know) pairs of the user, matched without regard to case.
    Forms, by column names: messages (or conversations), else instruction + input (Alpaca), else query and response
    with their aliases; a row with a text column only is an assistant turn to pre-train on. RowError says why a row is
    unusable.
    """
    plan = _plan(tuple(row), columns)
    if plan.error:
        raise RowError(*plan.error)
    for name in plan.unsupported:
        if row[name]:
            raise RowError(f"column {name!r} is not supported", "this product trains on text without tool schemas")
    if plan.messages:
        messages = _from_messages(row[plan.messages], plan.messages)
    else:
        messages = _from_query(row, plan)
    system = _text(row[plan.system], plan.system) if plan.system and row[plan.system] is not None else ""
    if system and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    _check(messages)
    return messages


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
            return _Plan(messages=messages, system=system, unsupported=unsupported)
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
    digest = hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return values[int.from_bytes(digest, "little") % len(values)]


def _from_messages(value: Any, name: str) -> list[Message]:
    messages: list[Message] = []
    for number, item in enumerate(_list(value, name)):
        if not isinstance(item, dict):
            raise RowError("malformed message", f"message {number} is {_kind(item)}, not an object")
        role = item.get("role", item.get("from"))
        if role is None:
            messages += _pair(item, number)
            continue
        content = item["content"] if "content" in item else item.get("value")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RowError("unknown role", f"{role!r} in message {number}")
        if item.get("tool_calls"):
            raise RowError("tool_calls is not supported", "write a message of role tool_call instead")
        train = item.get("loss")
        if train is not None and not isinstance(train, bool):
            raise RowError("malformed message", f"loss of message {number} must be true or false")
        messages.append(Message(ROLES[role.lower()], _text(content, f"message {number}"), train))
    return messages


def _pair(item: dict, number: int) -> list[Message]:
    """{"human": ..., "assistant": ...} as two turns."""
    sides = {ROLES.get(str(key).lower()): key for key in item}
    if "user" not in sides or "assistant" not in sides:
        raise RowError("malformed message", f"message {number} has no role")
    return [Message(role, _text(item[sides[role]], f"message {number}")) for role in ("user", "assistant")]


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
        if message.role in ("assistant", "tool_call"):
            learnable = True
            if not message.content.strip():
                raise RowError("empty response", f"message {number}")
        previous = message.role
    if not learnable:
        raise RowError("no assistant turn")
    if previous == "user":
        raise RowError("the last turn is a question", "there is no reply to train on")
