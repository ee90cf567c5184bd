"""Settings taken over from the args.json beside a checkpoint or model (`load_args`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.data_params import DataParams, TemplateParams
from megatron_swift.args.model_params import ModelSourceParams
from megatron_swift.args.spec import Arguments, Param, params_of, show
from megatron_swift.args.values import from_file
from megatron_swift.utils.errors import CheckpointError, UsageError
from megatron_swift.utils.log import get_logger

ARGS_JSON = "args.json"
SOURCES = ("model", "mcore_model", "load")
ALWAYS = ("use_chat_template",)  # a model trained on plain text must be used with plain text
# The last two run code, which an args.json that came with a model must not choose.
NEVER = (
    *("max_length", "hub_token", "load_args", "load_data_args", "ignore_args_error"),
    *("custom_register_path", "external_plugins"),
)

A = TypeVar("A", bound=Arguments)


class Inherited(NamedTuple):
    """The completed arguments, what was taken over by name, and the file that it came from (None: no file)."""

    args: Any
    values: dict[str, Any]
    source: Path | None

    def announce(self) -> None:
        """Log in one line what was taken over, if anything was."""
        if self.values:
            taken = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
            get_logger().info("from %s: %s", self.source, taken)


def inherit(args: A, *, warn: bool = True) -> Inherited:
    """`args` with each model and template setting that is None or an empty list filled from args.json.

    The file is the first one found in the folders of model, mcore_model and load. Data settings are filled only with
    load_data_args. `use_chat_template` is taken over even if it was given, except by training commands, which say by
    their name whether they train conversations or text; where the file's run did the other, its template settings are not
    taken over. CheckpointError for a file that cannot be read. A setting that this version cannot honour is left out with a
    warning (unless `warn` is False).
    """
    assert isinstance(args, ModelSourceParams)
    source = _find(args) if args.load_args else None
    if source is None:
        return Inherited(args, {}, None)
    stored = _read(source)
    taken: dict[str, Any] = {}
    wanted = _inheritable(with_data=args.load_data_args)
    if isinstance(args, TrainArguments) and stored.get("use_chat_template") not in (None, args.use_chat_template):
        wanted -= params_of(TemplateParams).keys()
    for name, p in params_of(type(args)).items():
        if name not in stored or name not in wanted:
            continue
        current, always = getattr(args, name), name in ALWAYS and not isinstance(args, TrainArguments)
        if current not in (None, []) and not always:
            continue
        value = _usable(p, stored[name], source, warn=warn)
        if value in (None, []) or value == current:
            continue
        if always and name in args.given and warn:
            get_logger().warning("--%s %s is replaced by %s from %s", name, show(current), show(value), source)
        taken[name] = value
    return Inherited(dataclasses.replace(args, **taken), taken, source)


def _find(args: Arguments) -> Path | None:
    for name in SOURCES:
        folder = getattr(args, name, None) if name in params_of(type(args)) else None
        if folder and (Path(folder) / ARGS_JSON).is_file():
            return Path(folder) / ARGS_JSON
    return None


def _inheritable(*, with_data: bool) -> set[str]:
    groups = [ModelSourceParams, TemplateParams] + ([DataParams] if with_data else [])
    return {name for group in groups for name in params_of(group)} - set(NEVER)


def _read(source: Path) -> dict[str, Any]:
    try:
        stored = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{source} cannot be read", why=str(e), do="mend or remove it, or use --load_args false"
        ) from e
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"{source} is not a JSON object of settings", do="mend or remove it, or use --load_args false"
        )
    return stored


def _usable(p: Param, value: Any, source: Path, *, warn: bool) -> Any:
    """The typed value, or None where there is none or this version cannot work with it."""
    if value is None:
        return None
    if p.kind.many and isinstance(value, list):
        value = [item for item in value if item is not None]  # ms-swift writes [null, null] for "not given"
    where = f"{source}: {p.name}"
    try:
        typed = from_file(p, value, where)
    except UsageError as e:
        raise CheckpointError(e.what, why=e.why, do="give the setting as a flag, or use --load_args false") from e
    try:
        p.verify(typed, where)
    except UsageError as e:
        if warn:
            get_logger().warning("not taken over: %s", e.what)
        return None
    return typed
