"""Hashes of files: of their content, and not computed again while a file is the same one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_swift.data import stamps
from megatron_swift.data.stamps import hash_files
from megatron_swift.utils.errors import DataError


def write(path: Path, text: str, *, age: float = 60) -> Path:
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


@pytest.fixture
def later(monkeypatch):
    """An hour has passed: files written now are long settled."""
    now = time.time_ns
    monkeypatch.setattr(stamps.time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are hashed."""
    names: list[str] = []
    digest = stamps.hashlib.file_digest

    def note(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(stamps.hashlib, "file_digest", note)
    return names


def test_hash_follows_content_and_order(tmp_path):
    a, b, copy = (write(tmp_path / name, text) for name, text in (("a", "1"), ("b", "2"), ("c", "1")))
    assert hash_files([a]) == hash_files([copy]) != hash_files([b])
    assert hash_files([a, b]) != hash_files([b, a])
    with pytest.raises(DataError, match="cannot be read"):
        hash_files([tmp_path / "gone"])


def test_only_changed_files_are_read_again(tmp_path, read, later):
    a, b = write(tmp_path / "a", "1"), write(tmp_path / "b", "2")
    first = hash_files([a, b], remembered=tmp_path / "memory")
    assert read == ["a", "b"]
    assert hash_files([a, b], remembered=tmp_path / "memory") == first == hash_files([a, b])
    assert read == ["a", "b", "a", "b"]  # the last call has no memory
    del read[:]
    write(b, "3", age=60)  # of the same size, and dated as before
    os.utime(b, ns=(a.stat().st_atime_ns, a.stat().st_mtime_ns))
    again = hash_files([a, b], remembered=tmp_path / "memory")
    assert read == ["b"]
    assert again == hash_files([a, b]) != first


def test_a_file_just_written_is_not_trusted(tmp_path, read):
    a = write(tmp_path / "a", "1", age=0)
    hash_files([a], remembered=tmp_path / "memory")
    hash_files([a], remembered=tmp_path / "memory")
    assert read == ["a", "a"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3', '{"x": ["y"]}'])
def test_a_spoilt_memory_costs_time_only(tmp_path, read, later, text):
    a = write(tmp_path / "a", "1")
    first = hash_files([a], remembered=tmp_path / "memory")
    next((tmp_path / "memory").iterdir()).write_text(text)
    assert hash_files([a], remembered=tmp_path / "memory") == first
    assert read == ["a", "a"]


def test_an_unwritable_memory_costs_time_only(tmp_path, later):
    (tmp_path / "file").write_text("")
    a = write(tmp_path / "a", "1")
    assert hash_files([a], remembered=tmp_path / "file" / "memory") == hash_files([a])
