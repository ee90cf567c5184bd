"""Which checkpoint is whole, and what is said of those that are not."""

from __future__ import annotations

import logging

import pytest

from megatron_swift.checkpoint.manifest import MANIFEST, sum_file, write_manifest
from megatron_swift.checkpoint.ranks import single
from megatron_swift.checkpoint.verify import failure_of, first_whole
from megatron_swift.utils.errors import CheckpointError


class _Kept(logging.Handler):
    """The package's messages, whatever other tests have made of its logger and pytest's."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def kept(monkeypatch):
    handler = _Kept()
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "handlers", [handler])
    return handler.records


@pytest.fixture
def folders(tmp_path):
    """Three checkpoints, newest first."""
    found = [tmp_path / f"iter_000000{i}" for i in (3, 2, 1)]
    for folder in found:
        folder.mkdir()
        (folder / "state.json").write_text(folder.name)
        write_manifest(folder, {"state.json": sum_file(folder / "state.json")})
    return found


def test_the_first_is_taken(folders, kept):
    assert first_whole(folders, single()) == folders[0] and not kept


def test_falling_back_is_said_once_and_loudly(folders, kept):
    (folders[0] / "state.json").write_text("iter_0000004")
    (folders[1] / MANIFEST).unlink()
    assert first_whole(folders, single()) == folders[2]
    (record,) = kept
    assert record.levelno == logging.ERROR
    assert "iter_0000003/state.json is damaged" in record.getMessage() and "FALLING BACK" in record.getMessage()


def test_none_is_whole(folders):
    for folder in folders:
        (folder / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="iter_0000003") as error:
        first_whole(folders, single())
    assert "iter_0000002, iter_0000001" in error.value.why


def test_without_a_manifest(tmp_path, folders):
    """Megatron's own passes; ours has lost it."""
    (folders[0] / MANIFEST).unlink()
    assert "manifest.json is missing" in str(failure_of(folders[0], single()))
    (folders[0] / "state.json").unlink()
    assert failure_of(folders[0], single()) is None
    assert "is missing" in str(failure_of(tmp_path / "none", single()))
