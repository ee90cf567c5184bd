"""Python files of the user's own that add data sets, templates and model families."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from megatron_swift.data.messages import RowError
from megatron_swift.data.registry import Fixup, Identity, Registered, Row, Subset
from megatron_swift.utils.errors import UsageError

NAMES = ("DATASETS", "TEMPLATES", "FAMILIES")


class Plugins(NamedTuple):
    """What the files define, in the order of the files: the items of their lists DATASETS, TEMPLATES and FAMILIES.

    datasets    : checked and ready to be sent to another process.
    templates   : `data.template.Template` objects; who uses them checks them.
    families    : as `models.families` takes them; who uses them checks them.
    fingerprint : changes when a file's text does; "" without files.
    """

    datasets: tuple[Registered, ...] = ()
    templates: tuple[Any, ...] = ()
    families: tuple[Any, ...] = ()
    fingerprint: str = ""


def load_plugins(paths: Sequence[str], *, flag: str = "--custom_register_path") -> Plugins:
    """Run each file once in this process and collect its lists. This runs the user's code: name only files you trust.

    A file may import modules that lie beside it. UsageError for a file that is absent, fails or defines none of the lists.
    """
    found: dict[str, list[Any]] = {name: [] for name in NAMES}
    texts = hashlib.blake2b(digest_size=8)
    for given in paths:
        path = Path(given).expanduser().resolve()
        if not path.is_file():
            raise UsageError(f"{flag} {given} is not a file", do="give the path of a Python file")
        module = _load(path, f"{flag} {given}")
        texts.update(path.read_bytes())
        lists = {name: module.__dict__[name] for name in NAMES if name in module.__dict__}
        if not lists:
            raise UsageError(f"{flag} {given} defines nothing", do=f"give it a list named {' or '.join(NAMES)}")
        for name, items in lists.items():
            if not isinstance(items, (list, tuple)):
                raise UsageError(f"{flag} {given}: {name} must be a list, not {type(items).__name__}")
            found[name] += _datasets(items, path, f"{flag} {given}") if name == "DATASETS" else items
    fingerprint = texts.hexdigest() if paths else ""
    datasets, templates, families = (tuple(found[name]) for name in NAMES)
    return Plugins(datasets, templates, families, fingerprint)


class FromFile:
    """A user's fixup that finds itself again, by its file and place, in a process that it is sent to."""

    def __init__(self, path: Path, dataset: int, subset: int, fixup: Fixup) -> None:
        self.place = (path, dataset, subset)
        self._fixup: Fixup | None = fixup

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_fixup": None}

    def __call__(self, row: Row, identity: Identity) -> Row | None:
        """What the user's function returns; RowError where it fails."""
        if self._fixup is None:
            path, dataset, subset = self.place
            self._fixup = _load(path, str(path)).DATASETS[dataset].subsets[subset].fixup
        try:
            fixed = self._fixup(row, identity)
        except RowError:
            raise
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            detail = f"{type(error).__name__}: {error} ({self.place[0]}:{line})"
            raise RowError("the data set's fixup failed", detail) from error
        if fixed is not None and not isinstance(fixed, dict):
            raise RowError("the data set's fixup failed", f"it returned {type(fixed).__name__}, not a dict or None")
        return fixed


def _datasets(items: Sequence[Any], path: Path, where: str) -> list[Registered]:
    fingerprint = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    datasets = []
    for number, entry in enumerate(items):
        if not isinstance(entry, Registered) or not entry.names:
            raise UsageError(f"{where}: item {number} of DATASETS is not a Registered data set with a name")
        subsets: list[Subset] = [
            replace(subset, fixup=FromFile(path, number, index, subset.fixup))
            for index, subset in enumerate(entry.subsets)
        ]
        place = str(path.parent / Path(entry.path).expanduser()) if entry.path else ""
        datasets.append(replace(entry, path=place, subsets=tuple(subsets), fingerprint=f"{fingerprint}.{number}"))
    return datasets


@lru_cache(maxsize=64)
def _load(path: Path, where: str) -> ModuleType:
    """The module of a file, run once per process."""
    name = f"megatron_swift_plugin_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{where} is not a Python file", do="give the path of a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # so that it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        raise UsageError(f"{where} fails in line {line}", why=f"{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
