"""Files written as a stream, and folders opened by slices."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_swift.checkpoint.manifest import sum_file
from megatron_swift.checkpoint.safetensors_io import CODES, INDEX, SafetensorsFolder, write_safetensors
from megatron_swift.utils.errors import CheckpointError

DTYPES = sorted(CODES, key=str)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.tuples(SHAPES, st.sampled_from(DTYPES))))
@settings(max_examples=60, deadline=None)
def test_library_reads_what_we_write(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    values = {name: (torch.rand(shape) * 200).to(dtype) for name, (shape, dtype) in tensors.items()}

    def read(name):
        value = values[name]
        return [value] if value.ndim == 0 else value.split(1)  # in parts

    entry = write_safetensors(path, {n: (v.dtype, tuple(v.shape)) for n, v in values.items()}, read)
    assert sum_file(path) == entry
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    read = load_file(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)


def test_written_one_by_one_in_order(tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return [torch.ones(2, 3).T]  # not contiguous

    write_safetensors(tmp_path / "x", dict.fromkeys("cab", (torch.float32, (3, 2))), read)
    assert asked == ["c", "a", "b"]
    for wrong in ((torch.float32, (2, 4)), (torch.float16, (3, 2))):
        with pytest.raises(AssertionError):
            write_safetensors(tmp_path / "x", {"c": wrong}, read)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_is_read(tmp_path_factory, data):
    """Against the library's whole tensor."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    value = (torch.rand(shape) * 200).to(data.draw(st.sampled_from(DTYPES)))
    folder = tmp_path_factory.mktemp("box")
    save_file({"before": torch.ones(3), "value": value}, folder / "model.safetensors")
    index = tuple(
        slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))))
        for n in shape[: data.draw(st.integers(0, len(shape)))]
    )
    found = SafetensorsFolder(folder).slice("value")[index]
    assert found.dtype == value.dtype and torch.equal(found, value[index] if index else value)


def test_file_cut_while_open(tmp_path):
    save_file({"a": torch.ones(20)}, tmp_path / "model.safetensors")
    tensor = SafetensorsFolder(tmp_path).slice("a")
    (tmp_path / "model.safetensors").open("r+b").truncate(100)
    with pytest.raises(CheckpointError, match="ends too early"):
        tensor[(slice(0, 20),)]


def _forge(path, change):
    save_file({"a": torch.ones(20)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [21]}, "does not fit"),
        ({"shape": [-20]}, "does not fit"),
        ({"shape": ["20"]}, "does not fit"),
        ({"shape": 3}, "cannot be read"),
        ({"dtype": "F8_E4M3"}, "is stored as F8_E4M3"),
        ({"data_offsets": [0, 84]}, "behind its end"),
        ({"data_offsets": [-4, 76]}, "behind its end"),
        ({"data_offsets": None}, "cannot be read"),
    ],
)
def test_forged_header(tmp_path, change, words):
    _forge(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFolder(tmp_path).shape("a")


def _index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../other.safetensors"}, ["a", "outside the folder"]),
        ({"a": "/etc/passwd"}, ["a", "outside the folder"]),
        ({"a": ".."}, ["a", "outside the folder"]),
        ({"a": ""}, ["a", "outside the folder"]),
        ({"a": 7}, ["7", "does not exist"]),
        (["a"], ["not a safetensors index"]),
        (None, ["not a safetensors index"]),
        ({"a": "gone.safetensors"}, ["gone.safetensors", "does not exist"]),
        ({"b": "one.safetensors"}, ["one.safetensors", "b cannot be read"]),
        ({"a": "text.safetensors"}, ["text.safetensors", "cannot be read"]),
    ],
)
def test_bad_index(tmp_path, weight_map, words):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    _index(tmp_path, weight_map)

    def first_shape():
        folder = SafetensorsFolder(tmp_path)
        return folder.shape(next(iter(folder.file_of)))

    with pytest.raises(CheckpointError) as error:
        first_shape()
    for word in words:
        assert word in error.value.block()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"{", b'{"a": 1}', b"null"])
def test_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_truncated_file(tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(20)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        SafetensorsFolder(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors") as error:
        SafetensorsFolder(tmp_path)
    assert "pytorch_model.bin" in error.value.why and "code" in error.value.why
