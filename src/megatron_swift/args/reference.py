"""Help texts and the reference page, both from the declarations.

`python -m megatron_swift.args.reference > docs/parameters.md` writes the page.
"""

from __future__ import annotations

import sys
import textwrap
from itertools import groupby

from megatron_swift.args.commands import COMMANDS
from megatron_swift.args.spec import Arguments, Param, params_of, show

_INDENT = 32  # column where descriptions start
_SYNTAX = """A parameter is written --name value, with _ or -. A bool alone means true, and --no_name means false. Lists are
separated by spaces. JSON values are a text or the path of a file. A config file (.yaml, .yml or .json), as first argument
or after --config, holds the same names; flags override it, and its mapping ENV sets environment variables that are not
set."""


def help_text(command: type[Arguments], prog: str = "", width: int = 100) -> str:
    """What `--help` prints: usage, an example, then every parameter with type, default, meaning and status, by group."""
    width = max(width, 60)
    about = command.__dict__
    prog = prog or about["prog"]
    lines = [
        f"usage: {prog} [config.yaml] [--name value ...]",
        "",
        *textwrap.wrap(about["summary"], width),
        "",
        "example:",
    ]
    example = about["example"].replace(about["prog"], prog, 1)  # a command may have two programs
    lines += [*_command_lines(example, width), "", *textwrap.wrap(_SYNTAX, width)]
    for title, members in groupby(params_of(command).values(), key=lambda p: p.group):
        lines += ["", f"{title}:"]
        for p in members:
            lines += _entry(p, width)
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    """The page docs/parameters.md: one table per group, each parameter once, with the commands that have it."""
    groups: dict[str, dict[str, Param]] = {}
    owners: dict[str, list[type[Arguments]]] = {}
    for command in COMMANDS:
        for p in params_of(command).values():
            groups.setdefault(p.group, {}).setdefault(p.name, p)
            owners.setdefault(f"{p.group}.{p.name}", []).append(command)
    lines = [
        "# Parameters",
        "",
        "Written by `python -m megatron_swift.args.reference > docs/parameters.md`; do not edit.",
        "",
        *textwrap.wrap(_SYNTAX, 120),
        "",
        "`?` after a type: `none` is allowed. A default after another command's name holds for that command only.",
    ]
    for title, members in groups.items():
        first = owners[f"{title}.{next(iter(members))}"]
        commands = ", ".join(f"`{c.__dict__['prog']}`" for c in first)
        lines += [
            "",
            f"## {title}",
            "",
            f"Commands: {commands}.",
            "",
            "| parameter | type | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [_row(p, owners[f"{title}.{p.name}"]) for p in members.values()]
    return "\n".join(lines) + "\n"


def _entry(p: Param, width: int) -> list[str]:
    head = f"  --{p.name} {_metavar(p)}"
    body = textwrap.wrap(_describe(p), width - _INDENT, break_long_words=False, break_on_hyphens=False)
    if len(head) < _INDENT - 1:
        head, body = head.ljust(_INDENT) + body[0], body[1:]
    return [head, *(" " * _INDENT + line for line in body)]


def _describe(p: Param) -> str:
    parts = [p.declared.help]
    if p.declared.unit:
        parts.append(f"Unit: {p.declared.unit}.")
    if p.default not in (None, []):
        parts.append(f"[{show(p.default)}]")
    if p.declared.aliases:
        parts.append("Also --" + ", --".join(p.declared.aliases) + ".")
    return " ".join(filter(None, [*parts, p.status()]))


def _metavar(p: Param) -> str:
    kind = p.kind
    if kind.choices:
        one = "{" + ",".join(kind.choices) + "}"
    else:
        one = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}[kind.base]
    return f"{one} ..." if kind.many else one


def _row(p: Param, commands: list[type[Arguments]]) -> str:
    defaults = show(p.default) if p.default not in (None, []) else ""
    for command in commands:
        other = params_of(command)[p.name].default
        if other != p.default:
            defaults += f"; {command.__dict__['prog']}: {show(other)}"
    meaning = p.declared.help + (f" Unit: {p.declared.unit}." if p.declared.unit else "")
    if p.declared.aliases:
        meaning += " Also " + ", ".join(f"`{a}`" for a in p.declared.aliases) + "."
    if p.status():
        meaning += f" *{p.status()}*"
    return f"| `{p.name}` | {_cell(p.kind.text())} | {_cell(defaults)} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _command_lines(command: str, width: int) -> list[str]:
    """A shell command broken before parameters, never between a parameter and its value."""
    lines = [""]
    for piece in command.replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(piece) > width - 8:
            lines.append(piece)
        else:
            lines[-1] = f"{lines[-1]} {piece}".strip()
    return [("    " if i else "  ") + line + (" \\" if i + 1 < len(lines) else "") for i, line in enumerate(lines)]


if __name__ == "__main__":
    sys.stdout.write(reference_page())
