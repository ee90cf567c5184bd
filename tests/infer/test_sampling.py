"""Each filter against transformers' own, the defaults, and the draw."""

from __future__ import annotations

import pytest
import torch

from megatron_swift.infer.sampling import Sampling, choose, keep_top_k, keep_top_p, penalise, random_stream

processors = pytest.importorskip("transformers.generation.logits_process")


@pytest.fixture
def logits():
    return torch.randn(5, 301, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("k", [1, 7, 301, 1000])
def test_top_k(logits, k):
    assert torch.equal(keep_top_k(logits, k), processors.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p(logits, p):
    assert torch.equal(keep_top_p(logits, p), processors.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_penalty(logits, penalty):
    ids = torch.tensor([[1, 5, 5, 300]] * 5)
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise(logits, seen, penalty), expected)


def test_order_of_the_filters(logits):
    ids = torch.tensor([[1, 5, 5, 300]] * 5)
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    expected = logits
    for step in (
        processors.RepetitionPenaltyLogitsProcessor(1.2),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.8),
    ):
        expected = step(ids, expected)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.2)
    assert torch.equal(sampling.scores(logits, seen), expected)
    assert torch.equal(Sampling(temperature=1.0).scores(logits, None), logits)


QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({}, {}, Sampling(0, 50, 1, 1)),
        ({"do_sample": True}, {}, Sampling(1, 50, 1, 1)),
        (QWEN, {}, Sampling(0.7, 20, 0.8, 1.05)),
        (QWEN, {"temperature": 0.0}, Sampling(0, 20, 0.8, 1.05)),
        (QWEN, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, Sampling(0.7, 0, 1, 1)),
        (QWEN | {"do_sample": False}, {}, Sampling(0, 20, 0.8, 1.05)),
        (QWEN | {"do_sample": False}, {"temperature": 0.3}, Sampling(0.3, 20, 0.8, 1.05)),
        ({"top_k": None}, {"temperature": 1.0}, Sampling(1, 50, 1, 1)),
    ],
)
def test_defaults(generation, given, expected):
    assert Sampling.settle(generation, **given) == expected


def test_choose():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for uniform, token in ((0.0, 0), (0.09, 0), (0.11, 1), (0.31, 2), (0.61, 3), (1 - 2**-53, 3)):
        assert choose(scores, [uniform]).tolist() == [token]
    ruled_out = torch.tensor([[float("-inf"), 1.0, float("-inf")]] * 2)
    assert choose(ruled_out, [0.0, 1 - 2**-53]).tolist() == [1, 1]
    assert choose(ruled_out, None).tolist() == [1, 1]


def test_choose_draws_by_probability():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    stream, draws = random_stream(7, 3), 20000
    tokens = choose(probabilities.log().expand(draws, 4), [stream.random() for _ in range(draws)])
    assert torch.allclose(tokens.bincount(minlength=4) / draws, probabilities, atol=0.015)
    assert random_stream(7, 3).random() != random_stream(7, 4).random() != random_stream(8, 4).random()
