"""Files of lines with a small index: every line that is not blank is a row, wherever the blocks and groups end."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data import lines
from megatron_swift.data.lines import LineFile
from megatron_swift.utils.errors import DataError


def expected(raw: bytes) -> list[tuple[int, bytes]]:
    numbered = enumerate(raw.split(b"\n"), 1)
    return [(number, line) for number, line in numbered if len(line) >= lines.BLANK or line.strip()]


def found(path: Path, file: LineFile) -> list[tuple[int, bytes]]:
    return [(int(file.where(at).removeprefix(f"{path}:")), file.read(at)) for at in range(len(file))]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b" ", b"\r", b"a", b"bcd", b"x" * 40, b" " * 70, b"\xff" * 9]), max_size=40),
    st.booleans(),
)
def test_lines(tmp_path_factory, parts, ended):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    raw = b"\n".join(parts) + b"\n" * ended
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", 16)
        patch.setattr(lines, "GROUP", 32)
        file = LineFile(path, bytes)
    assert found(path, file) == expected(raw)
    again = pickle.loads(pickle.dumps(file))
    for at in reversed(range(len(again))):
        assert again.read(at) == expected(raw)[at][1]


def test_the_index_is_small(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 200_000)
    file = LineFile(path, bytes)
    assert len(file) == 200_000
    assert len(file.groups.lines) == -(-2_200_000 // lines.GROUP)
    assert file.where(150_000) == f"{path}:150001"
    assert len(pickle.dumps(file)) < 3000


def test_a_long_line_does_not_draw_others_in(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n" + b"b" * (10 << 20) + b"\nc\n" + b"d" * (10 << 20))
    file = LineFile(path, len)
    assert [file.read(at) for at in range(4)] == [1, 10 << 20, 1, 10 << 20]
    assert file.where(3) == f"{path}:4"


def test_a_file_that_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n")
    file = LineFile(path, bytes)
    assert file.read(0) == b"a"
    with path.open("ab") as more:
        more.write(b"c\n")
    with pytest.raises(DataError, match="has changed while it was read"):
        file.read(1)
    fresh = LineFile(path, bytes)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        fresh.read(0)
