"""torch.save's files, of anyone's: tensors as views of the file, everything else inert."""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.checkpoint.archive import Inert, Placed, attributes, read_archive
from megatron_swift.utils.errors import CheckpointError


class Backend(enum.Enum):
    FLASH = "flash"


class _Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def values():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": base,
        "view": base.t()[1:3, ::2],
        "half": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_tensors_and_plain_values(tmp_path):
    args = argparse.Namespace(num_layers=4, dtype=torch.bfloat16, backend=Backend.FLASH, rest=[1, (2, None)])
    torch.save({"args": args, "tensors": values(), "n": {3: "x"}, "set": {1}}, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    assert found["n"] == {3: "x"} and found["set"] == {1}
    for name, tensor in values().items():
        assert torch.equal(found["tensors"][name], tensor) and found["tensors"][name].dtype == tensor.dtype, name
    known = attributes(found["args"])
    assert (known["num_layers"], known["dtype"], known["rest"]) == (4, torch.bfloat16, [1, (2, None)])
    assert isinstance(known["backend"], Inert) and isinstance(found["args"], Inert)
    assert attributes({"no": "object"}) == attributes(None) == {}


def test_views_do_not_write(tmp_path):
    torch.save({"w": torch.zeros(4)}, tmp_path / "a.pt")
    read_archive(tmp_path / "a.pt")["w"].add_(1)
    assert torch.equal(read_archive(tmp_path / "a.pt")["w"], torch.zeros(4))


def test_where_tensors_lie(tmp_path):
    torch.save(values(), tmp_path / "a.pt")
    found, content = read_archive(tmp_path / "a.pt", placed=True), (tmp_path / "a.pt").read_bytes()
    place = found["plain"]
    assert isinstance(place, Placed) and place.shape == (4, 6)
    stored = torch.frombuffer(bytearray(content[place.start : place.start + 96]), dtype=place.dtype).view(4, 6)
    assert torch.equal(stored, values()["plain"])


def attacks(canary):
    command = f"touch {canary}"
    yield "system", _Call(os.system, command)
    yield "eval", _Call(eval, f"__import__('os').system({command!r})")
    yield "getattr", _Call(getattr, "", "join")
    yield "load", _Call(torch.load, str(canary))
    yield "nested", [{"x": (_Call(os.system, command),)}]


@pytest.mark.parametrize("name", [name for name, _ in attacks("x")])
def test_nothing_runs(tmp_path, name):
    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(2), "attack": dict(attacks(canary))[name]}, tmp_path / "a.pt")
    assert torch.equal(read_archive(tmp_path / "a.pt")["w"], torch.ones(2)) and not canary.exists()


def test_the_attack_would_work_without_the_guard(tmp_path):
    canary = tmp_path / "canary"
    torch.save(dict(attacks(canary))["system"], tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100, pickle.dumps({"a": 1})])
def test_no_archive(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no file of torch\.save"):
        read_archive(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        read_archive(tmp_path / "b.pt")


def test_the_old_format(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"is no file of torch\.save") as error:
        read_archive(tmp_path / "a.pt")
    assert "before 1.6" in error.value.why


def rewritten(path, content):
    """The file with another pickle."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path.with_name("b.pt"), "w") as other:
        for info in archive.infolist():
            mine = content if info.filename.endswith("data.pkl") else archive.read(info)
            other.writestr(info.filename, mine)
    return path.with_name("b.pt")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        # A gigabyte, for which Python's unpickler asks.
        (b"\x80\x02}r\x00\x00\x00\x04.", "puts something at place 67108864"),
        (b"\x80\x02}p67108864\n.", "puts something at place 67108864"),
        (b"\x80\x05\x96\x00\x00\x00\x40\x00\x00\x00\x00abc.", "expected 1073741824 bytes"),
        (b"\x80\x02}q\x00X\x03\x00\x00\x00ab", "expected 3 bytes"),
    ],
)
def test_sizes_without_content(tmp_path, content, why):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=why):
        read_archive(rewritten(tmp_path / "a.pt", content))


def test_a_damaged_directory(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(b"PK\6\7") + 16] = 9  # the number of disks
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no file of torch\.save"):
        read_archive(tmp_path / "a.pt")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits(tmp_path_factory, data):
    """Whatever bit flips: values, or a CheckpointError."""
    folder = tmp_path_factory.getbasetemp() / "archive"
    if not folder.exists():
        folder.mkdir()
        torch.save({"tensors": values(), "args": argparse.Namespace(a=1)}, folder / "good.pt")
    content = bytearray((folder / "good.pt").read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    (folder / "bad.pt").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        found = read_archive(folder / "bad.pt")  # of any type: the bit may be in what says that it is a dict
        tensors = found.get("tensors") if isinstance(found, dict) else None
        for value in tensors.values() if isinstance(tensors, dict) else ():
            assert not isinstance(value, torch.Tensor) or value.sum() is not None
