"""Predicted step times of layouts on several GPUs: measured rates of one GPU and the bytes of docs/parallelism.md over assumed links.

    python benchmarks/scaling_model.py            # the table of docs/scaling.md

What is assumed stands in `Machine`. Every figure is a prediction, to be compared with benchmarks/many_gpus.py where there are several GPUs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu import DENSE
from many_gpus import DENSE_14B, models

from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.engine import Counts
from megatron_swift.train.flops import step_flops


@dataclass(frozen=True)
class Machine:
    """One H100's measured rates and the links it is assumed to have.

    rate       : model FLOP/s of a dense step without its update: measured 510 TFLOP/s with it (docs/speed.md, 1.5B), 14 of 331 ms.
    moe_rate   : the same of the MoE step: 423 TFLOP/s with the update, 27 of 160 ms.
    recompute  : how much longer a step with full recomputation takes than its model FLOPs say: measured 510 / 438.
    memory     : bytes/s of the optimizer's pass, measured; 28 bytes a parameter.
    link       : bytes/s that a GPU sends over NVLink in NCCL's collectives: assumed, 80 % of the 450 GB/s of a direction.
    latency    : seconds of a collective that sends nothing: assumed.
    """

    rate: float = 533e12
    moe_rate: float = 509e12
    recompute: float = 510 / 438
    memory: float = 3.0e12
    link: float = 360e9
    latency: float = 25e-6


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis. batch: rows of `length` tokens in a step. zero3: parameters sharded too (else the optimizer's state)."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    batch: int = 16
    length: int = 8192
    zero3: bool = False
    recompute: bool = True


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step. tensor, experts: of their collectives, none of it hidden. data: what sticks out of the compute."""

    compute: float
    tensor: float
    experts: float
    data: float
    update: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.tensor + self.experts + self.data + self.update


def predict(cfg: ModelConfig, layout: Layout, machine: Machine) -> Prediction:
    """The step of a model under a layout without pipeline or context parallelism.

    Tensor parallel with sequence parallelism: 4 collectives of tokens x hidden a layer, 6 with recomputation (its forward pass again), 2 of
    bfloat16 bytes x (tp - 1) / tp each. Expert parallel: 2 all-to-alls forward and 2 backward, one more pair with recomputation, of
    topk x tokens x hidden x (ep - 1) / ep. Data parallel: float32 gradients scattered once a step (ZeRO-1) or once a row (ZeRO-3),
    parameters gathered in bfloat16 once a step, or twice a row (ZeRO-3); hidden under the backward pass of the last row (ZeRO-1) or under
    all compute (ZeRO-3).
    """
    ranks = layout.tp * layout.dp
    rows = layout.batch // layout.dp  # micro-batches of a data-parallel rank
    tokens = layout.batch * layout.length
    flops = step_flops(cfg, Counts(tokens, tokens, layout.batch * layout.length**2)) / ranks
    rate = machine.moe_rate if cfg.moe is not None else machine.rate
    compute = flops / rate * (machine.recompute if layout.recompute else 1.0)
    passes = 1.5 if layout.recompute else 1.0
    activation = layout.length * cfg.hidden_size * 2
    per_collective = activation * (layout.tp - 1) / layout.tp / machine.link + machine.latency
    tensor = rows * cfg.num_layers * 4 * passes * per_collective if layout.tp > 1 else 0.0
    experts = 0.0
    expert_parameters = 0
    if cfg.moe is not None:
        sparse = sum(cfg.moe.sparse_layers)
        expert_parameters = sparse * 3 * cfg.moe.num_experts * cfg.moe.ffn_hidden_size * cfg.hidden_size
        sent = cfg.moe.topk * activation / layout.tp * (layout.ep - 1) / layout.ep
        if layout.ep > 1:
            experts = rows * sparse * 4 * passes * (sent / machine.link + machine.latency)
    dense_parameters = parameters(cfg) - expert_parameters
    dense_share = dense_parameters / layout.tp
    expert_share, expert_ranks = expert_parameters / layout.ep, ranks // layout.ep
    scattered = _ring(dense_share * 4, layout.dp) + _ring(expert_share * 4, expert_ranks)
    gathered = _ring(dense_share * 2, layout.dp) + _ring(expert_share * 2, expert_ranks)
    if layout.zero3:
        traffic = rows * (scattered + 2 * gathered) / machine.link
        data = max(0.0, traffic - compute)
    else:
        traffic = (scattered + gathered) / machine.link
        data = max(0.0, traffic - compute / rows)
    update = 28 * (dense_share / layout.dp + expert_share / expert_ranks) / machine.memory
    return Prediction(compute, tensor, experts, data, update)


def _ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends to gather or to scatter `size`."""
    return size * (ranks - 1) / ranks


def parameters(cfg: ModelConfig) -> int:
    """Of the whole model, embedding and output layer included."""
    heads = cfg.num_attention_heads + 2 * cfg.num_query_groups
    attention = cfg.hidden_size * cfg.kv_channels * (heads + cfg.num_attention_heads)
    total = cfg.num_layers * (attention + 2 * cfg.hidden_size)
    if cfg.moe is None:
        total += cfg.num_layers * 3 * cfg.hidden_size * cfg.ffn_hidden_size
    else:
        sparse = sum(cfg.moe.sparse_layers)
        inner = cfg.moe.num_experts * cfg.moe.ffn_hidden_size + cfg.moe.shared_size
        total += sparse * (3 * inner + cfg.moe.num_experts) * cfg.hidden_size
        total += (cfg.num_layers - sparse) * 3 * cfg.hidden_size * cfg.ffn_hidden_size
    return total + cfg.vocab_size * cfg.hidden_size * (1 if cfg.tied_embeddings else 2) + cfg.hidden_size


def cases() -> list[tuple[str, ModelConfig, Layout]]:
    """The layouts that benchmarks/many_gpus.py times."""
    moe = models(rehearse=False)["a2.7b"]
    small = dict(batch=4, length=4096, recompute=False)
    scaling = [
        (f"1.5B, dp{n}", DENSE, Layout(dp=n, **{**small, "batch": 4 * n}))
        for n in (1, 2, 4, 8)  # type: ignore[arg-type]
    ]
    return [
        ("14B, tp4 dp2, sequence parallel", DENSE_14B, Layout(tp=4, dp=2)),
        ("14B, dp8, ZeRO-3", DENSE_14B, Layout(dp=8, zero3=True)),
        ("A2.7B, tp2 ep4 dp4", moe, Layout(tp=2, dp=4, ep=4)),
        ("A2.7B, dp8, ZeRO-3", moe, Layout(dp=8, zero3=True)),
        *scaling,
    ]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    machine = Machine()
    print(
        "| layout | s/it | compute | tensor | experts | data | update | tokens/s/GPU | TFLOP/s/GPU |\n"
        + "|---" * 9
        + "|"
    )
    for name, cfg, layout in cases():
        found = predict(cfg, layout, machine)
        ranks, tokens = layout.tp * layout.dp, layout.batch * layout.length
        flops = step_flops(cfg, Counts(tokens, tokens, layout.batch * layout.length**2))
        times = (found.total, found.compute, found.tensor, found.experts, found.data, found.update)
        shown = " | ".join(f"{seconds:.3f}" for seconds in times)
        print(f"| {name} | {shown} | {tokens / found.total / ranks:,.0f} | {flops / found.total / ranks / 1e12:.0f} |")


if __name__ == "__main__":
    main()
