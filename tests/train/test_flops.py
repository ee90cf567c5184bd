"""FLOPs of a step against torch's own count of what ran."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_swift.data.types import Batch
from megatron_swift.kernels.attention import Segments, unfused_attention
from megatron_swift.kernels.grouped_linear import looped_linear
from megatron_swift.parallel.engine import Counts
from megatron_swift.testing import make_tiny_model
from megatron_swift.train.flops import step_flops
from tiny_models import SMALL, as_batch, load, make_engine, random_samples


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_step_flops(tmp_path, family):
    model = load(make_tiny_model(tmp_path, family=family, **SMALL))
    model.set_attention(unfused_attention)
    for layer in model.sparse:
        layer.experts.product = looped_linear  # torch does not count its grouped one
    lengths = (24, 2, 6)  # for length 1 einsum needs no product
    tokens, positions = torch.arange(32), torch.cat([torch.arange(n) for n in lengths])
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(tokens, positions, Segments.of(lengths, tokens.device))
        model.logits(hidden).sum().backward()
    squares = sum(n * n for n in lengths)
    cfg = model.cfg
    masked_half = 6 * cfg.num_layers * cfg.num_attention_heads * cfg.kv_channels * squares
    assert step_flops(cfg, Counts(5, 32, squares)) == counter.get_total_flops() - masked_half


def test_counts_of_batches(tmp_path):
    rng = np.random.default_rng(0)
    batches: list[Batch] = [as_batch(random_samples(rng, lengths, trained=0.5)) for lengths in ((24,), (3, 5))]
    engine = make_engine(make_tiny_model(tmp_path, **SMALL), torch.float32)
    assert engine.count(batches) == (sum(b.num_trained for b in batches), 32, 24**2 + 3**2 + 5**2, 2)
