"""Imports go downwards only, third-party packages stay where they belong, and a command line is parsed without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "megatron_swift"
# High to low. Packages of one row do not import each other; those of the top row (one command line program) may.
ROWS = (
    ("cli", "launch", "worker"),
    ("commands",),
    ("train", "infer"),
    ("parallel", "checkpoint"),
    ("models", "data"),
    ("kernels",),
    ("args",),
    ("utils",),
)
HEIGHT = {package: -row for row, packages in enumerate(ROWS) for package in packages}
# The first match decides: part of the package -> what it may import besides the standard library and itself.
THIRD_PARTY = (
    ("data.loader", {"numpy", "torch"}),
    ("data.tokenizer", {"tokenizers", "jinja2", "transformers"}),
    ("data.hub", {"huggingface_hub", "modelscope", "yaml"}),
    ("data.readers", {"numpy", "pyarrow"}),
    ("data.histogram", {"numpy", "matplotlib"}),
    ("data", {"numpy", "tokenizers", "jinja2"}),
    ("args", {"yaml"}),
    ("utils", {"huggingface_hub", "modelscope"}),
    ("models.config", set()),
    ("models.families", set()),
    ("models", {"torch"}),
    ("kernels.fused", {"torch", "triton"}),
    ("kernels.cudnn_ragged", {"torch", "cudnn"}),
    ("kernels", {"torch"}),
    ("parallel", {"torch", "numpy"}),
    ("checkpoint.checksum", {"numpy"}),
    ("checkpoint", {"torch", "safetensors"}),
    ("train", {"torch", "numpy", "matplotlib"}),
    ("infer", {"torch", "numpy"}),
    ("commands", {"torch", "numpy"}),
    ("cli", set()),
    ("worker", set()),
    ("launch", {"torch"}),
)
# Optional, or slow to import: only inside the function that needs them.
LAZY = {"transformers", "yaml", "huggingface_hub", "modelscope", "matplotlib", "pyarrow", "cudnn"}
DISTRIBUTED = ("parallel", "checkpoint", "launch")


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """(line, module imported, whether at the top level) of every import, however deep."""
    top = set(tree.body) if isinstance(tree, ast.Module) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            found = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{found}.{alias.name}", node in top


def fault(module: str, imported: str, at_top: bool) -> str:
    """Why `module` (below the package) may not import `imported`; "" when it may."""
    part, target = module.split(".")[0], imported.split(".")
    if target[0] == PACKAGE:
        if len(target) < 2 or target[1] == part or target[1] not in {*HEIGHT, "testing"}:
            return ""
        if target[1] == "testing":
            return "testing is for tests"
        if HEIGHT[target[1]] == HEIGHT[part] != 0:
            return f"{part} and {target[1]} are of one row"
        if HEIGHT[target[1]] > HEIGHT[part]:
            return f"{target[1]} lies above {part}"
        if target[1] == "args" and HEIGHT[part] < HEIGHT["commands"]:
            return "only commands see argument objects"
        return ""
    if target[0] in sys.stdlib_module_names:
        return ""
    allowed = next(names for prefix, names in THIRD_PARTY if f"{module}.".startswith(f"{prefix}."))
    if target[0] not in allowed:
        return f"{module} does without {target[0]}"
    if at_top and target[0] in LAZY:
        return f"{target[0]} is imported inside the function that needs it"
    if target[:2] == ["torch", "distributed"] and part not in DISTRIBUTED:
        return f"{part} does not know that there are ranks"
    return ""


def faults_of(source: str, module: str, where: str, *, is_package: bool = False) -> list[str]:
    found = imports(ast.parse(source), f"{PACKAGE}.{module}", is_package=is_package)
    return [f"{where}:{line}: imports {name}: {why}" for line, name, top in found if (why := fault(module, name, top))]


def test_imports_go_downwards():
    faults: list[str] = []
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE / PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if module not in ("", "testing"):
            faults += faults_of(path.read_text(encoding="utf-8"), module, str(path), is_package=is_package)
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("models.decoder", "from megatron_swift.parallel.mesh import Mesh"),
        ("models.decoder", "from megatron_swift import parallel"),
        ("models.decoder", "from ..train import step"),
        ("models.decoder", "from megatron_swift.data.types import Batch"),
        ("train.loop", "import megatron_swift.infer.engine"),
        ("parallel.engine", "def f():\n    from megatron_swift.checkpoint.dcp import Piece"),
        ("data.types", "from megatron_swift.testing import run_ranks"),
        ("data.prepare", "from megatron_swift.args.commands import parse"),
        ("data.packing", "import torch"),
        ("models.config", "def f():\n    import torch"),
        ("models.families.qwen2", "import numpy"),
        ("models.layers", "import torch.distributed as dist"),
        ("kernels.attention", "from torch import distributed"),
        ("data.tokenizer", "import transformers"),
        ("data.templates", "def f():\n    import transformers"),
        ("args.spec", "import numpy"),
        ("cli", "def f():\n    import torch"),
    ],
)
def test_a_wrong_import_is_found(module, line):
    assert faults_of(line, module, "x.py")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("parallel.engine", "from megatron_swift.data.types import Batch"),
        ("models.decoder", "from megatron_swift.kernels.attention import Segments"),
        ("models.decoder", "from .config import ModelConfig"),
        ("cli", "from megatron_swift.launch import launch"),
        ("data.tokenizer", "def f():\n    from transformers import AutoTokenizer"),
    ],
)
def test_a_right_import_passes(module, line):
    assert not faults_of(line, module, "x.py")


@pytest.mark.parametrize("module", ["cli", "worker", "models.families", "data.prepare", "args.rules"])
def test_no_torch_before_it_is_needed(module):
    code = f"import {PACKAGE}.{module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
