"""What is missing for torch.compile is named, with what to install."""

from __future__ import annotations

import pytest

from megatron_swift.utils.compilers import why_no_compiler


@pytest.fixture
def place(tmp_path):
    """A folder of programs, and of Python's headers."""
    (tmp_path / "Python.h").touch()

    def add(name):
        (tmp_path / name).touch(mode=0o755)

    return tmp_path, add


@pytest.mark.parametrize(("gpu", "name"), [(False, "g++"), (True, "gcc"), (True, "clang")])
def test_a_compiler_of_the_right_language(place, gpu, name):
    folder, add = place
    env = {"PATH": str(folder)}
    missing = why_no_compiler(gpu=gpu, env=env, include=str(folder))
    assert ("apt install gcc" if gpu else "apt install g++") in missing and name in missing
    add(name)
    assert why_no_compiler(gpu=gpu, env=env, include=str(folder)) == ""
    assert why_no_compiler(gpu=not gpu, env=env, include=str(folder))


def test_a_compiler_named_by_the_environment(place):
    folder, add = place
    add("g++")
    env = {"PATH": str(folder), "CXX": "mine -m64", "CC": "other"}
    assert "no mine" in why_no_compiler(gpu=False, env=env, include=str(folder))
    assert "no other" in why_no_compiler(gpu=True, env=env, include=str(folder))
    add("mine")
    assert why_no_compiler(gpu=False, env=env, include=str(folder)) == ""


def test_python_headers(place, tmp_path):
    folder, add = place
    add("g++")
    assert "python3-dev" in why_no_compiler(gpu=False, env={"PATH": str(folder)}, include=str(tmp_path / "none"))
