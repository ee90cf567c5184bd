"""Every family against transformers: logits, gradients, packed rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_swift.kernels.attention import Segments
from megatron_swift.models.decoder import Decoder
from megatron_swift.models.families import FAMILIES, NATIVE
from megatron_swift.testing import make_tiny_model
from tiny_models import CPU, load, under_hugging_face_names

LENGTHS = (37, 1, 8, 101, 2)
TOKENS = torch.from_numpy(np.random.default_rng(3).integers(0, 451, sum(LENGTHS)))
# head_dim 16 and an original context of 64: wavelengths 6.28 (kept), 19.9 and 62.8 (between), 199 and more (divided).
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8, "beta_slow": 1}


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    config: dict = field(default_factory=dict)

    def __str__(self) -> str:
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", ""))
        return "-".join([self.family, "tied" if self.tied else "untied", *([kind] if kind else [])])


CASES = [
    Case("qwen2", True),
    Case("qwen2", False, {"rope_theta": 1e6, "rope_scaling": YARN}),
    Case("qwen3", True, {"rope_theta": 500.0}),
    Case("qwen3", False, {"head_dim": 24, "num_key_value_heads": 1}),
    Case("llama", True, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    Case("llama", False, {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
    Case("qwen2_moe", True, {"mlp_only_layers": [1]}),
    Case("qwen2_moe", False, {"norm_topk_prob": True}),
    Case("qwen3_moe", True, {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    Case("qwen3_moe", False, {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    Case("mixtral", True),
    Case("mixtral", False, {"num_local_experts": 3}),
    Case("llama", False, {"num_key_value_heads": 4, "rope_theta": None, "rope_parameters": {"rope_theta": 1e3}}),
]


def test_every_family_has_a_row():
    """The others are judged in test_written_configs; NATIVE is nothing that transformers knows."""
    made_anew = {"phi3", "stablelm", "starcoder2", NATIVE.name}
    names = FAMILIES.keys() - made_anew
    assert {(case.family, case.tied) for case in CASES} == {(name, tied) for name in names for tied in (True, False)}


def transformers_model(folder, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@pytest.fixture(scope="module", params=CASES, ids=str)
def folder(request, tmp_path_factory):
    case = request.param
    config = {k: v for k, v in case.config.items() if v is not None}
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, family=case.family, tied=case.tied, **config)
    if (
        case.config.get("rope_theta", 0) is None
    ):  # the spelling of transformers 5 has no rope_theta beside rope_parameters
        written = json.loads((path / "config.json").read_text())
        del written["rope_theta"]
        (path / "config.json").write_text(json.dumps(written))
    return path


def packed_logits(model: Decoder) -> torch.Tensor:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return model.logits(model.hidden_states(TOKENS, positions, Segments.of(LENGTHS, CPU)))


def test_packed_row_equals_transformers_sequence_by_sequence(folder):
    """Logits within 1e-5 of the largest, and the gradient of each Hugging Face tensor within 1e-5 of its norm."""
    ours, theirs = load(folder), transformers_model(folder, torch.float32)
    logits = packed_logits(ours)
    expected = torch.cat([theirs(part[None]).logits[0] for part in TOKENS.split(LENGTHS)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))

    targets = TOKENS.roll(-1)
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    mine = under_hugging_face_names({n: p.grad for n, p in ours.named_parameters()}, ours.cfg)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert mine.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.norm() > 0, name
        assert (mine[name] - grad).norm() < 1e-5 * grad.norm(), name


def test_bfloat16_is_close(folder):
    """As close to float32 as transformers is in bfloat16, within a factor."""
    exact = packed_logits(load(folder)).detach()
    with torch.no_grad():
        mine = packed_logits(load(folder, torch.bfloat16)).float()
        model = transformers_model(folder, torch.bfloat16)
        theirs = torch.cat([model(part[None]).logits[0] for part in TOKENS.split(LENGTHS)]).float()
    assert (mine - exact).norm() < 1.25 * (theirs - exact).norm()
    assert (mine - exact).norm() < 0.05 * exact.norm()
