"""Tokens one by one through the cache give the logits of the whole sequence at once."""

from __future__ import annotations

import pytest
import torch
from load_decoders import load

from megatron_swift.infer.kv_cache import CachedDecoder
from megatron_swift.kernels.attention import Segments, plain_attention


def last_logits(model, ids: list[int]) -> torch.Tensor:
    row = torch.tensor(ids)
    hidden = model.hidden_states(row, torch.arange(len(ids)), Segments.of([len(ids)], row.device))
    return model.logits(hidden[-1])


@pytest.mark.parametrize("lengths", [(5,), (4, 4), (1, 9, 3), (1, 1)])
def test_equals_the_whole_sequence(model, tiny, lengths):
    reference = load(tiny)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 451, (length,), generator=generator).tolist() for length in lengths]
    with CachedDecoder(model) as cached:
        logits = cached.prefill(rows)
        for step in range(140):  # further than the buffers reach at first
            if step % 20 == 0:
                assert torch.allclose(logits, torch.stack([last_logits(reference, row) for row in rows]), atol=1e-4)
            if step == 50 and len(rows) == 3:
                rows = [rows[0], rows[2]]
                cached.keep([0, 2])
            tokens = torch.randint(0, 451, (len(rows),), generator=generator)
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
            logits = cached.step(tokens)
        assert torch.allclose(logits, torch.stack([last_logits(reference, row) for row in rows]), atol=1e-4)
        assert torch.allclose(cached.prefill([[1, 2]]), last_logits(reference, [1, 2])[None], atol=1e-4)


def test_leaves_the_model_as_it_was(model):
    with pytest.raises(IndexError), CachedDecoder(model) as cached:
        cached.prefill([[1, 10**6]])  # no such token
    assert all(attention.core is plain_attention for attention in model.attentions)
