"""Sizes and habits of the source that ruff does not check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "megatron_swift"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OPEN_POINT = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_files_are_short_and_without_open_points(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 500, f"{name(path)} has {len(lines)} lines"
    found = [f"{name(path)}:{number}" for number, line in enumerate(lines, 1) if OPEN_POINT.search(line)]
    assert not found, f"an open point belongs in an issue: {found}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_modules_say_what_they_are_for_and_functions_fit_a_screen(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name(path)} has no docstring"
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{name(path)}:{f.lineno} {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60]
    assert not long, f"longer than 60 lines: {long}"


def test_the_walk_finds_the_package():
    assert len(SOURCES) > 50 and PACKAGE / "cli.py" in SOURCES
