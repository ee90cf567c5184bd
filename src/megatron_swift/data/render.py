"""A conversation and a template's texts to pieces, each tokenised as one: for training and for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_swift.data.agent import AGENTS, AgentTemplate, parse_tools
from megatron_swift.data.loss_scale import LossScale, weigh
from megatron_swift.data.rounds import Part, Round, split_off_tools, to_rounds
from megatron_swift.data.template import (
    AUTO_BOS,
    BOS,
    ENVIRONMENT,
    EOS,
    QUERY,
    SYSTEM,
    Template,
    is_place,
    split_places,
)
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Conversation, Message
from megatron_swift.utils.errors import DataError

Piece = tuple[str | int, float]  # a text or a token, and the weight of its loss: 0 is not trained


class Pieces:
    """A conversation as texts and tokens with their weights; neighbouring texts of one weight become one text.

    One text is tokenised in one piece, so where texts are joined decides the tokens.
    """

    __slots__ = ("_tokenizer", "items")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.items: list[Piece] = []
        self._tokenizer = tokenizer

    def text(self, text: str, weight: float) -> None:
        """Add a text as it is."""
        if not text:
            return
        items = self.items
        if items:
            last, same = items[-1]
            if same == weight and isinstance(last, str):
                items[-1] = (last + text, weight)
                return
        items.append((text, weight))

    def template(self, text: str, weight: float, *, query: str = "", system: str = "", environment: str = "") -> None:
        """Add a template's text with its places filled."""
        for piece in split_places(text):
            if not is_place(piece):
                self.text(piece, weight)
            elif piece == QUERY:
                self.text(query, weight)
            elif piece == SYSTEM:
                self.text(system, weight)
            elif piece == ENVIRONMENT:
                self.text(environment, weight)
            else:
                self._special(piece, weight)

    def _special(self, place: str, weight: float) -> None:
        tokenizer = self._tokenizer
        if place == EOS:
            if tokenizer.eos_token_id is None:
                raise DataError(
                    f"the tokenizer of {tokenizer.folder} names no end-of-sequence token",
                    do="add eos_token to its tokenizer_config.json",
                )
            self.items.append((tokenizer.eos_token_id, weight))
        else:
            assert place in (BOS, AUTO_BOS), place
            wanted = place == BOS or tokenizer.adds_bos
            if wanted and tokenizer.bos_token_id is not None:
                self.items.append((tokenizer.bos_token_id, weight))


def training_pieces(
    template: Template,
    tokenizer: Tokenizer,
    conversation: Sequence[Message] | Conversation,
    *,
    loss_scale: LossScale,
    system: str | None,
) -> list[Piece]:
    """The conversation as it is trained on; DataError as `encode` says."""
    messages, tools = split_off_tools(conversation)
    agent = AGENTS[template.agent_template]
    own_system, rounds, newest = to_rounds(messages, agent)
    if not rounds[-1].reply:
        raise DataError(
            f"the conversation ends with a question (message {len(messages)}) and has no reply to train on",
            do="add the assistant's reply or remove the question",
        )
    if template.single_round:
        rounds, newest = rounds[-1:], 0
    if tools:
        rounds[0].query = agent.question(parse_tools(tools), rounds[0].query)
    weight = 1.0 if loss_scale == "all" else 0.0
    pieces = _opening(template, tokenizer, agent, own_system, system, tools, weight=weight)
    last = len(rounds) - 1
    for number, one in enumerate(rounds):
        _ask(pieces, template, agent, one, weight)
        goes_on = number < last and agent.continues and bool(rounds[number + 1].responses)
        if loss_scale == "last_round" and template.drop_thinking and number < newest and not one.fixed:
            pieces.text(without_thinking(template, one.text), 0.0)
            end = 0.0
        else:
            trained = loss_scale != "last_round" or number >= newest
            end = _reply(pieces, template, one.reply, loss_scale=loss_scale, trained=trained)
        if goes_on:
            pieces.text(agent.end_of_reply(one.text), end)
        else:
            pieces.template(template.suffix, end)
            if number < last:
                pieces.template(template.between, weight)
    return pieces.items


def prompt_pieces(
    template: Template,
    tokenizer: Tokenizer,
    conversation: Sequence[Message] | Conversation,
    *,
    system: str | None,
    response_prefix: str | None,
) -> list[Piece]:
    """The conversation up to where the model goes on; DataError as `encode_prompt` says.

    Earlier replies weigh 1, so that they are tokenised apart from their questions, as in training.
    """
    messages, tools = split_off_tools(conversation)
    agent = AGENTS[template.agent_template]
    own_system, rounds, newest = to_rounds(messages, agent)
    if rounds[-1].reply:
        raise DataError("the conversation ends with a reply", do="end it with the question that is to be answered")
    if template.single_round:
        rounds, newest = rounds[-1:], 0
    if tools:
        rounds[0].query = agent.question(parse_tools(tools), rounds[0].query)
    pieces = _opening(template, tokenizer, agent, own_system, system, tools, weight=0.0)
    for number, one in enumerate(rounds):
        _ask(pieces, template, agent, one, 0.0)
        if number == len(rounds) - 1:
            break
        text = one.text
        pieces.text(without_thinking(template, text) if number < newest else text, 1.0)
        if agent.continues and rounds[number + 1].responses:
            pieces.text(agent.end_of_reply(text), 1.0)
        else:
            pieces.template(template.suffix, 1.0)
            pieces.template(template.between, 0.0)
    pieces.text(template.response_prefix if response_prefix is None else response_prefix, 0.0)
    return pieces.items


def without_thinking(template: Template, reply: str) -> str:
    """The reply as it stands in the history of a prompt."""
    if not template.drop_thinking:
        return reply
    return reply.split("</think>")[-1].lstrip(template.thinking_strip)


def _opening(
    template: Template,
    tokenizer: Tokenizer,
    agent: AgentTemplate,
    own_system: str | None,
    system: str | None,
    tools: tuple[str, ...],
    *,
    weight: float,
) -> Pieces:
    """What stands before the first round."""
    text = next((one for one in (own_system, system, template.default_system) if one is not None), "")
    environment = ""
    if tools:
        text, environment = agent.system(parse_tools(tools), text), agent.environment
    pieces = Pieces(tokenizer)
    if not text:
        pieces.template(template.prefix, weight, environment=environment)
    elif template.system_prefix is None:
        raise DataError(
            f"the template '{template.name}' has no place for a system prompt", do="remove it or choose a chat template"
        )
    else:
        pieces.template(template.system_prefix, weight, system=text, environment=environment)
    return pieces


def _ask(pieces: Pieces, template: Template, agent: AgentTemplate, one: Round, weight: float) -> None:
    """The question of a round, up to where its reply begins."""
    if not one.responses:
        pieces.template(template.prompt, weight, query=one.query)
    elif agent.continues:
        pieces.text(agent.responses(one.responses), weight)
    elif agent.response_turn:
        for response in one.responses:
            pieces.template(agent.response_turn, weight, query=response)
        pieces.template(agent.reply_opening, weight)
    else:
        pieces.template(template.prompt, weight, query=agent.responses(one.responses))


def _reply(pieces: Pieces, template: Template, reply: Sequence[Part], *, loss_scale: LossScale, trained: bool) -> float:
    """Add a reply's parts with their weights; returns the weight of what ends it."""
    if template.empty_think and not "".join([part.text for part in reply]).startswith("<think>"):
        pieces.text(template.empty_think, 1.0 if loss_scale == "all" else 0.0)
    end = 0.0
    for number, part in enumerate(reply):
        if part.train is False or not (trained or part.train or part.loss_scale):
            end = 0.0
            pieces.text(part.text, 0.0)
        elif part.loss_scale is not None:
            end = part.loss_scale
            pieces.text(part.text, end)
        else:
            end = 1.0
            for text, weight in weigh(part.text, loss_scale, begins=number == 0):
                pieces.text(text, weight)
    return end
