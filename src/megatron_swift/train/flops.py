"""Model FLOPs of real tokens."""

from __future__ import annotations

from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.engine import Counts


def step_flops(cfg: ModelConfig, counts: Counts) -> float:
    """Floating-point operations of forward and backward over a global batch, recomputation and optimizer not counted.

    6 x (parameters in matrix products that a token meets) per token, and 6 x heads x head size x length^2 per layer and segment:
    causal attention is two products of length x length x head size, halved by the mask (Megatron's own figure does not halve it and assumes rows of
    seq_length). The output layer counts for every token although the prompts' logits are not computed: the work a trainer is asked for.
    """
    matrices = sum(cfg.active_parameters(i) for i in range(cfg.num_layers)) + cfg.hidden_size * cfg.vocab_size
    attention = cfg.num_layers * cfg.num_attention_heads * cfg.kv_channels * counts.squares
    return 6.0 * (matrices * counts.tokens + attention)
