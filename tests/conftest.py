"""For every test: one thread, no GPU, no network, a cache of its own, and the folder ../shared where it is there."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; the ranks of a test are forks, and share few cores
os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # the same on every machine; set it to a number for the tests that need CUDA
os.environ["HF_HUB_OFFLINE"] = "1"

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_SWIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared; for tests that carry the marker `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of `data` come last: their tokenizers and long rows fill this process, and to fork a rank takes 45 ms more for each GB."""
    items.sort(key=lambda item: Path(__file__).parent / "data" in item.path.parents)


def pytest_unconfigure() -> None:
    """An exit that hangs says where, and fails: a process or thread that was left behind has once held CI for an hour."""
    faulthandler.dump_traceback_later(120, exit=True)
