"""Text from the command line and values from a file, turned into the declared type or refused with the place's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_swift.args.spec import Param, show
from megatron_swift.utils.errors import UsageError

TRUE_WORDS = ("true", "yes", "t", "y", "1")
FALSE_WORDS = ("false", "no", "f", "n", "0")
NONE_WORDS = ("none", "null")


def from_texts(param: Param, texts: list[str], where: str) -> Any:
    """The value of a flag followed by `texts`; `where` is the flag as typed. A bool without text is True."""
    if not texts:
        if param.kind.base is bool and not param.kind.many:
            return True
        raise UsageError(f"{where} needs a value", do=f"write {where} {_placeholder(param)}")
    if (
        param.kind.optional
        and len(texts) == 1
        and texts[0].lower() in NONE_WORDS
        and texts[0] not in param.kind.choices
    ):
        return None
    if param.kind.many:
        return [_one(param, text, where) for text in texts]
    if len(texts) > 1:
        raise UsageError(
            f"{where} takes one value, got {len(texts)}: {' '.join(texts)}",
            do="quote a value that contains spaces",
        )
    return _one(param, texts[0], where)


def from_file(param: Param, value: Any, where: str) -> Any:
    """The value of a key in a JSON or YAML file. Numbers written as text (YAML reads 1e-5 as text) are accepted."""
    kind = param.kind
    if value is None:
        if kind.optional:
            return None
        raise UsageError(f"{where}: empty value", do=f"give it a value of type {kind.text()} or leave the key out")
    if kind.many:
        return [_one(param, item, where) for item in (value if isinstance(value, list) else [value])]
    if kind.optional and isinstance(value, str) and value.lower() in NONE_WORDS and value not in kind.choices:
        return None
    return _one(param, value, where)


def parse_bool(text: str) -> bool | None:
    """True or False for one of the accepted words in any case, None for anything else."""
    word = text.lower()
    return True if word in TRUE_WORDS else False if word in FALSE_WORDS else None


def read_json(text: str, where: str) -> Any:
    """The JSON value in `text`; UsageError for bad syntax and for a key that occurs twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UsageError(f"{where}: the key {key!r} occurs twice", do="keep one of the two")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as e:
        raise UsageError(f"{where}: not valid JSON", why=str(e)) from e


def _one(param: Param, value: Any, where: str) -> Any:
    base = param.kind.base
    if base is bool:
        return _bool(value, where)
    if base is int:
        return _int(value, where)
    if base is float:
        return _float(value, where)
    if base is dict:
        return _dict(value, where)
    if isinstance(value, bool) and show(value) in param.kind.choices:  # YAML and JSON have no other true
        return show(value)
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected text, got {show(value)}", do="put it in quotes")
    if param.kind.choices and value not in param.kind.choices:
        raise UsageError(f"{where} {show(value)}: must be one of {', '.join(param.kind.choices)}")
    return value


def _bool(value: Any, where: str) -> bool:
    found = parse_bool(value) if isinstance(value, str) else value if value in (True, False) else None
    if found is None:
        raise UsageError(f"{where} {show(value)}: must be true or false")
    return bool(found)


def _int(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    if not isinstance(value, bool):
        try:
            number = float(value)
            if number.is_integer():
                return int(number)
        except (ValueError, TypeError, OverflowError):
            pass
    raise UsageError(f"{where} {show(value)}: must be a whole number")


def _float(value: Any, where: str) -> float:
    if not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, TypeError):
            pass
    raise UsageError(f"{where} {show(value)}: must be a number")


def _dict(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            value = read_json(value, where)
        elif Path(value).is_file():
            value = read_json(Path(value).read_text(encoding="utf-8"), f"{where}: {value}")
        else:
            raise UsageError(f"{where} {show(value)}: neither a JSON object nor an existing file")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: must be a JSON object such as '{{\"key\": 1}}'")
    return value


def _placeholder(param: Param) -> str:
    if param.kind.choices:
        return "|".join(param.kind.choices)
    return {dict: "'{...}'", str: "TEXT", int: "N", float: "NUMBER", bool: "true"}[param.kind.base]
