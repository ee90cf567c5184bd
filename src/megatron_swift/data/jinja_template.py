"""A model's own Jinja chat template as the template to train and generate with (--template_backend jinja).

What is trained is found by rendering, never by searching: the conversation up to a reply with the opening of the reply
(as for generation), the conversation with the reply, and the whole conversation. Each must be the beginning of the next;
between the first two stands the reply with its end marker. A template that rewrites what came earlier is refused.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_swift.data.agent import parse_call, parse_tools
from megatron_swift.data.loss_scale import LossScale, weigh
from megatron_swift.data.render import Piece, Pieces
from megatron_swift.data.rounds import ROLES, split_off_tools
from megatron_swift.data.sandbox import english_date, render
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Conversation, Message
from megatron_swift.utils.errors import DataError, UsageError

_OTHER_BACKEND = "use --template_backend swift, which has templates of its own"


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """A Template whose texts come from `source`; those of the fields above are not used, except `response_prefix`.

    values : what the template is told besides messages and tools, such as bos_token.
    day    : the day that it may ask for, None where it does not.
    """

    source: str = ""
    values: tuple[tuple[str, Any], ...] = ()
    day: datetime.date | None = None


def jinja_template(tokenizer: Tokenizer, *, date: datetime.date | None, enable_thinking: bool | None) -> JinjaTemplate:
    """The chat template of the tokenizer's folder; UsageError where it has none.

    date            : what the template is told as date_string; None: nothing, and today where it asks for the day.
    enable_thinking : what the template is told under that name, None: nothing.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            "--template_backend jinja: the model has no chat template of its own",
            why=f"neither chat_template.jinja nor tokenizer_config.json in {tokenizer.folder} has one",
            do=_OTHER_BACKEND,
        )
    values: dict[str, Any] = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    if enable_thinking is not None:
        values["enable_thinking"] = enable_thinking
    if date is not None:
        values["date_string"] = english_date(date)
    asks = "strftime_now" in tokenizer.chat_template  # or the data, which knows the day by it, would be new every day
    return JinjaTemplate(
        name="jinja",
        prefix="",
        system_prefix="{system}",
        prompt="{query}",
        separator="",
        suffix="",
        source=tokenizer.chat_template,
        values=tuple(values.items()),
        day=(date or datetime.date.today()) if asks else None,
    )


class _Turn(NamedTuple):
    """One message for the template; of an assistant's, what the data says about its loss and its number in the row."""

    message: dict[str, Any]
    train: bool | None = None
    loss_scale: float | None = None
    number: int = 0


def jinja_training_pieces(
    template: JinjaTemplate,
    tokenizer: Tokenizer,
    conversation: Sequence[Message] | Conversation,
    *,
    loss_scale: LossScale,
    system: str | None,
) -> list[Piece]:
    """As `render.training_pieces`, with the template's own text."""
    turns, tools = _turns(conversation, system)
    if turns[-1].message["role"] != "assistant":
        raise DataError(
            "the conversation ends with a question and has no reply to train on",
            do="add the assistant's reply or remove the question",
        )
    if _always_opens(template):
        raise DataError(
            "the model's chat template cannot be trained on",
            why="it opens a further reply after every message, whether one is wanted or not",
            do=_OTHER_BACKEND,
        )
    messages = [turn.message for turn in turns]
    newest = max((n for n, one in enumerate(messages) if one["role"] == "user"), default=0)
    whole = _render(template, messages, tools, reply=False)
    weight = 1.0 if loss_scale == "all" else 0.0
    pieces, at = Pieces(tokenizer), 0
    for number, turn in enumerate(turns):
        if turn.message["role"] != "assistant":
            continue
        trained = loss_scale != "last_round" or number > newest
        if turn.train is not None or turn.loss_scale is not None:
            own = 0.0 if turn.train is False else turn.loss_scale
        else:
            own = None if trained else 0.0
        if own == weight or (own is None and loss_scale == "all"):
            continue  # it weighs what stands around it
        begin, end = _span(template, messages, tools, number, whole, turn)
        pieces.text(whole[at:begin], weight)
        parts = weigh(whole[begin:end], loss_scale) if own is None else [(whole[begin:end], own)]
        for text, part in parts:
            pieces.text(text, part)
        at = end
    pieces.text(whole[at:], weight)
    return pieces.items


def jinja_prompt_pieces(
    template: JinjaTemplate,
    tokenizer: Tokenizer,
    conversation: Sequence[Message] | Conversation,
    *,
    system: str | None,
    response_prefix: str | None,
) -> list[Piece]:
    """As `render.prompt_pieces`, with the template's own text, tokenised as one."""
    turns, tools = _turns(conversation, system)
    if turns[-1].message["role"] == "assistant":
        raise DataError("the conversation ends with a reply", do="end it with the question that is to be answered")
    pieces = Pieces(tokenizer)
    pieces.text(_render(template, [turn.message for turn in turns], tools, reply=True), 0.0)
    pieces.text(template.response_prefix if response_prefix is None else response_prefix, 0.0)
    return pieces.items


def _span(
    template: JinjaTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    number: int,
    whole: str,
    turn: _Turn,
) -> tuple[int, int]:
    """Where in the whole text message `number`, a reply, begins and ends.

    Where the template, told not to think, opens the reply with an empty thinking part, and the reply has it, the reply
    begins after it.
    """
    opening = _render(template, messages[:number], tools, reply=True)
    closing = _render(template, messages[: number + 1], tools, reply=False)
    what = f"message {turn.number}: the model's chat template cannot be trained on"
    if "enable_thinking" in template.source and "enable_thinking" not in dict(template.values):
        unthinking = replace(template, values=(*template.values, ("enable_thinking", False)))
        longer = _render(unthinking, messages[:number], tools, reply=True)
        opening = longer if longer.startswith(opening) and closing.startswith(longer) else opening
    if not closing.startswith(opening):
        raise DataError(
            what,
            why="what it writes to open a reply is not how it writes the reply: "
            + _difference(opening, closing, "opened", "written"),
            do=f"{_OTHER_BACKEND}, or give --enable_thinking as the rows have it",
        )
    if not whole.startswith(closing):
        raise DataError(
            what,
            why="it writes a reply differently once more messages follow: "
            + _difference(closing, whole, "alone", "then"),
            do=f"use --loss_scale last_round, or {_OTHER_BACKEND.removeprefix('use ')}",
        )
    return len(opening), len(closing)


@lru_cache(maxsize=16)
def _always_opens(template: JinjaTemplate) -> bool:
    """Whether a text that ends with a reply ends, by this template, with the opening of a further one."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    alone = _render(template, probe, [], reply=False)
    if alone != _render(template, probe, [], reply=True):
        return False
    return not _render(template, [*probe, probe[0]], [], reply=False).startswith(alone)


def _difference(first: str, second: str, first_name: str, second_name: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return (
        f"{first_name} ...{first[max(at - 10, 0) : at + 30]!r}, {second_name} ...{second[max(at - 10, 0) : at + 30]!r}"
    )


def _render(
    template: JinjaTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, reply: bool
) -> str:
    values = dict(template.values)
    values |= {"messages": messages, "tools": tools or None, "add_generation_prompt": reply}
    try:
        return render(template.source, values, day=template.day)
    except Exception as error:  # whatever the template stumbles on: it is the model's, and the row's
        name = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        raise DataError(
            "the model's chat template cannot write the conversation", why=f"{name}{error}", do=_OTHER_BACKEND
        ) from error


def _turns(
    conversation: Sequence[Message] | Conversation, system: str | None
) -> tuple[list[_Turn], list[dict[str, Any]]]:
    """The messages in the form that chat templates expect, at least one besides a system prompt, and the tools."""
    rows, tools = split_off_tools(conversation)
    turns: list[_Turn] = []
    for number, message in enumerate(rows, 1):
        role, previous = message.role, turns[-1].message["role"] if turns else ""
        if role not in ROLES:
            raise DataError(f"message {number} has the unknown role '{role}'", do=f"roles: {', '.join(ROLES)}")
        if role == "system":
            if number > 1:
                raise DataError(f"message {number} is a system message, which only the first may be")
            turns.append(_Turn({"role": role, "content": message.content}))
        elif role == "user":
            if previous == "user":
                raise DataError(f"message {number} is a second question in a row", do="join it with the one before")
            turns.append(_Turn({"role": role, "content": message.content}))
        elif role == "tool_response":
            if previous not in ("assistant", "tool"):
                raise DataError(f"message {number} is a tool_response that follows no call")
            turns.append(_Turn({"role": "tool", "content": message.content}))
        else:
            _add_reply(turns, message, number)
    if turns and turns[0].message["role"] == "system":
        if not turns[0].message["content"]:
            turns.pop(0)
    elif system:
        turns.insert(0, _Turn({"role": "system", "content": system}))
    if not turns or turns[-1].message["role"] == "system":
        raise DataError("the conversation has no message")
    return turns, list(parse_tools(tools))


def _add_reply(turns: list[_Turn], message: Message, number: int) -> None:
    """Add an assistant's text or call to the reply that is there, or begin one; a question comes before it."""
    if not turns or turns[-1].message["role"] == "system":
        turns.append(_Turn({"role": "user", "content": ""}))
    if turns[-1].message["role"] != "assistant":
        turns.append(_Turn({"role": "assistant", "content": ""}, message.train, message.loss_scale, number))
    turn = turns[-1]
    if (turn.train, turn.loss_scale) != (message.train, message.loss_scale):
        raise DataError(
            f"message {number} belongs to the same reply as message {turn.number}, and their loss differs",
            do=_OTHER_BACKEND,
        )
    if message.role == "assistant":
        turn.message["content"] += message.content
        return
    call = parse_call(message.content, number=number)
    function = {"name": call.name, "arguments": json.loads(json.dumps(call.arguments))}
    turn.message.setdefault("tool_calls", []).append({"type": "function", "function": function})
