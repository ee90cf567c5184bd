"""How much each part of a trained reply weighs in the loss: `weigh`. The names are those of ms-swift's --loss_scale.

A weighted loss scale cuts a reply's own text at what stands in it (a keyword, a call, an empty thinking part) and gives
each part its weight. Where a reply begins and ends is never looked for: that is known from how the text was made.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

LossScale = Literal["default", "last_round", "all", "ignore_empty_think", "react", "hermes", "qwen"]
NAMES: tuple[str, ...] = get_args(LossScale)
# ms-swift has these too; what they weigh differs between its releases and is documented nowhere.
UNDOCUMENTED = ("agentflan", "alpha_umi")


class _Scale(NamedTuple):
    """What `pattern` finds weighs keys[what][0], and what follows it up to the next find keys[what][1]; where `keys` does
    not have it, it weighs `whole` and what follows 1. anchored: it is found at the beginning of a reply only."""

    pattern: re.Pattern[str]
    keys: dict[str, tuple[float, float]]
    whole: float = 1.0
    anchored: bool = False


def _keywords(keys: dict[str, tuple[float, float]]) -> _Scale:
    longest_first = sorted(keys, key=len, reverse=True)
    return _Scale(re.compile("|".join(re.escape(key) for key in longest_first)), keys)


# Keyword: its own weight, and that of the text from it to the next keyword.
_SCALES = {
    "react": _keywords(
        {
            "Action:": (2.0, 2.0),
            "Action Input:": (2.0, 2.0),
            "Thought:": (1.0, 1.0),
            "Final Answer:": (1.0, 1.0),
            "Observation:": (2.0, 0.0),
        }
    ),
    "qwen": _keywords(
        {"✿FUNCTION✿:": (2.0, 2.0), "✿ARGS✿:": (2.0, 2.0), "✿RETURN✿:": (1.0, 1.0), "✿RESULT✿:": (2.0, 0.0)}
    ),
    "hermes": _Scale(re.compile(r"<tool_call>.+?</tool_call>", re.DOTALL), {}, 2.0),
    "ignore_empty_think": _Scale(re.compile(r"(?:<think>\s*)?</think>\s*"), {}, 0.0, anchored=True),
}


def weigh(text: str, loss_scale: LossScale, *, begins: bool = True) -> list[tuple[str, float]]:
    """The parts of a trained text with their weights, in order; together they are the text, and none is empty.

    begins : whether the reply begins with this text.
    """
    scale = _SCALES.get(loss_scale)
    if scale is None:
        return [(text, 1.0)] if text else []
    if scale.anchored:
        found = scale.pattern.match(text) if begins else None
        parts = [] if found is None else [(found.group(), scale.whole)]
        at, after = (0 if found is None else found.end()), 1.0
    else:
        parts, at, after = [], 0, 1.0
        for found in scale.pattern.finditer(text):
            parts.append((text[at : found.start()], after))
            own, after = scale.keys.get(found.group(), (scale.whole, 1.0))
            parts.append((found.group(), own))
            at = found.end()
    parts.append((text[at:], after))
    return [part for part in parts if part[0]]
