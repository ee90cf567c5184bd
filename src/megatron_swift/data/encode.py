"""Conversations to token ids and labels, and to prompts for inference.

Errors here do not know the row's file and line: they are DataErrors, and the caller adds where the row stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np

from megatron_swift.data.jinja_template import JinjaTemplate, jinja_prompt_pieces, jinja_training_pieces
from megatron_swift.data.loss_scale import LossScale
from megatron_swift.data.render import Piece, prompt_pieces, training_pieces
from megatron_swift.data.template import EOS, Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Message, Sample
from megatron_swift.utils.errors import DataError

Truncation = Literal["delete", "left", "right", "raise", "split"]


class OverLength(DataError):
    """A row longer than max_length under truncation "delete": the caller drops and counts it."""


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
    """The conversation's tokens, labels and, where one is neither 0 nor 1, weights; n <= max_length.

    Trained are, by `loss_scale`, every reply with its end marker ("default"), what answers the last question
    ("last_round") or everything ("all"); the other names weigh parts of the replies (`loss_scale.weigh`).
    `Message.train` and `Message.loss_scale` override it for their reply and, on a reply's last message, the end marker.
    A call of a tool is a reply; what a tool responds is not. The system prompt is the row's own, else `system`, else the
    template's; "" means none.

    max_length : longest sample in tokens, None for any length. A longer one is dropped ("delete"), loses its beginning
                 ("left") or its end ("right"), or is an error ("raise"); `encode_many` can cut it into several ("split").

    Raises OverLength under "delete"; DataError for a conversation that cannot be trained on: no message, an unknown
    role, a misplaced system message, two questions in a row, a response to no call, no reply at the end, an empty reply,
    or no trained token (the first token of a sample is never predicted and does not count).
    """
    assert truncation != "split", "encode gives one sample: use encode_many"
    pieces = _pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system)
    ids = [_encode_text(tokenizer, item) if isinstance(item, str) else [item] for item, _ in pieces]
    whole = _sample(
        pieces, np.fromiter(map(len, ids), np.int64, len(ids)), np.fromiter(chain.from_iterable(ids), np.int32)
    )
    return _fit(whole, max_length=max_length, truncation=truncation)[0]


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

    An outcome is a list of one sample; under truncation "split", of one or more: the tokens of the conversation cut every
    max_length, pieces without a trained token left out. (The first token of each piece is read but not predicted.)

    The samples are views of one array of the whole call, so give it chunks (1000 rows or so) and not a whole data set.
    """
    plans: list[list[Piece] | DataError] = []
    for messages in conversations:
        try:
            plans.append(_pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system))
        except DataError as error:
            plans.append(error)
    pieces = [piece for plan in plans if not isinstance(plan, DataError) for piece in plan]
    try:
        encoded = iter(tokenizer.encode_batch([item for item, _ in pieces if isinstance(item, str)]))
    except (TypeError, UnicodeEncodeError):  # a text that is not Unicode: find its row
        return _one_by_one(tokenizer, plans, max_length=max_length, truncation=truncation)
    ids = [next(encoded) if isinstance(item, str) else [item] for item, _ in pieces]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = _sample(pieces, lengths, np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())))
    ends = np.concatenate(([0], np.cumsum(lengths))).tolist()
    outcomes: list[list[Sample] | DataError] = []
    piece = 0
    for plan in plans:
        if isinstance(plan, DataError):
            outcomes.append(plan)
            continue
        whole = _cut(flat, ends[piece], ends[piece + len(plan)])
        piece += len(plan)
        try:
            outcomes.append(_fit(whole, max_length=max_length, truncation=truncation))
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
    """The token ids after which the model writes its reply to the last question or tool response.

    response_prefix : begins the reply for the model; None is the template's own, "" is none. The decoded reply does
                      not contain it: put it in front.

    Raises DataError as `encode` does, and where the last message is a reply.
    """
    if isinstance(template, JinjaTemplate):
        pieces = jinja_prompt_pieces(template, tokenizer, messages, system=system, response_prefix=response_prefix)
    else:
        pieces = prompt_pieces(template, tokenizer, messages, system=system, response_prefix=response_prefix)
    ids = [_encode_text(tokenizer, item) if isinstance(item, str) else [item] for item, _ in pieces]
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
    return [text for text in (template.suffix.strip(), *template.stop_words) if text]


def _pieces(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | Conversation,
    *,
    loss_scale: LossScale,
    system: str | None,
) -> list[Piece]:
    if isinstance(template, JinjaTemplate):
        return jinja_training_pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system)
    return training_pieces(template, tokenizer, messages, loss_scale=loss_scale, system=system)


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError("a message is not valid Unicode text", why=str(error), do="mend or remove the row") from error


def _one_by_one(
    tokenizer: Tokenizer, plans: Sequence[list[Piece] | DataError], *, max_length: int | None, truncation: Truncation
) -> list[list[Sample] | DataError]:
    outcomes: list[list[Sample] | DataError] = []
    for plan in plans:
        try:
            if isinstance(plan, DataError):
                raise plan
            ids = [_encode_text(tokenizer, item) if isinstance(item, str) else [item] for item, _ in plan]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            whole = _sample(plan, lengths, np.fromiter(chain.from_iterable(ids), np.int32))
            outcomes.append(_fit(whole, max_length=max_length, truncation=truncation))
        except DataError as error:
            outcomes.append(error)
    return outcomes


def _sample(pieces: Sequence[Piece], lengths: np.ndarray, ids: np.ndarray) -> Sample:
    """One Sample of all pieces. lengths : int64 [pieces], their tokens. ids : int32 [sum of lengths]."""
    weights = np.fromiter((weight for _, weight in pieces), np.float32, len(pieces))
    labels = np.where(np.repeat(weights > 0, lengths), ids, np.int32(IGNORE))
    weighted = bool(((weights != 0) & (weights != 1)).any())
    return Sample(ids, labels, np.repeat(weights, lengths) if weighted else None)


def _cut(sample: Sample, begin: int, end: int) -> Sample:
    """Tokens begin..end; weights only where one of them says more than the labels do."""
    weights = None
    if sample.weights is not None:
        weights = sample.weights[begin:end]
        if ((weights == 0) | (weights == 1)).all():
            weights = None
    return Sample(sample.ids[begin:end], sample.labels[begin:end], weights)


def _fit(sample: Sample, *, max_length: int | None, truncation: Truncation) -> list[Sample]:
    """The sample within max_length, in several pieces under "split"; OverLength or DataError as `encode` says."""
    length = len(sample.ids)
    pieces = [sample]
    if max_length is not None and length > max_length:
        what = f"the row has {length} tokens, more than max_length {max_length}"
        if truncation == "delete":
            raise OverLength(what, do="raise --max_length or choose --truncation_strategy left, right or split")
        if truncation == "raise":
            raise DataError(what, do="raise --max_length or choose another --truncation_strategy")
        if truncation == "split":
            pieces = [_cut(sample, at, at + max_length) for at in range(0, length, max_length)]
        else:
            assert truncation in ("left", "right"), truncation
            begin = length - max_length if truncation == "left" else 0
            pieces = [_cut(sample, begin, begin + max_length)]
    kept = [piece for piece in pieces if (piece.labels[1:] != IGNORE).any()]
    if not kept:
        cut = f" after cutting {length} tokens to max_length {max_length}" if length > (max_length or length) else ""
        raise DataError(f"the row has no trained token{cut}", do="remove the row, or train more of it (--loss_scale)")
    return kept


__all__ = [
    "LossScale",
    "OverLength",
    "Truncation",
    "encode",
    "encode_many",
    "encode_prompt",
    "stop_ids",
    "stop_strings",
]
