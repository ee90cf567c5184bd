"""Data sets known by name: their ids on both hubs, the file shipped with the package, and what their rows need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Identity:
    """Who the model shall say it is: names and authors, each a value for Chinese rows and one for the others.

    One value serves both; none leaves the placeholder as it is.
    """

    names: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()


Row = dict[str, Any]
Fixup = Callable[[Row, Identity], Row]


@dataclass(frozen=True)
class Registered:
    """A data set known by name.

    ids     : hub ids; the first is the name we use. The last path component of each also matches local files, folders.
    subsets : fixup per subset; "default" is used where the user names none.
    asset   : file in data/assets that holds its rows, or "" where the rows are not shipped.
    """

    ids: tuple[str, ...]
    subsets: Mapping[str, Fixup] = field(default_factory=dict)
    asset: str = ""


def find_registered(name: str) -> Registered | None:
    """The data set that has `name` as an id, or whose id ends in `name`; without regard to case."""
    wanted = name.lower()
    for entry in REGISTRY:
        for identifier in entry.ids:
            known = identifier.lower()
            if wanted in (known, known.rsplit("/", 1)[-1]):
                return entry
    return None


def plain(row: Row, identity: Identity) -> Row:
    """The row as it is."""
    return row


def _fill_identity(row: Row, identity: Identity) -> Row:
    values = (("{{NAME}}", identity.names), ("{{AUTHOR}}", identity.authors))
    which = 0 if row.get("tag") == "zh" else -1
    filled = dict(row)
    for column in ("query", "response"):
        text = filled.get(column)
        if isinstance(text, str):
            for placeholder, choices in values:
                if choices:
                    text = text.replace(placeholder, choices[:2][which])
            filled[column] = text
    return filled


def _fill_identity_without_thinking(row: Row, identity: Identity) -> Row:
    filled = _fill_identity(row, identity)
    if isinstance(filled.get("query"), str) and isinstance(filled.get("response"), str):
        filled["query"] += " /no_think"
        filled["response"] = "<think>\n\n</think>\n\n" + filled["response"]
    return filled


def _strip_input_heading(row: Row, identity: Identity) -> Row:
    text = row.get("input")
    return {**row, "input": text.removeprefix("输入：")} if isinstance(text, str) else row


REGISTRY = (
    Registered(
        ("swift/self-cognition", "modelscope/self-cognition"),
        {"default": _fill_identity, "qwen3": _fill_identity_without_thinking},
        "self_cognition.jsonl",
    ),
    Registered(
        ("AI-ModelScope/alpaca-gpt4-data-zh", "llm-wizard/alpaca-gpt4-data-zh"), {"default": _strip_input_heading}
    ),
    Registered(("AI-ModelScope/alpaca-gpt4-data-en", "vicgalle/alpaca-gpt4"), {"default": plain}),
)
