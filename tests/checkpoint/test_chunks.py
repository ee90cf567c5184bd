"""Rows of a tensor that torch.save wrote, whatever it wrote, in the middle of a file."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.checkpoint.chunks import read_rows
from megatron_swift.checkpoint.stored import long_axis


def saved(value: object, *, checksums: bool = True) -> bytes:
    buffer = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(value, buffer)
    torch.serialization.set_crc32_options(before)
    return buffer.getvalue()


def read(folder, data: bytes, tensor: torch.Tensor, rows: tuple[int, int], **kwargs) -> torch.Tensor:
    """With other bytes before and behind."""
    path = folder / "file"
    path.write_bytes(b"before" + data + b"behind")
    with open(path, "rb", buffering=0) as file:
        return read_rows(file, 6, len(data), dtype=tensor.dtype, size=tuple(tensor.shape), rows=rows, **kwargs)


def slice_of(tensor: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
    return tensor.narrow(long_axis(tuple(tensor.shape)), rows[0], rows[1] - rows[0]) if tensor.dim() else tensor


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    size = data.draw(st.lists(st.sampled_from([1, 1, 2, 3, 17]), min_size=0, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]))
    tensor = (torch.randn(size) * 100).to(dtype)
    length = size[long_axis(tuple(size))] if size else 1
    first = data.draw(st.integers(0, length - 1))
    rows = first, data.draw(st.integers(first + 1, length))
    content = saved(tensor, checksums=data.draw(st.booleans()))
    found = read(folder, content, tensor, rows)
    assert torch.equal(found, slice_of(tensor, rows))
    out = torch.zeros_like(found)
    assert read(folder, content, tensor, rows, out=out) is out and torch.equal(out, found)


MADE_OTHERWISE = {
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "a slice": torch.arange(12.0).view(4, 3)[1:3],
    "every other": torch.arange(12.0)[::2],
    "expanded": torch.arange(4.0).expand(3, 4),
    "a parameter": torch.nn.Parameter(torch.arange(12.0).view(4, 3)),
    "float8": torch.arange(8.0).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", MADE_OTHERWISE)
def test_tensors_that_are_not_all_of_their_storage(tmp_path, name):
    tensor = MADE_OTHERWISE[name]
    for rows in ((0, len(tensor)), (1, 2)):
        found = read(tmp_path, saved(tensor), tensor.data, rows)
        assert torch.equal(found.float(), tensor.data[rows[0] : rows[1]].float())


def test_the_old_format_of_torch(tmp_path):
    tensor, buffer = torch.randn(4, 3), io.BytesIO()
    torch.save(tensor, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(zipfile.BadZipFile):  # torch.distributed.checkpoint has never written it
        read(tmp_path, buffer.getvalue(), tensor, (0, 4))


@pytest.mark.parametrize(
    "other", [torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.float64), {"a": 1}, [torch.zeros(4, 3)]]
)
def test_something_else(tmp_path, other):
    with pytest.raises(ValueError, match="not the tensor that"):
        read(tmp_path, saved(other), torch.zeros(4, 3), (0, 4))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_gives_an_error_or_wrong_numbers_but_never_a_crash(tmp_path_factory, data):
    """The manifest finds what changes numbers only."""
    tensor = torch.arange(30.0).view(6, 5)
    content = bytearray(saved(tensor))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(content), len(content) // 2, 0]))
    try:
        found = read(tmp_path_factory.getbasetemp(), bytes(content[:cut]), tensor, (0, 6))
    except Exception:
        return
    assert found.shape == tensor.shape and found.dtype == tensor.dtype


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_the_archive_does_not_run(tmp_path):
    canary, tensor = tmp_path / "canary", torch.zeros(2, 2)
    content = saved([tensor, _Canary(canary)])
    with pytest.raises(pickle.UnpicklingError):
        read(tmp_path, content, tensor, (0, 2))
    assert not canary.exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert canary.exists(), "it would have been a real danger"
