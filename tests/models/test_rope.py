"""Rotary frequencies against transformers and golden values."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.kernels.layers import rotate
from megatron_swift.models.families.llama import read_config
from megatron_swift.models.rope import Rotary, inverse_frequencies

LLAMA3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_1 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "plain": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3_1,
    "yarn": YARN,
    "yarn-original-unsaid": {"rope_type": "yarn", "factor": 4.0},
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.3},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
}


def config(scaling: dict, *, theta: float = 5e5, new_spelling: bool = False) -> dict:
    hf = {"hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    hf |= {"vocab_size": 9, "max_position_embeddings": 131072, "model_type": "llama"}
    if new_spelling:
        return {**hf, "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}
    return {**hf, "rope_theta": theta, **({"rope_scaling": scaling} if scaling else {})}


@pytest.mark.parametrize("new_spelling", [False, True], ids=["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, new_spelling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = config(SCALINGS[name], new_spelling=new_spelling)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf))
    inverse, factor = inverse_frequencies(read_config(hf))
    torch.testing.assert_close(inverse, theirs.inv_freq, rtol=2e-7, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_llama3_golden():
    """Spec section 12.2."""
    ratio = inverse_frequencies(read_config(config(LLAMA3_1)))[0] / inverse_frequencies(read_config(config({})))[0]
    assert torch.all(ratio[:29] == 1) and torch.all(ratio[35:] == 0.125)
    assert [round(float(ratio[i]), 4) for i in (29, 30, 32, 34)] == [0.8282, 0.6437, 0.3711, 0.1902]


def test_rotation_depends_on_the_distance_only():
    rotary = Rotary(read_config(config({})))
    q, k = torch.randn(2, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = q[None], k[None]

    def score(at: int, other: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([p]), torch.float64)) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(70, 60) == pytest.approx(score(10, 0), rel=1e-4)
    assert score(70, 61) != pytest.approx(score(10, 0), rel=1e-2)


def test_angles_stay_float32_for_a_16_bit_model():
    rotary = Rotary(read_config(config({})))
    positions = torch.tensor([100_001])
    exact, half = rotary(positions, torch.float32), rotary(positions, torch.bfloat16)
    torch.testing.assert_close(half[0].float(), exact[0], rtol=0, atol=0.005)
    assert half[0].dtype == torch.bfloat16
