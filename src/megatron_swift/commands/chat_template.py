"""The arguments about templates as the template to encode with. Training, inference and `data show` share this."""

from __future__ import annotations

import datetime

from megatron_swift.args.commands import DataShowArguments, ExportArguments, InferArguments, TrainArguments
from megatron_swift.data.plugins import load_plugins
from megatron_swift.data.template import Template
from megatron_swift.data.templates import JINJA, load_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.models.families import Family
from megatron_swift.utils.errors import UsageError

Asking = TrainArguments | InferArguments | DataShowArguments


def asked_template(args: Asking) -> str | None:
    """The name of the template that the arguments ask for, None where the model's folder has to tell."""
    if not args.use_chat_template:
        return "generation"
    if args.template_backend != JINJA:
        return args.template
    if "template" in args.given and args.template != JINJA:
        raise UsageError(
            f"--template {args.template} does not go with --template_backend jinja",
            why="that takes the model's own template",
            do="leave one of them out",
        )
    return JINJA


def why_template(args: Asking, reason: str) -> str:
    """Why that template was taken, in the user's own flags; `reason`: what the model families say, who know its name alone."""
    if not args.use_chat_template:
        return "use_chat_template is false"
    return "as told by --template_backend" if args.template_backend == JINJA else reason


def user_families(args: Asking | ExportArguments) -> tuple[Family, ...]:
    """The model families that the user's own files add."""
    paths = [*args.custom_register_path, *args.external_plugins]
    families = load_plugins(paths).families
    for one in families:
        if not isinstance(one, Family):
            raise UsageError(
                f"--custom_register_path {' '.join(paths)}: FAMILIES holds {one!r}",
                do="fill it with objects of megatron_swift.models.families.Family",
            )
    return families


def chosen_template(args: Asking, name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name, with what the arguments say about it."""
    paths = [*args.custom_register_path, *args.external_plugins]
    plugins = load_plugins(paths)
    for one in plugins.templates:
        if not isinstance(one, Template):
            raise UsageError(
                f"--custom_register_path {' '.join(paths)}: TEMPLATES holds {one!r}",
                do="fill it with objects of megatron_swift.data.template.Template",
            )
    plain = not args.use_chat_template
    return load_template(
        name,
        tokenizer,
        date=datetime.date.fromisoformat(args.template_date) if args.template_date else None,
        enable_thinking=None if plain else args.enable_thinking,
        agent_template=None if plain else args.agent_template,
        registered={one.name: one for one in plugins.templates},
    )
