"""One sample as text with what is trained made visible, and as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Sample

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_OPEN, _CLOSE, _NEWLINE = "⟦", "⟧", "↵"


def render_sample(sample: Sample, tokenizer: Tokenizer, *, colour: bool) -> str:
    """The sample's text, special tokens included, with its trained spans in green or, without colour, in ⟦ ⟧.

    A first line counts tokens and trained tokens. A trained span that ends in a newline shows it as ↵; one whose weight
    in the loss is not 1 begins with it, as in ⟦×2 ... ⟧. Whole spans are decoded, so that characters of several tokens
    stay whole; control characters of the data are shown escaped. Whether the terminal wants colour (NO_COLOR) is the
    caller's to know.
    """
    weights = weights_of(sample)
    opening, closing = (_GREEN, _RESET) if colour else (_OPEN, _CLOSE)
    shown = f"shown {opening}so{closing}"
    if ((weights != 0) & (weights != 1)).any():
        shown += f", with another weight than 1 {opening}{_mark(0.5)}so{closing}"
    lines = [f"{len(sample.ids)} tokens, {int((weights > 0).sum())} trained ({shown})\n"]
    for begin, end in _spans(weights):
        text, weight = _escape(_span_text(sample.ids, begin, end, tokenizer)), float(weights[begin])
        if not weight:
            lines.append(text)
        elif text.endswith("\n"):
            lines.append(f"{opening}{_mark(weight)}{text[:-1]}{_NEWLINE}{closing}\n")
        else:
            lines.append(f"{opening}{_mark(weight)}{text}{closing}")
    return "".join(lines)


def sample_json(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """The sample as plain values: text, ids, labels (-100 where a token is not trained), loss_scale where not 0 and 1 alone,
    and the trained spans as [first token, after the last, weight, text]."""
    weights = weights_of(sample)
    value: dict[str, Any] = {
        "text": tokenizer.decode(sample.ids.tolist()),
        "num_tokens": len(sample.ids),
        "num_trained": int((weights > 0).sum()),
        "input_ids": sample.ids.tolist(),
        "labels": sample.labels.tolist(),
        "trained": [
            [begin, end, round(float(weights[begin]), 6), _span_text(sample.ids, begin, end, tokenizer)]
            for begin, end in _spans(weights)
            if weights[begin]
        ],
    }
    if sample.weights is not None:
        value["loss_scale"] = [round(float(weight), 6) for weight in weights]
    return value


def weights_of(sample: Sample) -> np.ndarray:
    """The weight of each token's loss, float32 [n]: 0 where it is not trained."""
    trained = sample.labels != IGNORE
    if sample.weights is None:
        return trained.astype(np.float32)
    return np.where(trained, sample.weights, np.float32(0))


def _mark(weight: float) -> str:
    return "" if weight == 1 else f"×{weight:g} "


def _spans(values: np.ndarray) -> list[tuple[int, int]]:
    """The longest runs of equal values as (begin, end). values : [n]."""
    if not len(values):
        return []
    cuts = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(values)], strict=True))


def _span_text(ids: np.ndarray, begin: int, end: int, tokenizer: Tokenizer) -> str:
    """The span's text as it stands in the whole: some decoders drop a space at the start of what they are given."""
    before, through = tokenizer.decode(ids[:begin].tolist()), tokenizer.decode(ids[:end].tolist())
    return through[len(before) :] if through.startswith(before) else tokenizer.decode(ids[begin:end].tolist())


def _escape(text: str) -> str:
    """Control characters other than newline and tab in Python's notation: data must not steer the terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() or ord(char) > 0x9F else repr(char)[1:-1] for char in text
    )
