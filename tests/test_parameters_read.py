"""No parameter is accepted and ignored in silence: what is built is read somewhere outside its declaration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megatron_swift
from megatron_swift.args.commands import COMMANDS
from megatron_swift.args.data_params import TemplateParams
from megatron_swift.args.spec import params_of
from megatron_swift.commands.model_setup import MODEL_FIELDS, MOE_FIELDS

PACKAGE = Path(megatron_swift.__file__).parent
# Which files may read a command's arguments: the command's own, and what all share.
SHARED = (
    "args/rules.py",
    "args/moe_rules.py",
    "args/model_rules.py",
    "args/inherit.py",
    "commands/chat_template.py",
    "cli.py",
    "worker.py",
    "launch.py",
)
TRAINING = (
    "commands/setup.py",
    "commands/model_setup.py",
    "commands/train.py",
    "commands/engine_options.py",
    "commands/saving.py",
    "commands/resuming.py",
    "commands/run_data.py",
    "commands/run_folder.py",
    "args/stream_rules.py",
    "args/transformer_engine.py",
    *SHARED,
)
OWN = {
    "megatron sft": TRAINING,
    "megatron pt": ("args/indexed_rules.py", *TRAINING),
    "megatron preprocess": ("commands/preprocess.py", *TRAINING),
    "swift export": ("commands/export.py", *SHARED),
    "swift infer": ("commands/infer.py", *SHARED),
    "megatron data show": ("commands/data.py", "commands/setup.py", *SHARED),
}
# Read under another name than `args.<name>`, each in its file.
ELSEWHERE = {
    "ignore_args_error": "args/commands.py",
    "load_args": "args/inherit.py",
    "load_data_args": "args/inherit.py",
}
# What export is told of the template it does not use: it goes into the args.json that training and inference inherit from.
CARRIED = {"swift export": {*params_of(TemplateParams), "custom_register_path", "external_plugins"}}


def names_read(file: Path) -> set[str]:
    """Attributes read from something called args (`args`, `self.args`, `setup.args`), and the texts that a loop goes through.

    The latter only where the file calls getattr or looks into `given`: `for name in ("a", "b"): getattr(args, name)`.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    constants = {
        t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name == "args":
                found.add(node.attr)
    if "given" in found or any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr" for n in nodes):
        for loop in (n for n in nodes if isinstance(n, ast.For | ast.comprehension)):
            source = constants.get(loop.iter.id, loop.iter) if isinstance(loop.iter, ast.Name) else loop.iter
            found |= {n.value for n in ast.walk(source) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.prog)
def test_built_parameters_are_read(command):
    read = set().union(*(names_read(PACKAGE / file) for file in OWN[command.prog] if (PACKAGE / file).exists()))
    if "commands/setup.py" in OWN[command.prog]:
        read |= {*MODEL_FIELDS, *MOE_FIELDS}
    read |= CARRIED.get(command.prog, set()) | set(ELSEWHERE)
    ignored = sorted(name for name, param in params_of(command).items() if not param.status() and name not in read)
    assert not ignored, f"{command.prog} accepts these and never reads them: {', '.join(ignored)}"


@pytest.mark.parametrize(("name", "file"), ELSEWHERE.items())
def test_read_elsewhere(name, file):
    assert name in (PACKAGE / file).read_text(encoding="utf-8")


def test_the_search_can_fail(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "ONE = ('e',)\nTWO = ('f',)\nargs.a; setup.args.b; other.c; args.d = 1\n"
        "for name in ONE:\n    getattr(args, name)\nfor name in ('g', 'h'):\n    pass\nx = 'i'\n"
    )
    assert names_read(file) == {"a", "b", "e", "g", "h"}
    file.write_text("ONE = ('e',)\nargs.a\nfor name in ONE:\n    pass\n")
    assert names_read(file) == {"a"}
