"""Small files replaced atomically, and errors of the disk named."""

from __future__ import annotations

import errno
import json
import os

import pytest

from megatron_swift.utils.errors import StorageError
from megatron_swift.utils.files import digest, storage_errors, write_json, write_text


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "EFBIG", "ENOTDIR", "EEXIST", "EISDIR"])
def test_errors_of_the_disk(tmp_path, name):
    number = getattr(errno, name)
    with pytest.raises(StorageError) as error, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert error.value.what == f"cannot write to {tmp_path}: {os.strerror(number)}" and error.value.exit_code == 9


@pytest.mark.parametrize("error", [OSError(errno.ECONNRESET, "reset"), ValueError("odd"), StorageError("inner")])
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as raised, storage_errors(tmp_path):
        raise error
    assert raised.value is error


def test_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_text(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="No space"):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "j", {"name": "名", "list": [1]})
    assert json.loads((tmp_path / "j").read_text()) == {"name": "名", "list": [1]}
    assert "名" in (tmp_path / "j").read_text(encoding="utf-8")


def test_digest(tmp_path):
    for name, content in (("a", b"x" * 10**6), ("b", b"x" * 10**6), ("c", b"x" * (10**6 - 1) + b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 32
