"""What a chat template is: a few texts with named places, and nothing else. `templates.py` holds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

SYSTEM, QUERY, BOS, AUTO_BOS, EOS, DATE = "{system}", "{query}", "{bos}", "{auto_bos}", "{eos}", "{date}"
ENVIRONMENT = "{environment}"
_PLACE = re.compile(r"(\{(?:system|query|bos|auto_bos|eos|date|environment)\})")


@dataclass(frozen=True)
class Template:
    """The texts around the turns of a conversation.

    A conversation reads: prefix or system_prefix, then for each round prompt and reply; `separator` follows every reply
    but the last, `suffix` the last one. The separator begins with the suffix, and it is the suffix that is trained with
    its reply; the rest of the separator belongs to the next prompt.

    Places in a text: {system} and {query} take the user's text; {bos} and {eos} are the tokenizer's token *ids*
    ({bos} is left out by a tokenizer that has none); {auto_bos} is {bos} where the tokenizer itself puts one in front
    of a text; {date} is filled by `get_template`; {environment} is what the agent template says where a conversation
    has tools, otherwise nothing. Braces in the user's own text are never places.

    prefix           : what opens a conversation without a system prompt.
    system_prefix    : what opens one with it; None: the template has no place for a system prompt.
    stop_words       : texts on which generation stops besides the suffix and the tokenizer's end of sequence.
    response_prefix  : the text with which a reply is begun for the model at inference.
    drop_thinking    : a reply to an earlier question is reduced to what follows its last `</think>`, wherever it is there
                       to be read and not to be trained: in prompts, and in training under --loss_scale last_round.
    thinking_strip   : characters then stripped from the front of what is left.
    empty_think      : what the model writes in place of a thinking part when it is told not to think: put in front of the
                       replies to train on that do not begin with `<think>`, and not trained. "" for a model that cannot
                       be told so.
    agent_template   : the name, in `agent.AGENTS`, of how tools, calls and their responses are written.
    single_round     : only the last round of a conversation is used.
    """

    name: str
    prefix: str
    system_prefix: str | None
    prompt: str
    separator: str
    suffix: str
    default_system: str | None = None
    stop_words: tuple[str, ...] = ()
    response_prefix: str = ""
    drop_thinking: bool = False
    thinking_strip: str = "\n"
    empty_think: str = ""
    agent_template: str = "react_en"
    single_round: bool = False

    def __post_init__(self) -> None:
        assert self.separator.startswith(self.suffix), self.name
        assert QUERY in self.prompt, self.name

    @property
    def between(self) -> str:
        """The part of the separator that is not the end marker of a reply."""
        return self.separator[len(self.suffix) :]


@lru_cache(maxsize=256)
def split_places(text: str) -> tuple[str, ...]:
    """The text cut at its places, in order, empty pieces left out: "a{query}" gives ("a", "{query}")."""
    return tuple(piece for piece in _PLACE.split(text) if piece)


@lru_cache(maxsize=1024)
def is_place(piece: str) -> bool:
    """True for a piece of `split_places` that is a place and not a text."""
    return _PLACE.fullmatch(piece) is not None
