"""One declaration per parameter: everything the parser, the help, the reference page and the checks need is in it.

A group of parameters is a frozen dataclass below `Arguments` whose fields are made by `param`:

    lr: float = param(1e-5, "Peak learning rate.", above=0)

The annotation is the type: bool, int, float, str, Literal of strings, dict, a list of these, or one of them `| None`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from megatron_swift.utils.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Base of all groups and commands. `given` and `config_env` are filled by `commands.parse`, not by flags."""

    group: ClassVar[str] = ""

    given: frozenset[str] = frozenset()
    config_env: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What one declaration says besides name and type. See `param` for the meaning of each entry."""

    default: Any
    help: str
    unit: str = ""
    aliases: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    max_items: int | None = None
    check: Callable[[Any], str] | None = None
    not_yet: str = ""
    built: tuple[Any, ...] = ()
    fixed: str = ""
    no_effect: str = ""
    secret: bool = False


def param(
    default: Any,
    help: str,
    *,
    unit: str = "",
    aliases: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    max_items: int | None = None,
    check: Callable[[Any], str] | None = None,
    not_yet: str = "",
    built: tuple[Any, ...] = (),
    fixed: str = "",
    no_effect: str = "",
    secret: bool = False,
) -> Any:
    """A dataclass field that is one user-visible parameter.

    aliases   : further spellings, such as the name that a later ms-swift release uses.
    check     : returns "" for a good value, otherwise what the value must be ("a number followed by GB").
    not_yet   : what is missing, as a noun; every value but the default and those in `built` is refused with it.
    fixed     : the reason why every value but the default is refused for good.
    no_effect : the reason why the value changes nothing here; a warning says so when the user sets another value.
    secret    : never shown, logged or written to args.json.
    """
    declared = Declared(
        default=default,
        help=help,
        unit=unit,
        aliases=aliases,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        max_items=max_items,
        check=check,
        not_yet=not_yet,
        built=built,
        fixed=fixed,
        no_effect=no_effect,
        secret=secret,
    )
    metadata = {"declared": declared}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def with_default(group: type[Arguments], name: str, default: Any, help: str) -> Any:
    """The parameter `name` of `group` again, with another default and help: for a command that differs in just that."""
    declared = next(f for f in dataclasses.fields(group) if f.name == name).metadata["declared"]
    return dataclasses.field(
        default=default, metadata={"declared": dataclasses.replace(declared, default=default, help=help)}
    )


class Kind(NamedTuple):
    """A parameter's type. `base` is the type of the value, or of each item where `many`."""

    base: type
    choices: tuple[str, ...]
    optional: bool
    many: bool

    def text(self) -> str:
        """`int`, `float?` (may be none), `list[str]`, `adam|sgd`, `json?`."""
        one = "|".join(self.choices) if self.choices else "json" if self.base is dict else self.base.__name__
        return (f"list[{one}]" if self.many else one) + ("?" if self.optional else "")


@dataclass(frozen=True)
class Param:
    """One parameter of one command: its name, type, group title and declaration."""

    name: str
    kind: Kind
    group: str
    declared: Declared

    @property
    def default(self) -> Any:
        return self.declared.default

    def status(self) -> str:
        """The remark in help and reference, "" for a parameter that is fully built."""
        d = self.declared
        if d.not_yet:
            missing = [v for v in self._few_values() if v not in (d.default, *d.built)]
            return f"(not built yet: {', '.join(show(v) for v in missing)})" if missing else "(not built yet)"
        if d.fixed:
            return f"(only {show(d.default)}: {d.fixed})"
        return f"(no effect here: {d.no_effect})" if d.no_effect else ""

    def _few_values(self) -> tuple[Any, ...]:
        return (True, False) if self.kind.base is bool else self.kind.choices

    def verify(self, value: Any, where: str) -> None:
        """Raise UsageError unless this version can work with `value`; `where` names the flag or the file and key."""
        d = self.declared
        for item in value if self.kind.many and value is not None else [value]:
            problem = "" if item is None else _broken_rule(d, item)
            if problem:
                raise UsageError(f"{where} {show(value)}: must be {problem}")
        if d.max_items is not None and value is not None and len(value) > d.max_items:
            raise UsageError(f"{where} {show(value)}: takes at most {d.max_items} values, got {len(value)}")
        if (d.not_yet or d.fixed) and value not in (d.default, *d.built):
            if d.fixed:
                raise UsageError(f"{where} {show(value)}: only {show(d.default)} is offered", why=d.fixed)
            raise UsageError(f"{where} {show(value)}: {d.not_yet} is not built yet in this version", do=_way_out(d))


def _way_out(d: Declared) -> str:
    usable = [show(v) for v in (d.default, *d.built) if v not in (None, [])]
    return ("use " if d.built else "leave it at ") + " or ".join(usable) if usable else "leave it out"


def _broken_rule(d: Declared, item: Any) -> str:
    if isinstance(item, float) and not math.isfinite(item):
        return "a finite number"
    if d.at_least is not None and item < d.at_least:
        return f"at least {d.at_least:g}"
    if d.above is not None and item <= d.above:
        return f"above {d.above:g}"
    if d.at_most is not None and item > d.at_most:
        return f"at most {d.at_most:g}"
    if d.below is not None and item >= d.below:
        return f"below {d.below:g}"
    return d.check(item) if d.check else ""


def show(value: Any) -> str:
    """A value as a user would type it: true, none, `a b` for a list."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(show(v) for v in value) or "(empty)"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    return str(value) if value != "" else "''"


def kind_of(hint: Any) -> Kind:
    """The Kind of an annotation."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        assert len(inner) == 1, f"unsupported annotation {hint}"
        optional, hint = True, inner[0]
    many = get_origin(hint) is list
    if many:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    base = str if choices else (get_origin(hint) or hint)
    assert base in (bool, int, float, str, dict), f"unsupported annotation {hint}"
    return Kind(base, choices, optional, many)


def params_of(command: type[Arguments]) -> dict[str, Param]:
    """The parameters of a command (or group) by name, group after group in the command's order."""
    hints = get_type_hints(command)
    fields = {f.name: f for f in dataclasses.fields(command) if "declared" in f.metadata}
    ordered: dict[str, Param] = {}
    for cls in command.__mro__:
        title = cls.__dict__.get("group", "")
        if not title:
            continue
        for name in inspect.get_annotations(cls):
            if name in fields and name not in ordered:
                ordered[name] = Param(name, kind_of(hints[name]), title, fields[name].metadata["declared"])
    assert ordered.keys() == fields.keys(), f"parameters outside any group: {fields.keys() - ordered.keys()}"
    return ordered
