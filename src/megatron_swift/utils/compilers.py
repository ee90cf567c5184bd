"""Whether torch.compile finds what it needs on this machine, as far as that can be known without torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def why_no_compiler(*, gpu: bool, env: Mapping[str, str] = os.environ, include: str | None = None) -> str:
    """What is missing, and what to install, for code that torch compiles for a GPU or for the CPU; "" where nothing is.

    For a CPU inductor writes C++ (variable CXX, else g++), for a GPU Triton a launcher in C (CC, else gcc or clang); both include Python.h.
    include : the folder of Python's headers, where it is not this Python's.
    """
    variable, names = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("g++",))
    if env.get(variable):
        names = (env[variable].split()[0],)
    if not any(shutil.which(name, path=env.get("PATH")) for name in names):
        language, package = ("C", "gcc") if gpu else ("C++", "g++")
        return (
            f"torch needs a {language} compiler for it, and there is no {' or '.join(names)}: install one "
            f"(`apt install {package}`), or name it by the variable {variable}"
        )
    headers = Path(include or sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"torch needs Python's headers for it, and there is no {headers / 'Python.h'}: `apt install python3-dev`"
    return ""
