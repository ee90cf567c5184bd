"""Jinja for a text that came with a model: it can read what it is given and write text, and neither hang nor fill memory."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000  # rounds of loops, elements of ranges and calls in one rendering
MAX_CHARS = 50_000_000  # of the result, and of any text made on the way
MAX_ELEMENTS = 100_000  # of one list or mapping, through all levels
MAX_SECONDS = 20.0
_MAX_WIDTH = 1000  # of indentation
# What published chat templates use; the others (center, format, batch ...) can make much out of little.
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round"),
    *("safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper", "wordcount"),
)
_METHODS_OF_TEXT = (
    *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace"),
    *("isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition"),
    *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "replace", "join"),
)


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


def _limit(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"it makes a text of more than {MAX_CHARS} characters")


def _text(value: Any) -> str:
    """str(value), of a list or mapping only after a look at how long that would be."""
    if not isinstance(value, str):
        _measure(value, 0)
    return str(value)


def _measure(value: Any, so_far: int) -> int:
    """At least the characters of str(value), on top of `so_far`, which are counted while they add up."""
    if isinstance(value, str):
        so_far += len(value)
    elif isinstance(value, dict):
        for key, one in value.items():
            so_far = _measure(one, _measure(key, so_far))
    elif isinstance(value, (list, tuple)):
        for one in value:
            so_far = _measure(one, so_far)
    _limit(so_far)
    return so_far + 1


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox (no private attributes, nothing can be changed) with loops, calls and texts counted."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make much out of little."""
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                length = len(left) + len(right)
                _limit(length)
                _BUDGET.get().step(1 + (length // 1000 if isinstance(left, str) else length))
        elif operator == "%":
            if isinstance(left, str):
                raise SecurityError("it formats text with %")
        elif operator == "**" or not all(isinstance(one, (int, float)) for one in (left, right)):
            raise SecurityError(f"it uses {operator}")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 256:
            raise SecurityError("it computes with huge numbers")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of texts, the methods whose result is no longer than what they are given; of all else, what Jinja's sandbox allows."""
        if isinstance(obj, str) and attr not in _METHODS_OF_TEXT:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format at all: a width in it makes a text of any length."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """At once an error: Jinja's own undefined value would print as nothing."""
        raise SecurityError(f"it asks for the attribute {attribute!r} of a value of type {type(obj).__name__}")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in the template."""
        _BUDGET.get().step()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args)
        if isinstance(owner, str) and name == "join":
            return _join(args[0], owner)
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, (str, list)):
            _BUDGET.get().step(len(result) // 1000)
        return result


class _Count(NodeTransformer):
    """Wraps what a loop goes through and what is put together from parts, and replaces `~`: all of it then counts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("it has a recursive loop")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted__")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "sized__")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "sized__")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "sized__") if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined__")


def _filtered(node: Any, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around replies, as transformers knows it: what is inside is written."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    budget = _BUDGET.get()
    for item in items:
        budget.step()
        yield item


def _sized(value: Any) -> Any:
    """A list, tuple or mapping made in the template, its elements counted through all levels."""
    waiting, budget = [value], _BUDGET.get()
    count = 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            waiting += one
        count += 1
        if count + len(waiting) > MAX_ELEMENTS:
            raise SecurityError(f"it puts more than {MAX_ELEMENTS} elements into one value")
    budget.step(count)
    return value


def _joined(parts: list[Any]) -> str:
    return _join(parts)


def _join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    texts = [_text(item if attribute is None else item[attribute]) for item in items]
    total = sum(map(len, texts)) + len(separator) * len(texts)
    _limit(total)
    _BUDGET.get().step(len(texts) + total // 1000)
    return separator.join(texts)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    _limit(len(text) + found * len(new))
    _BUDGET.get().step((len(text) + found * len(new)) // 1000)
    return text.replace(old, new, -1 if count is None else count)


def _range(*args: int) -> range:
    made = range(*args)
    _BUDGET.get().step(len(made))
    return made


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if isinstance(width, int) and width > _MAX_WIDTH:
        raise SecurityError("it indents too far")
    lines = str(text).split("\n")
    margin = " " * width if isinstance(width, int) else width
    _limit(len(text) + len(lines) * len(margin))
    head = margin if first else ""
    return head + "\n".join([lines[0], *(margin + line if line or blank else line for line in lines[1:])])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without escaping for HTML."""
    if indent is not None and indent > _MAX_WIDTH:
        raise SecurityError("it indents too far")
    _measure(value, 0)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _limit(len(text))
    _BUDGET.get().step(1 + len(text) // 1000)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> _Sandbox:
    env = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        finalize=lambda value: value if isinstance(value, jinja2.Undefined) else _text(value),
    )
    own: dict[str, Callable[..., Any]] = {
        **{"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent},
        **{"string": _text, "counted__": _counted, "joined__": _joined, "sized__": _sized},
    }
    env.filters = {**{name: env.filters[name] for name in _FILTERS}, **own}
    env.globals = {"range": _range, "raise_exception": _raise_exception, "namespace": env.globals["namespace"]}
    return env


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    env = _environment()
    return env.from_string(_Count().visit(env.parse(source)))


def render(source: str, values: dict[str, Any], *, day: datetime.date | None) -> str:
    """The text that the template writes; jinja2.TemplateError, or what Python raises, where it fails or spends too much.

    day : what `strftime_now` tells the template, in English whatever the locale; None: there is no such function.
    """
    template = _compiled(source)
    token = _BUDGET.set(_Budget())
    try:
        parts, length = [], 0
        if day is not None:
            values = {**values, "strftime_now": partial(_strftime, day)}
        for part in template.generate(**values):
            parts.append(part)
            length += len(part)
            _limit(length)
        return "".join(parts)
    finally:
        _BUDGET.reset(token)


_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


def english_date(day: datetime.date) -> str:
    """05 Mar 2025, whatever the locale."""
    return f"{day.day:02d} {_MONTHS[day.month - 1][:3]} {day.year}"


def _strftime(day: datetime.date, form: str) -> str:
    month = _MONTHS[day.month - 1]
    return day.strftime(form.replace("%b", month[:3]).replace("%B", month))
