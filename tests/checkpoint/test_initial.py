"""Initial weights: Megatron's distributions, and the same values however they are cut."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_swift.checkpoint.initial import InitialWeights
from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
from shapes import SHAPES, shape

SOURCE = InitialWeights(num_layers=4, seed=42, std=0.02)
WIDE = shape(hidden_size=256, ffn_hidden_size=512, qkv_bias=True, linear_bias=True, normalization="LayerNorm")


@pytest.mark.parametrize(
    "name", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "word_embeddings", "output_layer"]
)
def test_standard_deviations(name):
    (spec,) = [
        s for n, s in tensor_specs(WIDE).items() if n.endswith(f"{name}.weight") and ".layers.0." in f"{n}.layers.0."
    ][:1]
    std = 0.02 / math.sqrt(8) if name in ("linear_proj", "linear_fc2") else 0.02
    values = SOURCE.read(spec)
    assert values.dtype == torch.float32 and values.shape == spec.shape
    assert (
        float(values.std()) == pytest.approx(std, rel=0.03)
        and abs(float(values.mean())) < 5 * std / values.numel() ** 0.5
    )
    assert len(values.unique()) > values.numel() / 2


def test_norms_are_one_and_biases_zero():
    flat = {n: SOURCE.read(s) for n, s in tensor_specs(WIDE).items() if len(s.shape) == 1}
    assert {float(v.unique()) for n, v in flat.items() if n.endswith("bias")} == {0.0}
    assert {float(v.unique()) for n, v in flat.items() if not n.endswith("bias")} == {1.0}


@pytest.mark.parametrize("shape_of", [(700, 300), (5, 100_000), (3, 7)])
def test_slices_are_cut_from_the_whole(shape_of):
    spec = TensorSpec("decoder.layers.1.mlp.linear_fc2.weight", shape_of, ())
    whole = SOURCE.read(spec)
    rows, columns = shape_of
    for start, stop in ((0, 1), (1, rows), (rows // 2, rows // 2), (rows - 1, rows), (rows // 3, rows - 1)):
        assert torch.equal(SOURCE.read(spec, start, stop), whole[start:stop])
        part = SOURCE.read(spec, start, stop, columns=(columns // 3, columns))
        assert torch.equal(part, whole[start:stop, columns // 3 :])


def test_seed_and_name_decide():
    one, *others = [
        InitialWeights(num_layers=4, seed=seed, std=0.02).read(TensorSpec(name, (8, 8), ()))
        for seed, name in ((42, "a.weight"), (43, "a.weight"), (42, "b.weight"))
    ]
    assert all(not torch.equal(one, other) for other in others)
    assert torch.equal(one, SOURCE.read(TensorSpec("a.weight", (8, 8), ())))


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_can_be_drawn(name):
    for spec in tensor_specs(SHAPES[name]).values():
        assert SOURCE.read(spec).shape == spec.shape
