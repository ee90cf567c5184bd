"""One sample as text, with what is trained made visible."""

from __future__ import annotations

import numpy as np

from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Sample

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_OPEN, _CLOSE, _NEWLINE = "⟦", "⟧", "↵"


def render_sample(sample: Sample, tokenizer: Tokenizer, *, colour: bool) -> str:
    """The sample's text, special tokens included, with its trained spans in green or, without colour, in ⟦ ⟧.

    A first line counts tokens and trained tokens. A trained span that ends in a newline shows it as ↵. Whole spans are
    decoded, so that characters of several tokens stay whole; control characters of the data are shown escaped.
    Whether the terminal wants colour (NO_COLOR) is the caller's to know.
    """
    trained = sample.labels != IGNORE
    opening, closing = (_GREEN, _RESET) if colour else (_OPEN, _CLOSE)
    lines = [f"{len(sample.ids)} tokens, {int(trained.sum())} trained (shown {opening}so{closing})\n"]
    for begin, end in _spans(trained):
        text = _escape(_span_text(sample.ids, begin, end, tokenizer))
        if not trained[begin]:
            lines.append(text)
        elif text.endswith("\n"):
            lines.append(f"{opening}{text[:-1]}{_NEWLINE}{closing}\n")
        else:
            lines.append(f"{opening}{text}{closing}")
    return "".join(lines)


def _spans(trained: np.ndarray) -> list[tuple[int, int]]:
    """The longest runs of equal values as (begin, end). trained : bool [n]."""
    if not len(trained):
        return []
    cuts = (np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(trained)], strict=True))


def _span_text(ids: np.ndarray, begin: int, end: int, tokenizer: Tokenizer) -> str:
    """The span's text as it stands in the whole: some decoders drop a space at the start of what they are given."""
    before, through = tokenizer.decode(ids[:begin].tolist()), tokenizer.decode(ids[:end].tolist())
    return through[len(before) :] if through.startswith(before) else tokenizer.decode(ids[begin:end].tolist())


def _escape(text: str) -> str:
    """Control characters other than newline and tab in Python's notation: data must not steer the terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() or ord(char) > 0x9F else repr(char)[1:-1] for char in text
    )
