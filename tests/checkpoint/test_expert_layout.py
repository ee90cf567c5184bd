"""Experts on disk: Hugging Face folders with a tensor per expert or one for all, and Megatron-Core's axis of experts."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_weights import config_of, pieces_of_rank, random_weights

from megatron_swift.checkpoint.dcp import DcpFolder, save_pieces
from megatron_swift.checkpoint.huggingface import (
    HuggingFaceWeights,
    has_stacked_experts,
    keeps_experts_stacked,
    write_hugging_face,
)
from megatron_swift.checkpoint.layout import TensorSpec, hugging_face_tensors, tensor_specs, whole_blocks
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.models.decoder import build_decoder
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError

ONE_FILE = 5_000_000_000
MODELS = {
    "qwen2_moe": {"layers": 3, "mlp_only_layers": [1]},  # dense and sparse layers, a shared expert
    "qwen3_moe": {"layers": 2, "num_experts": 6, "moe_intermediate_size": 12},
    "mixtral": {"layers": 2, "num_local_experts": 3},
}
EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
KINDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def stack(source, target):
    """The folder with the experts of a layer in one tensor, as transformers 5 holds them: [E, 2F, H] and [E, H, F]."""
    shutil.copytree(source, target)
    tensors, experts = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if match := EXPERT.fullmatch(name):
            layer, number, kind = match.groups()
            experts[layer, int(number), KINDS.get(kind, kind)] = tensor
        else:
            tensors[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    for layer in {layer for layer, _, _ in experts}:
        count = 1 + max(number for name, number, _ in experts if name == layer)
        both = [torch.cat([experts[layer, e, "gate_proj"], experts[layer, e, "up_proj"]]) for e in range(count)]
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack([experts[layer, e, "down_proj"] for e in range(count)])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module", params=sorted(MODELS))
def folders(request, tmp_path_factory):
    """(one tensor per expert, one for all)."""
    place = tmp_path_factory.mktemp("experts")
    plain = make_tiny_model(
        place / "plain", family=request.param, tied=False, dtype="bfloat16", **MODELS[request.param]
    )
    return plain, stack(plain, place / "stacked")


def test_which_layout_a_folder_has(folders, tmp_path):
    assert [keeps_experts_stacked(folder) for folder in folders] == [False, True]
    assert not keeps_experts_stacked(tmp_path)
    assert not has_stacked_experts(["model.layers.0.mlp.gate_up_proj.weight"])


def test_the_table_is_the_model_and_both_folders(folders):
    cfg = config_of(folders[0])
    model = build_decoder(cfg, dtype=torch.float32, device=torch.device("meta"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for folder, stacked in zip(folders, (False, True), strict=True):
        specs = tensor_specs(cfg, stacked_experts=stacked)
        assert {name: spec.shape for name, spec in specs.items()} == shapes
        theirs = {name: tensor.shape for name, tensor in hugging_face_tensors(specs.values()).items()}
        assert theirs == {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}


def test_both_layouts_hold_the_same_weights(folders):
    """And an expert's rows are its gate rows, then its up rows."""
    cfg = config_of(folders[0])
    plain, stacked = (HuggingFaceWeights(folder, cfg) for folder in folders)
    for name, spec in tensor_specs(cfg).items():
        assert torch.equal(plain.read(spec), stacked.read(spec)), name
    layer = cfg.moe.sparse_layers.index(True)
    spec, inner = tensor_specs(cfg)[f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight"], cfg.moe.ffn_hidden_size
    theirs = load_file(folders[1] / "model.safetensors")[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
    assert torch.equal(plain.read(spec, 2 * inner, 4 * inner), theirs[1])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_slices_are_those_of_the_whole(folders, data):
    """Rows that begin and end inside an expert, cross one or several, and columns."""
    cfg = config_of(folders[0])
    source = HuggingFaceWeights(folders[data.draw(st.integers(0, 1))], cfg)
    names = sorted(name for name in source.specs if ".mlp.experts." in name)
    spec = source.specs[data.draw(st.sampled_from(names))]
    start = data.draw(st.integers(0, spec.shape[0]))
    stop = data.draw(st.integers(start, spec.shape[0]))
    left = data.draw(st.integers(0, spec.shape[1]))
    columns = data.draw(st.sampled_from([None, (left, data.draw(st.integers(left, spec.shape[1])))]))
    whole = source.read(spec)[start:stop]
    part = source.read(spec, start, stop, columns=columns)
    assert torch.equal(part, whole if columns is None else whole[:, slice(*columns)])


def content(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("written", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("read", [0, 1], ids=["from per expert", "from stacked"])
def test_written_as_either_layout(folders, read, written, tmp_path):
    """From either to either: the tensors of the folder that has that layout, bit for bit; config and tokenizer too."""
    cfg, like = config_of(folders[0]), folders[int(written)]
    source = HuggingFaceWeights(folders[read], cfg)
    write_hugging_face(
        source, cfg, tmp_path, like=like, dtype="bfloat16", max_shard_size=ONE_FILE, stacked_experts=written
    )
    assert content(tmp_path) == content(like)
    files = {path.name for path in like.iterdir()} - {"model.safetensors"}
    assert {name: (tmp_path / name).read_bytes() for name in files} == {n: (like / n).read_bytes() for n in files}


def test_a_stacked_folder_in_shards(folders, tmp_path):
    cfg = config_of(folders[0])
    source = HuggingFaceWeights(folders[1], cfg)
    write_hugging_face(
        source, cfg, tmp_path, like=folders[1], dtype="bfloat16", max_shard_size=20_000, stacked_experts=True
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = HuggingFaceWeights(tmp_path, cfg)
    assert all(torch.equal(again.read(spec), source.read(spec)) for spec in source.specs.values())


def test_another_number_of_experts_is_refused(folders, tmp_path):
    for number, folder in enumerate(folders):
        copy = shutil.copytree(folder, tmp_path / str(number))
        hf = json.loads((copy / "config.json").read_text())
        key = "num_local_experts" if "num_local_experts" in hf else "num_experts"
        (copy / "config.json").write_text(json.dumps(hf | {key: hf[key] + 1}))
        with pytest.raises(CheckpointError, match="do not fit its config") as error:
            HuggingFaceWeights(copy, config_of(copy))
        assert ("missing" if number == 0 else "instead of") in error.value.why


def logits_by_transformers(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.arange(40)[None] * 7 % 450).logits


@pytest.mark.parametrize("stacked", [False, True])
def test_transformers_reads_what_is_written(folders, stacked, tmp_path):
    """transformers warns about keys it does not know and goes on with random weights: logits show that it knew all."""
    cfg = config_of(folders[0])
    source = HuggingFaceWeights(folders[0], cfg)
    write_hugging_face(
        source, cfg, tmp_path, like=folders[0], dtype="bfloat16", max_shard_size=ONE_FILE, stacked_experts=stacked
    )
    assert torch.equal(logits_by_transformers(tmp_path), logits_by_transformers(folders[0]))


# Megatron-Core's layout


def test_whole_blocks():
    """Every cut of a range: in order, without hole, each whole blocks or inside one, at most three."""
    for start, stop, size in itertools.product(range(14), range(14), range(1, 6)):
        if start > stop:
            continue
        parts = whole_blocks(start, stop, size)
        assert [row for a, b in parts for row in range(a, b)] == list(range(start, stop)) and 1 <= len(parts) <= 3
        for a, b in parts:
            assert (a % size == 0 and b % size == 0) or (b - 1) // size == a // size or a == b


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_megatron_boxes(data):
    """What the boxes hold, one after the other, is the range of the plain matrix; each lies within the tensor."""
    experts, block, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    layers, layer = 3, data.draw(st.integers(0, 2))
    stacked, grouped = data.draw(st.booleans()), data.draw(st.booleans())
    name = f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight"
    rows = experts * block
    spec = TensorSpec(name, (rows, width), (), stacked=stacked, experts=experts if grouped else 0)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    left = data.draw(st.integers(0, width - 1))
    columns = data.draw(st.sampled_from([None, (left, data.draw(st.integers(left + 1, width)))]))

    plain = torch.arange(rows * width).view(rows, width)
    inner = plain.view(experts, block, width) if grouped else plain
    whole = torch.stack([inner + 1000 * (i - layer) for i in range(layers)]) if stacked else inner
    assert spec.megatron_shape(layers) == tuple(whole.shape)
    found, next_row = [], start
    for (first, last), offset, size in spec.megatron_boxes(start, stop, columns):
        assert first == next_row
        next_row = last
        assert all(o >= 0 and o + s <= n for o, s, n in zip(offset, size, whole.shape, strict=True)), (offset, size)
        box = whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        found.append(box.reshape(last - first, -1 if last > first else box.shape[-1]))
    assert next_row == stop and len(found) <= 3
    expected = plain[start:stop] if columns is None else plain[start:stop, slice(*columns)]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_torch_dist_round_trip(folders, ranks, tmp_path):
    """Written in pieces that end inside experts, read whole, by rows and by columns; keys and shapes are Megatron-Core's."""
    cfg = config_of(folders[0])
    specs, moe, layers = tensor_specs(cfg), cfg.moe, cfg.num_layers
    weights = random_weights(specs)
    pieces = [
        p for rank in range(ranks) for p in pieces_of_rank(specs, weights, rank, ranks, num_layers=cfg.num_layers)
    ]
    pieces = [p for p in pieces if all(p.size)]  # one writer, which would meet several empty boxes at one place
    save_pieces(tmp_path, pieces, distributed=False)
    source = MegatronWeights(tmp_path, specs, num_layers=cfg.num_layers)
    for name, spec in specs.items():
        assert torch.equal(source.read(spec), weights[name]), name
        start, stop = spec.shape[0] // 3, spec.shape[0] - 1
        if len(spec.shape) == 2 and start < stop:
            part = source.read(spec, start, stop, columns=(1, 3))
            assert torch.equal(part, weights[name][start:stop, 1:3]), name

    files, inner, hidden = DcpFolder(tmp_path), moe.ffn_hidden_size, cfg.hidden_size
    if all(moe.sparse_layers):
        expected = {
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": (layers, moe.num_experts, 2 * inner, hidden)
        }
        expected |= {"decoder.layers.mlp.router.weight": (layers, moe.num_experts, hidden)}
    else:
        expected = {
            f"decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight": (moe.num_experts, 2 * inner, hidden)
            for i in range(layers)
            if moe.sparse_layers[i]
        } | {"decoder.layers.1.mlp.linear_fc1.weight": (2 * cfg.ffn_hidden_size, hidden)}
    for key, shape in expected.items():
        assert files.shape(key) == shape
