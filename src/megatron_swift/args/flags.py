"""The command line: which parameter a spelling means, and which words belong to it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_swift.args.spec import Param
from megatron_swift.args.values import from_texts
from megatron_swift.utils.errors import UsageError

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
_FLAG = re.compile(r"--?[A-Za-z][^\s=]*(=.*)?", re.DOTALL)


class Target(NamedTuple):
    """What a spelling stands for. `negated`: --no_x for the bool x, or --x for the bool no_x."""

    param: Param
    negated: bool = False


@dataclass
class Flags:
    """What was typed: typed values and the flag as typed, by parameter name; the config file; unknown flags."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    unknown: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


def spellings(params: Mapping[str, Param]) -> dict[str, Target]:
    """Every accepted name (with underscores, without dashes in front). A real name or alias wins over a negation."""
    found: dict[str, Target] = {}
    for p in params.values():
        for name in (p.name, *p.declared.aliases):
            assert name not in found, f"two parameters are spelled {name}"
            found[name] = Target(p)
    for p in params.values():
        if p.kind.base is bool and not p.kind.many:
            found.setdefault(
                p.name.removeprefix("no_") if p.name.startswith("no_") else "no_" + p.name, Target(p, True)
            )
    return found


def is_flag(token: str) -> bool:
    """Whether a word starts a parameter: `--name`, `-h`, `--name=value`, but not -1, -.5 or a text with spaces."""
    return _FLAG.fullmatch(token) is not None


def read_flags(params: Mapping[str, Param], argv: Sequence[str]) -> Flags:
    """Split `argv` into typed values. Unknown flags are collected, everything else wrong is a UsageError."""
    table = spellings(params)
    flags = Flags()
    rest = list(argv)
    if rest and not is_flag(rest[0]) and rest[0].endswith(CONFIG_SUFFIXES):
        flags.config = rest.pop(0)
    while rest:
        token = rest.pop(0)
        if not is_flag(token):
            raise UsageError(
                f"unexpected argument {token!r}",
                why="parameters are written --name value",
                do="see --help for the names",
            )
        typed, has_value, value = token.partition("=")
        texts = [value] if has_value else []
        while rest and not is_flag(rest[0]) and not has_value:
            texts.append(rest.pop(0))
        _take(flags, table, typed, texts)
    return flags


def _take(flags: Flags, table: Mapping[str, Target], typed: str, texts: list[str]) -> None:
    name = typed.removeprefix("--").replace("-", "_")
    if name == "config":
        if len(texts) != 1 or flags.config:
            raise UsageError(f"{typed} takes one file, given once", do=f"write {typed} FILE.yaml")
        flags.config = texts[0]
        return
    target = _resolve(table, typed, name) if typed.startswith("--") else None
    if target is None:
        flags.unknown.append(typed)
        return
    param = target.param
    if param.name in flags.values:
        if param.kind.many:
            raise UsageError(
                f"{typed} is given twice", why="a second list would replace the first", do=f"write {typed} A B C once"
            )
        flags.repeated.append(param.name)
    value = from_texts(param, texts, typed)
    flags.values[param.name] = not value if target.negated and value is not None else value
    flags.where[param.name] = typed if not target.negated else f"{typed}, that is --{param.name}"


def _resolve(table: Mapping[str, Target], typed: str, name: str) -> Target | None:
    """Exact spelling, else the only parameter that starts with it, as argparse does."""
    if name in table:
        return table[name]
    begins = [s for s in table if s.startswith(name)]
    if len({(table[s].param.name, table[s].negated) for s in begins}) > 1:
        shown = sorted(s for s in begins if not table[s].negated) or sorted(begins)
        raise UsageError(f"{typed} is ambiguous", do="write one of " + ", ".join("--" + s for s in shown[:8]))
    return table[begins[0]] if begins else None


def suggestion(name: str, known: Iterable[str], *, prefix: str = "--") -> str:
    """`did you mean --lr?`, or "" where nothing is near."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(known), n=3, cutoff=0.7)
    return "did you mean " + " or ".join(prefix + n for n in near) + "?" if near else ""


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the user asked for help (`-h` or `--help` anywhere)."""
    return any(token in ("-h", "--help") for token in argv)
