"""A JSON or YAML file with the same names as the flags, plus an `ENV` mapping of environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_swift.args.flags import suggestion
from megatron_swift.args.spec import Param
from megatron_swift.args.values import from_file, read_json
from megatron_swift.utils.errors import UsageError

ENV_KEY = "ENV"


class ConfigFile(NamedTuple):
    """Typed values and their place for messages, by parameter name; environment variables; unknown keys with a hint."""

    values: dict[str, Any]
    where: dict[str, str]
    env: dict[str, str]
    unknown: dict[str, str]


def read_config(params: Mapping[str, Param], path: str) -> ConfigFile:
    """Read `path` (.json, .yaml or .yml). Keys may use - or _, and aliases; a key that occurs twice is a UsageError."""
    content = _load(path)
    names = {name: p for p in params.values() for name in (p.name, *p.declared.aliases)}
    found = ConfigFile({}, {}, _env(content.pop(ENV_KEY, None), path), {})
    for key, value in content.items():
        p = names.get(str(key).removeprefix("--").replace("-", "_"))
        if p is None:
            found.unknown[str(key)] = suggestion(str(key), names, prefix="")
            continue
        where = f"{path}: {key}"
        if p.name in found.values:
            raise UsageError(f"{where}: the parameter {p.name} occurs twice", do="keep one of the two")
        found.values[p.name] = from_file(p, value, where)
        found.where[p.name] = where
    return found


def _load(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: this config file cannot be read", why=str(e)) from e
    content = read_json(text, path) if path.endswith(".json") else _yaml(text, path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a config file is one mapping of parameter names to values")
    return content


def _yaml(text: str, path: str) -> Any:
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """SafeLoader that refuses a mapping with the same key twice instead of keeping the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
                line = key_node.start_mark.line + 1
                if not isinstance(key, (str, int, float, bool)):
                    raise UsageError(f"{path}:{line}: a key must be a name")
                if key in seen:
                    raise UsageError(f"{path}:{line}: the key {key!r} occurs twice", do="keep one of the two")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader=UniqueKeys)
    except yaml.YAMLError as e:
        raise UsageError(f"{path}: not valid YAML", why=" ".join(str(e).split())) from e


def _env(content: Any, path: str) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, str | int | float) for v in content.values()):
        raise UsageError(f"{path}: {ENV_KEY} must map names of environment variables to texts or numbers")
    return {str(k): ("true" if v else "false") if isinstance(v, bool) else str(v) for k, v in content.items()}
