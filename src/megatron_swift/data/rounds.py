"""A conversation as rounds: what is asked (by the user or by a tool's response) and what the assistant replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_swift.data.agent import AgentTemplate, parse_call
from megatron_swift.data.types import Conversation, Message
from megatron_swift.utils.errors import DataError

ROLES = ("system", "user", "assistant", "tool_call", "tool_response")


class Part(NamedTuple):
    """A stretch of a reply, from one message (or from several calls in a row, which say the same about their loss)."""

    text: str
    train: bool | None
    loss_scale: float | None


@dataclass(slots=True)
class Round:
    """query: the user's text; "" where there is none, and where `responses` of tools stand in its place.

    reply : its parts in order, none for the round that waits for its reply.
    """

    query: str
    responses: list[str] = field(default_factory=list)
    reply: list[Part] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The reply as one text."""
        reply = self.reply
        return reply[0].text if len(reply) == 1 else "".join([part.text for part in reply])

    @property
    def fixed(self) -> bool:
        """Whether the data itself says that some of the reply is trained."""
        return any(part.train or (part.loss_scale and part.train is None) for part in self.reply)


class Rounds(NamedTuple):
    """A conversation understood.

    system : the row's own system prompt, None where it has none.
    rounds : at least one; all but the last have a reply.
    newest : the number of the round with the user's last question; later ones are answers to tools.
    """

    system: str | None
    rounds: list[Round]
    newest: int


def split_off_tools(conversation: Sequence[Message] | Conversation) -> tuple[Sequence[Message], tuple[str, ...]]:
    """(messages, tools) of either form of a conversation."""
    if isinstance(conversation, Conversation):
        return conversation.messages, conversation.tools
    return conversation, ()


def to_rounds(messages: Sequence[Message], agent: AgentTemplate) -> Rounds:
    """The conversation's rounds; DataError, by the number of the message, for one that makes no sense.

    A reply without a question gets an empty one; consecutive replies and calls are one reply.
    """
    system: str | None = None
    rounds: list[Round] = []
    calls: list[tuple[int, Message]] = []
    for number, message in enumerate(messages, 1):
        role = message.role
        if calls and role != "tool_call":
            _add_calls(rounds[-1], calls, agent)
            calls = []
        if role == "assistant":
            if not rounds:
                rounds.append(Round(""))
            rounds[-1].reply.append(Part(message.content, message.train, message.loss_scale))
        elif role == "user":
            if rounds and not rounds[-1].reply:
                raise DataError(
                    f"message {number} is a second question in a row", do="join it with the one before or add a reply"
                )
            rounds.append(Round(message.content))
        elif role == "system":
            if number > 1:
                why = "there is one already" if system is not None else ""
                raise DataError(f"message {number} is a system message, which only the first may be", why=why)
            system = message.content
        elif role == "tool_call":
            if not rounds:
                raise DataError(f"message {number} is a tool_call that answers no question")
            calls.append((number, message))
        elif role == "tool_response":
            _add_response(rounds, message.content, number)
        else:
            raise DataError(f"message {number} has the unknown role '{role}'", do=f"roles: {', '.join(ROLES)}")
    if calls:
        _add_calls(rounds[-1], calls, agent)
    if not rounds:
        raise DataError("the conversation has no message" if system is None else "there is only a system message")
    _check_replies(rounds)
    newest = len(rounds) - 1
    while newest and rounds[newest].responses:
        newest -= 1
    return Rounds(system, rounds, newest)


def _check_replies(rounds: Sequence[Round]) -> None:
    for number, one in enumerate(rounds, 1):
        if one.reply and not one.text:
            raise DataError(f"the reply of round {number} is empty", do="remove the round or the row")


def _add_calls(current: Round, calls: list[tuple[int, Message]], agent: AgentTemplate) -> None:
    first = calls[0][1]
    for number, message in calls:
        if (message.train, message.loss_scale) != (first.train, first.loss_scale):
            raise DataError(f"message {number} is a tool_call whose loss differs from that of the one before it")
    text = agent.calls([parse_call(message.content, number=number) for number, message in calls], current.text)
    current.reply.append(Part(text, first.train, first.loss_scale))


def _add_response(rounds: list[Round], content: str, number: int) -> None:
    """A response opens a round of its own; several in a row share one."""
    if rounds and rounds[-1].responses and not rounds[-1].reply:
        rounds[-1].responses.append(content)
    elif rounds and rounds[-1].reply:
        rounds.append(Round("", [content]))
    else:
        raise DataError(f"message {number} is a tool_response that follows no call", do="remove it or add the call")
