"""`ckpt_format zarr`: Megatron-Core 0.11's arrays, read to the last bit."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import MODELS, Foreign, write_zarr
from tiny_weights import random_weights

from megatron_swift.checkpoint.formats import open_tensors
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.zarr_folder import ZarrFolder
from megatron_swift.utils.errors import CheckpointError

KEY = "decoder.layers.self_attention.linear_proj.weight"


def made(model, dtype=torch.float32, **layout):
    return Foreign(MODELS[model], random_weights(tensor_specs(MODELS[model]), dtype), **layout)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "<f4"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "local": True}])
@pytest.mark.parametrize("model", MODELS)
def test_layouts(tmp_path, model, layout, dtype, name):
    foreign = made(model, dtype, **layout)
    assert not foreign.differences(write_zarr(tmp_path, foreign, name))


def test_chunks_that_end_beyond_the_array(tmp_path):
    """zarr's last chunk of an axis has the full size; what is beyond the end means nothing."""
    (tmp_path / "w").mkdir()
    described = {"chunks": [2, 4], "compressor": None, "dtype": "<f4", "fill_value": None, "filters": None}
    (tmp_path / "w" / ".zarray").write_text(json.dumps(described | {"order": "C", "shape": [3, 6], "zarr_format": 2}))
    whole = torch.full((4, 8), float("nan"))
    whole[:3, :6] = torch.arange(18.0).view(3, 6)
    for i in range(2):
        for j in range(2):
            part = whole[i * 2 : i * 2 + 2, j * 4 : j * 4 + 4].contiguous()
            (tmp_path / "w" / f"{i}.{j}").write_bytes(part.numpy().tobytes())
    files = ZarrFolder(tmp_path)
    assert torch.equal(files.read("w", (0, 0), (3, 6)), whole[:3, :6])
    assert torch.equal(files.read("w", (1, 3), (2, 2)), whole[1:3, 3:5])


@pytest.fixture
def folder(tmp_path):
    return write_zarr(tmp_path, made("tied", tp=2))


def test_a_chunk_that_is_missing_or_cut(folder):
    chunk = folder / KEY / "2.0.1"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"2\.0\.1 is damaged"):
        made("tied").differences(folder)
    chunk.unlink()
    with pytest.raises(CheckpointError, match=f"the chunks of {KEY} do not cover"):
        made("tied").differences(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compressor": {"id": "blosc"}}, "is compressed"),
        ({"order": "F"}, "is compressed"),
        ({"dtype": "|O"}, "cannot be read"),
        ({"zarr_format": 3}, "cannot be read"),
        ({"shape": [4, -1, 8]}, "cannot be read"),
        ({"chunks": [1, 0, 8]}, "cannot be read"),
        ({"chunks": [1]}, "cannot be read"),
        ({"shape": None}, "cannot be read"),
        ({"dimension_separator": "/../"}, "cannot be read"),
    ],
)
def test_arrays_of_another_make(folder, change, words):
    path = folder / KEY / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        made("tied").differences(folder)


def test_the_format_is_found_out(folder):
    assert isinstance(open_tensors(folder, made("tied").specs, num_layers=4), ZarrFolder)
