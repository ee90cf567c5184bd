"""Conversations to token ids and labels, and to prompts for inference.

Errors here do not know the row's file and line: they are DataErrors, and the caller adds where the row stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from megatron_swift.data.template import AUTO_BOS, BOS, EOS, QUERY, SYSTEM, Template, is_place, split_places
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Message, Sample
from megatron_swift.utils.errors import DataError

Truncation = Literal["delete", "left", "right", "raise", "split"]
LossScale = Literal["default", "last_round", "all"]

ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tool_call", "tool_response")


class OverLength(DataError):
    """A row longer than max_length under truncation "delete": the caller drops and counts it."""


class _Round(NamedTuple):
    """One question and its reply; the reply is in pieces (text, train) because merged turns may differ in `train`."""

    query: str
    reply: list[tuple[str, bool | None]]


class _Pieces:
    """A conversation as texts and ids, each trained or not; neighbouring texts of one kind become one text.

    One text is tokenised in one piece, so where texts are joined decides the tokens.
    """

    __slots__ = ("_tokenizer", "items")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.items: list[tuple[str | int, bool]] = []
        self._tokenizer = tokenizer

    def text(self, text: str, trained: bool) -> None:
        if not text:
            return
        items = self.items
        if items:
            last, kind = items[-1]
            if kind is trained and isinstance(last, str):
                items[-1] = (last + text, trained)
                return
        items.append((text, trained))

    def template(self, text: str, trained: bool, *, query: str = "", system: str = "") -> None:
        """A template's text with its places filled."""
        for piece in split_places(text):
            if not is_place(piece):
                self.text(piece, trained)
            elif piece == QUERY:
                self.text(query, trained)
            elif piece == SYSTEM:
                self.text(system, trained)
            else:
                self._special(piece, trained)

    def _special(self, place: str, trained: bool) -> None:
        tokenizer = self._tokenizer
        if place == EOS:
            if tokenizer.eos_token_id is None:
                raise DataError(
                    f"the tokenizer of {tokenizer.folder} names no end-of-sequence token",
                    do="add eos_token to its tokenizer_config.json",
                )
            self.items.append((tokenizer.eos_token_id, trained))
        else:
            assert place in (BOS, AUTO_BOS), place
            wanted = place == BOS or tokenizer.adds_bos
            if wanted and tokenizer.bos_token_id is not None:
                self.items.append((tokenizer.bos_token_id, trained))


def encode(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | Conversation,
    *,
    max_length: int | None = None,
    truncation: Truncation = "delete",
    loss_scale: LossScale = "default",
    system: str | None = None,
) -> Sample:
    """The conversation's tokens and labels: int32 [n] each, n <= max_length.

    Trained are, by `loss_scale`, every reply with its end marker ("default"), the last one only ("last_round") or
    everything ("all"); `Message.train` overrides it for its reply and, on a reply's last message, the end marker.
    The system prompt is the row's own, else `system`, else the template's; "" means none.

    max_length : longest sample in tokens, None for any length. A longer one is dropped ("delete"), loses its beginning
                 ("left") or its end ("right"), or is an error ("raise").

    Raises OverLength under "delete"; DataError for a conversation that cannot be trained on: no message, an unknown or
    unsupported role, a misplaced system message, two questions in a row, no reply at the end, an empty reply, or no
    trained token (the first token of a sample is never predicted and does not count).
    """
    pieces = _training_pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system)
    ids = [_encode_text(tokenizer, item) if isinstance(item, str) else [item] for item, _ in pieces]
    flat = np.fromiter(chain.from_iterable(ids), np.int32)
    trained = np.repeat([kind for _, kind in pieces], [len(piece) for piece in ids])
    labels = np.where(trained, flat, np.int32(IGNORE))
    return _finish(flat, labels, max_length=max_length, truncation=truncation)


def encode_many(
    template: Template,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message] | Conversation],
    *,
    max_length: int | None = None,
    truncation: Truncation = "delete",
    loss_scale: LossScale = "default",
    system: str | None = None,
) -> list[list[Sample] | DataError]:
    """`encode` of every conversation, in order and with the same outcome: where it would raise, its error stands.

    An outcome is a list of one sample; under truncation "split", of one or more, the pieces of the conversation in order.

    The samples are views of one array of the whole call, so give it chunks (1000 rows or so) and not a whole data set.
    """
    plans: list[list[tuple[str | int, bool]] | DataError] = []
    for messages in conversations:
        try:
            plans.append(_training_pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system))
        except DataError as error:
            plans.append(error)
    pieces = [piece for plan in plans if not isinstance(plan, DataError) for piece in plan]
    try:
        encoded = iter(tokenizer.encode_batch([item for item, _ in pieces if isinstance(item, str)]))
    except (TypeError, UnicodeEncodeError):  # a text that is not Unicode: find its row
        one = {"max_length": max_length, "truncation": truncation, "loss_scale": loss_scale, "system": system}
        return [_outcome(template, tokenizer, messages, one) for messages in conversations]
    ids = [next(encoded) if isinstance(item, str) else [item] for item, _ in pieces]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    trained = np.repeat(np.fromiter((kind for _, kind in pieces), np.bool_, len(pieces)), lengths)
    labels = np.where(trained, flat, np.int32(IGNORE))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    outcomes: list[list[Sample] | DataError] = []
    piece = 0
    for plan in plans:
        if isinstance(plan, DataError):
            outcomes.append(plan)
            continue
        begin, end = ends[piece], ends[piece + len(plan)]
        piece += len(plan)
        try:
            outcomes.append([_finish(flat[begin:end], labels[begin:end], max_length=max_length, truncation=truncation)])
        except DataError as error:
            outcomes.append(error)
    return outcomes


def encode_prompt(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | Conversation,
    *,
    system: str | None = None,
    response_prefix: str | None = None,
) -> list[int]:
    """The token ids after which the model writes its reply to the last question.

    response_prefix : begins the reply for the model; None is the template's own, "" is none. The decoded reply does
                      not contain it: put it in front.

    Raises DataError as `encode` does, and where the last message is a reply.
    """
    own_system, rounds = _rounds(messages)
    if rounds[-1].reply:
        raise DataError("the conversation ends with a reply", do="end it with the question that is to be answered")
    if template.single_round:
        rounds = rounds[-1:]
    pieces = _opening(template, tokenizer, own_system, system, trained=False)
    for number, (query, reply) in enumerate(rounds, 1):
        pieces.template(template.prompt, False, query=query)
        if number < len(rounds):
            # marked as trained, so that a reply is tokenised apart from its question, as in training
            pieces.text(_without_thinking(template, "".join(text for text, _ in reply)), True)
            pieces.template(template.suffix, True)
            pieces.template(template.between, False)
    pieces.text(template.response_prefix if response_prefix is None else response_prefix, False)
    ids = [_encode_text(tokenizer, item) if isinstance(item, str) else [item] for item, _ in pieces.items]
    return list(chain.from_iterable(ids))


def stop_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The ids on which generation stops: the ends of sequence of tokenizer, generation_config and template."""
    ids = [tokenizer.eos_token_id, *tokenizer.generation_eos_ids]
    for text in _stop_texts(template):
        ids.append(tokenizer.eos_token_id if text == EOS else tokenizer.token_id(text))
    return list(dict.fromkeys(number for number in ids if number is not None))


def stop_strings(template: Template, tokenizer: Tokenizer) -> list[str]:
    """The template's stop texts that are no single token of this tokenizer: look for them in the decoded text."""
    texts = _stop_texts(template)
    return list(dict.fromkeys(text for text in texts if text != EOS and tokenizer.token_id(text) is None))


def _stop_texts(template: Template) -> list[str]:
    """The end marker without white space (chatml's trained newline ends nothing) and the stop words."""
    return [template.suffix.strip(), *template.stop_words]


def _training_pieces(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | Conversation,
    *,
    loss_scale: LossScale,
    system: str | None,
) -> list[tuple[str | int, bool]]:
    """The conversation as (text or id, trained), neighbouring texts of one kind joined."""
    assert loss_scale in ("default", "last_round", "all"), loss_scale
    own_system, rounds = _rounds(messages)
    if not rounds[-1].reply:
        last_message = len(messages.messages) if isinstance(messages, Conversation) else len(messages)
        raise DataError(
            f"the conversation ends with a question (message {last_message}) and has no reply to train on",
            do="add the assistant's reply or remove the question",
        )
    if template.single_round:
        rounds = rounds[-1:]
    everything = loss_scale == "all"
    pieces = _opening(template, tokenizer, own_system, system, trained=everything)
    last = len(rounds) - 1
    for number, (query, reply) in enumerate(rounds):
        pieces.template(template.prompt, everything, query=query)
        kind = default = loss_scale != "last_round" or number == last
        for text, train in reply:
            kind = default if train is None else train
            pieces.text(text, kind)
        pieces.template(template.suffix, kind)
        if number < last:
            pieces.template(template.between, everything)
    return pieces.items


def _opening(
    template: Template, tokenizer: Tokenizer, own_system: str | None, system: str | None, *, trained: bool
) -> _Pieces:
    """What stands before the first round."""
    text = next((one for one in (own_system, system, template.default_system) if one is not None), "")
    pieces = _Pieces(tokenizer)
    if not text:
        pieces.template(template.prefix, trained)
    elif template.system_prefix is None:
        raise DataError(
            f"the template '{template.name}' has no place for a system prompt", do="remove it or choose a chat template"
        )
    else:
        pieces.template(template.system_prefix, trained, system=text)
    return pieces


def _rounds(messages: Sequence[Message] | Conversation) -> tuple[str | None, list[_Round]]:
    """The row's own system prompt and its rounds, at least one; only the last one may lack its reply.

    A reply without a question gets an empty one; consecutive replies are one reply.
    """
    if isinstance(messages, Conversation):
        if messages.tools:
            raise DataError("tools are not supported yet", do="remove the row's tools")
        messages = messages.messages
    system: str | None = None
    rounds: list[_Round] = []
    for number, message in enumerate(messages, 1):
        role, content = message.role, message.content
        if role == "assistant":
            if not rounds:
                rounds.append(_Round("", []))
            rounds[-1].reply.append((content, message.train))
        elif role == "user":
            if rounds and not rounds[-1].reply:
                raise DataError(
                    f"message {number} is a second question in a row", do="join it with the one before or add a reply"
                )
            rounds.append(_Round(content, []))
        elif role == "system":
            if number > 1:
                why = "there is one already" if system is not None else ""
                raise DataError(f"message {number} is a system message, which only the first may be", why=why)
            system = content
        elif role in TOOL_ROLES:
            raise DataError(f"message {number} has the role '{role}', which is not supported yet", do="remove the row")
        else:
            raise DataError(f"message {number} has the unknown role '{role}'", do=f"roles: {', '.join(ROLES)}")
    if not rounds:
        raise DataError("the conversation has no message" if system is None else "there is only a system message")
    for number, (_, reply) in enumerate(rounds, 1):
        if reply and not any(text for text, _ in reply):
            raise DataError(f"the reply of round {number} is empty", do="remove the round or the row")
    return system, rounds


def _without_thinking(template: Template, reply: str) -> str:
    """The reply as it stands in the history of a prompt."""
    if not template.drop_thinking:
        return reply
    return reply.split("</think>")[-1].lstrip(template.thinking_strip)


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError("a message is not valid Unicode text", why=str(error), do="mend or remove the row") from error


def _outcome(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message] | Conversation, one: dict
) -> list[Sample] | DataError:
    try:
        return [encode(template, tokenizer, messages, **one)]
    except DataError as error:
        return error


def _finish(ids: np.ndarray, labels: np.ndarray, *, max_length: int | None, truncation: Truncation) -> Sample:
    """The sample cut to max_length; OverLength or DataError as `encode` says. ids, labels : int32 [n]."""
    length = len(ids)
    if max_length is not None and length > max_length:
        what = f"the row has {length} tokens, more than max_length {max_length}"
        if truncation == "delete":
            raise OverLength(what, do="raise --max_length or choose --truncation_strategy left or right")
        if truncation == "raise":
            raise DataError(what, do="raise --max_length or choose another --truncation_strategy")
        assert truncation in ("left", "right"), truncation
        kept = slice(length - max_length, None) if truncation == "left" else slice(max_length)
        ids, labels = ids[kept], labels[kept]
    if not (labels[1:] != IGNORE).any():
        cut = f" after cutting {length} tokens to max_length {max_length}" if len(ids) < length else ""
        raise DataError(f"the row has no trained token{cut}", do="remove the row, or train more of it (--loss_scale)")
    return Sample(ids, labels)
