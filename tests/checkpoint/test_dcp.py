"""torch_dist folders: written in pieces by several ranks, read in boxes, and never a way to run code."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import config, pieces_of_rank, random_weights, rows_of_rank
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_swift.checkpoint.dcp import METADATA_JSON, DcpFolder, Piece, pieces_of, save_pieces
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import CheckpointError, StorageError

# hidden 8 and vocabulary 11: three ranks get rows 4, 4, 3 of one tensor and 3, 3, 2 of another; a norm of 2 rows leaves one empty
CFG = config(qk_layernorm=True, num_layers=3)
SPECS = tensor_specs(CFG)
WEIGHTS = random_weights(SPECS)


def _save(rank, folder, ranks, dtype):
    weights = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    if ranks > 1:
        dist.init_process_group("gloo")
    mine = pieces_of_rank(SPECS, weights, rank, ranks, num_layers=CFG.num_layers)
    save_pieces(folder, mine, distributed=ranks > 1)
    return sum(piece.read().numel() for piece in mine)


@pytest.fixture(scope="module", params=[(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)], ids=str)
def written(request, tmp_path_factory):
    """(folder, dtype) written by 1, 2 or 3 ranks."""
    ranks, dtype = request.param
    folder = tmp_path_factory.mktemp("dcp")
    counts = run_ranks(_save, ranks, folder, ranks, dtype)
    assert sum(counts) == sum(w.numel() for w in WEIGHTS.values())
    return folder, dtype


def _stacked():
    """Megatron's tensors: layers of one kind under one key, along a first axis."""
    found = {}
    for name, spec in SPECS.items():
        found.setdefault(spec.megatron_key, []).append(WEIGHTS[name])
    return {key: torch.stack(parts) if key.startswith("decoder.layers.") else parts[0] for key, parts in found.items()}


def test_split_of_the_test_is_uneven_and_empty():
    assert [rows_of_rank(2, rank, 3) for rank in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 2)]
    assert [rows_of_rank(11, rank, 3) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 11)]


def test_pieces_of_ranks_read_back(written):
    folder, dtype = written
    source = MegatronWeights(folder, SPECS, num_layers=CFG.num_layers)
    for name, spec in SPECS.items():
        whole = WEIGHTS[name].to(dtype)
        assert torch.equal(source.read(spec), whole)
        for start, stop in ((0, 0), (1, 2), (spec.shape[0] // 2, spec.shape[0])):
            assert torch.equal(source.read(spec, start, stop), whole[start:stop])


def test_names_and_shapes_are_megatrons(written):
    files = DcpFolder(written[0])
    assert {key: files.shape(key) for key in files.tensors} == {k: tuple(v.shape) for k, v in _stacked().items()}
    assert json.loads((written[0] / "metadata.json").read_text()) == METADATA_JSON


def test_torchs_own_reader(written):
    folder, dtype = written
    state = {key: torch.empty(value.shape, dtype=dtype) for key, value in _stacked().items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(state[key], value.to(dtype)) for key, value in _stacked().items())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_box(written, data):
    folder, dtype = written
    files, stacked = DcpFolder(folder), _stacked()
    key = data.draw(st.sampled_from(sorted(stacked)))
    low = [data.draw(st.integers(0, size)) for size in stacked[key].shape]
    high = [data.draw(st.integers(a, size)) for a, size in zip(low, stacked[key].shape, strict=True)]
    box = files.read(key, tuple(low), tuple(b - a for a, b in zip(low, high, strict=True)))
    assert torch.equal(box, stacked[key].to(dtype)[tuple(slice(*ends) for ends in zip(low, high, strict=True))])


def lazy_piece(spec, read):
    """A whole parameter of float32, fetched when it is written."""
    ((_, offset, size),) = spec.megatron_boxes(0, spec.shape[0])
    shape = spec.megatron_shape(CFG.num_layers)
    return Piece(spec.megatron_key, lambda: read().reshape(size), torch.float32, size, offset, shape)


def test_lazy_pieces_are_read_one_at_a_time(tmp_path, recwarn):
    asked = []

    def reader(name):
        return lambda: asked.append(name) or WEIGHTS[name]

    pieces = [lazy_piece(s, reader(n)) for n, s in SPECS.items()]
    assert not asked
    save_pieces(tmp_path, pieces, distributed=False, threads=3)
    assert sorted(asked) == sorted(SPECS)
    assert len(list(tmp_path.glob("*.distcp"))) == 3
    source = MegatronWeights(tmp_path, SPECS, num_layers=CFG.num_layers)
    assert all(torch.equal(source.read(spec), WEIGHTS[name]) for name, spec in SPECS.items())
    assert not [str(w.message) for w in recwarn if "torch.distributed is disabled" in str(w.message)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd"), StorageError("full")])
def test_what_a_piece_raises_comes_out(tmp_path, error):
    """And not torch's CheckpointException, which is no Exception."""

    def fail():
        raise error

    with pytest.raises(type(error), match=str(error.args[-1]) or "full"):
        save_pieces(tmp_path, [lazy_piece(SPECS["output_layer.weight"], fail)], distributed=False)


# What does not fit


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (CFG.replace(qk_layernorm=False), ["unexpected: ['decoder.layers.self_attention.k_layernorm.weight'"]),
        (CFG.replace(tied_embeddings=True), ["unexpected: ['output_layer.weight']"]),
        (CFG.replace(num_layers=2), ["(3, ", "needs (2, "]),
        (CFG.replace(vocab_size=12), ["embedding.word_embeddings.weight", "(11, 8)", "(12, 8)"]),
    ],
)
def test_another_model(tmp_path, cfg, words):
    _save(0, tmp_path, 1, torch.float32)
    with pytest.raises(CheckpointError) as error:
        MegatronWeights(tmp_path, tensor_specs(cfg), num_layers=cfg.num_layers)
    for word in words:
        assert word in error.value.block()


def test_missing_weights(tmp_path):
    kept = [p for p in pieces_of_rank(SPECS, WEIGHTS, 0, 1, num_layers=3) if "fc2" not in p.key]
    save_pieces(tmp_path, kept, distributed=False)
    with pytest.raises(CheckpointError, match="do not fit") as error:
        MegatronWeights(tmp_path, SPECS, num_layers=3)
    assert "missing: ['decoder.layers.mlp.linear_fc2.weight']" in error.value.why
    with pytest.raises(CheckpointError, match=r"holds no decoder\.layers\.mlp\.linear_fc2"):
        DcpFolder(tmp_path).read("decoder.layers.mlp.linear_fc2.weight", (0, 0, 0), (1, 1, 1))


def test_hole_in_a_tensor(tmp_path):
    """One layer's rows were never written: they are not served as whatever lay in memory."""
    spec = SPECS["output_layer.weight"]
    save_pieces(tmp_path, pieces_of(spec, WEIGHTS[spec.name][:4], 0, num_layers=3), distributed=False)
    files = DcpFolder(tmp_path)
    assert torch.equal(files.read(spec.name, (0, 0), (4, 8)), WEIGHTS[spec.name][:4])
    with pytest.raises(CheckpointError, match="do not cover"):
        files.read(spec.name, (0, 0), (5, 8))


# Damage and malice


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "iter_0000001"
    path.mkdir()
    _save(0, path, 1, torch.float32)
    return path


def _read_all(folder):
    source = MegatronWeights(folder, SPECS, num_layers=CFG.num_layers)
    return {name: source.read(spec) for name, spec in SPECS.items()}


def test_no_metadata(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        DcpFolder(tmp_path)


def test_missing_and_cut_files(folder):
    (path,) = folder.glob("*.distcp")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged at "):
            _read_all(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        _read_all(folder)


class _Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __call__(self):
        """Pickle wants functions to be callable."""

    def __reduce__(self):
        return self.call


class _Named:
    """Pickled as `from module import name`, whether that exists here or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        """Pickle wants functions to be callable."""


class _Pickler(pickle._Pickler):
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_named(self, thing):
        self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())

    dispatch[_Named] = save_named


def _metadata(folder):
    """Our own file, as torch reads it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def _forge(folder, value):
    with open(folder / ".metadata", "wb") as file:
        _Pickler(file, protocol=2).dump(value)


def _attacks(canary):
    command = f"touch {canary}"
    yield "system", _Call(os.system, command)
    yield "eval", _Call(eval, f"__import__('os').system({command!r})")
    yield "exec", _Call(exec, f"import os; os.system({command!r})")
    chain = _Call(getattr, _Named("os", "path"), "os")
    yield "getattr chain", _Call(_Call(getattr, chain, "system"), command)
    yield "getattr of a safe class", _Call(getattr, Metadata, "__init__")
    yield "getattr of torch", _Call(_Call(getattr, _Named("torch", "Size"), "__subclasses__"))
    yield "getattr by enum's name", _Call(getattr, _Named("os", "_MEM_FORMAT_ENCODING"), "system")
    yield "dotted", _Call(_Named("torch.distributed.checkpoint.metadata", "os.system"), command)
    yield "operator", _Call(_Call(_Named("operator", "attrgetter"), "system"), os)
    yield "torch.load", _Call(_Named("torch", "load"), str(canary))
    yield "numpy", _Call(_Named("numpy.testing._private.utils", "runstring"), f"open({str(canary)!r}, 'w')", {})


@pytest.mark.parametrize("name", [name for name, _ in _attacks("x")])
def test_forged_metadata_runs_nothing(folder, tmp_path, name):
    canary = tmp_path / "canary"
    attack = dict(_attacks(canary))[name]
    good = _metadata(folder)
    if name == "operator":
        attack = _Call(_Named("operator", "methodcaller"), "system", f"touch {canary}")
    good.planner_data = attack  # where a foreign writer may put anything
    _forge(folder, attack)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        DcpFolder(folder)
    assert not canary.exists()
    _forge(folder, good)
    with contextlib.suppress(CheckpointError):  # an inert stand-in where nobody looks does no harm
        _read_all(folder)
    assert not canary.exists()


def test_the_attacks_would_work_without_the_guard(tmp_path):
    """The forged file is a real danger: plain pickle falls for it."""
    canary = tmp_path / "canary"
    _forge(tmp_path, _Call(os.system, f"touch {canary}"))
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert canary.exists()


def test_metadata_that_would_take_all_memory(folder):
    """One flipped bit, and Python's unpickler asks for 16 bytes times the place that something is put at."""
    (folder / ".metadata").write_bytes(b"\x80\x02}r\x00\x00\x00\x04.")
    with pytest.raises(CheckpointError, match=r"cannot be read.*puts something at place 67108864"):
        DcpFolder(folder)


def test_megatrons_own_classes_are_no_obstacle(folder):
    """core_r0.11.0 pickles its save plans along."""
    good = _metadata(folder)
    good.all_local_plans = [_Call(_Named("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"), 1, 2)]
    good.mcore_data = {"decoder.layers.mlp.linear_fc1.weight": {}}
    _forge(folder, good)
    assert torch.equal(_read_all(folder)["output_layer.weight"], WEIGHTS["output_layer.weight"])


@pytest.mark.parametrize("path", ["../secret.distcp", "/etc/passwd", "sub/x.distcp", "..", ""])
def test_metadata_that_points_outside(folder, path):
    metadata = _metadata(folder)
    (folder.parent / "secret.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    _forge(folder, metadata)
    with pytest.raises(CheckpointError, match="outside the folder"):
        _read_all(folder)


def test_a_pickle_in_the_place_of_a_tensor(folder, tmp_path):
    canary, path = tmp_path / "canary", folder / "__0_0.distcp"
    metadata = _metadata(folder)
    torch.save(_Call(os.system, f"touch {canary}"), path)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, path.stat().st_size
    _forge(folder, metadata)
    with pytest.raises(CheckpointError, match="is damaged at"):
        _read_all(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", [None, 1, {}, [], Metadata(state_dict_metadata=None), Metadata({}, storage_data=None), "x" * 9]
)
def test_pickles_of_something_else(folder, value):
    _forge(folder, value)
    with pytest.raises(CheckpointError):
        _read_all(folder)


def test_storage_that_is_not_listed(folder):
    metadata = _metadata(folder)
    metadata.storage_data = {}
    _forge(folder, metadata)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        _read_all(folder)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_of_metadata(tmp_path_factory, data):
    """Whatever bit flips: weights or a CheckpointError, no other exception. (That it flipped, the manifest says.)"""
    source = tmp_path_factory.getbasetemp() / "flip"
    if not source.exists():
        source.mkdir()
        _save(0, source, 1, torch.float32)
        (source / "good").write_bytes((source / ".metadata").read_bytes())
    content = bytearray((source / "good").read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    (source / ".metadata").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        _read_all(source)


def test_tensor_metadata_is_what_counts(folder):
    """Shapes that lie are found before anything is read."""
    metadata = _metadata(folder)
    for value in metadata.state_dict_metadata.values():
        assert isinstance(value, TensorStorageMetadata)
        value.size = torch.Size([1 << 40, *value.size[1:]])
    _forge(folder, metadata)
    with pytest.raises(CheckpointError, match="has shape"):
        _read_all(folder)
