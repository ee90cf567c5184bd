"""Layout fuzz: random legal layouts, models and data, each against one process computing by hand, in float64 to 1e-10.

Half of the draws are mixtures of experts, whose reference is test_moe_layouts.by_hand_sparse.

`make fuzz` draws 200 from a seed it prints; the test run draws 20. FUZZ_SEED and FUZZ_DRAWS decide; a failure names its draw, which
`FUZZ_SEED=<seed> FUZZ_ONLY=<number> pytest tests/parallel/test_fuzz.py -k random` repeats. The fuzz itself is tested: each planted
fault must be found.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_parallel import by_hand, compare
from test_layouts import on_layout
from test_moe_layouts import by_hand_sparse, router_of

from megatron_swift.data.types import IGNORE
from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel import engine as engine_module
from megatron_swift.parallel.data import Sharding, wrapped
from megatron_swift.parallel.engine import Engine
from megatron_swift.parallel.expert import is_expert
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.testing import make_tiny_model, run_ranks
from tiny_models import random_samples

SEED, DRAWS = int(os.environ.get("FUZZ_SEED", "20261124")), int(os.environ.get("FUZZ_DRAWS", "20"))
MAX_RANKS = 8


@dataclass(frozen=True)
class Draw:
    """One case. model: arguments of make_tiny_model."""

    ranks: int
    sizes: Sizes
    options: dict
    model: dict
    micro: int
    longest: int
    seed: int


def draw(seed: int, number: int) -> Draw:
    """Case `number` of a seed: always legal."""
    rng = np.random.default_rng([seed, number])

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    heads, groups = pick((4, 2), (4, 4), (4, 1), (8, 2), (6, 3))
    layers = int(rng.integers(2, 6))
    tp = pick(
        *[
            n
            for n in (1, 1, 2, 4)
            if heads % n == 0 and (groups % n == 0 or (n % groups == 0 and heads // groups % (n // groups) == 0))
        ]
    )
    pp, cp = pick(*[n for n in (1, 1, 2, 3) if n <= layers]), pick(1, 1, 2, 3)
    while tp * pp * cp > MAX_RANKS:
        pp, cp = (pp, 1) if rng.random() < 0.5 else (1, cp)
    dp = pick(*[n for n in (1, 2, 3) if tp * pp * cp * n <= MAX_RANKS])
    chunks = 2 if pp > 1 and layers >= 2 * pp and rng.random() < 0.4 else 1
    local_heads, local_groups = heads // tp, max(groups // tp, 1)
    kinds = ["all_gather", "p2p"]
    if local_heads % cp == 0 and (local_groups % cp == 0 or cp % local_groups == 0):
        kinds.append("a2a")
    modules = tuple(name for name in ("core_attn", "layernorm", "mlp") if rng.random() < 0.5)
    selective = Recompute("selective", modules=modules)
    recompute = pick(Recompute(), selective, Recompute("full", "uniform", 2), Recompute("full", "block", 1))
    options = {
        "sequence_parallel": bool(tp > 1 and rng.random() < 0.6),
        "sharding": pick(*Sharding),
        "context_kind": pick(*kinds),
        "recompute": recompute,
        "chunks_per_rank": chunks,
        "chunked_cross_entropy": bool(rng.random() < 0.5),
        "attention_backend": pick("auto", "unfused"),
    }
    model = {
        "family": pick("qwen2", "qwen3", "llama"),
        "tied": bool(rng.random() < 0.5),
        "layers": layers,
        "vocab_size": int(rng.integers(259, 300)),
        "hidden_size": pick(16, 24),
        "intermediate_size": pick(12, 24),
        "head_dim": pick(4, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    micro = pp * int(rng.integers(1, 3)) if chunks > 1 else int(rng.integers(1, 4))
    case = Draw(
        tp * pp * cp * dp,
        Sizes(tp, pp, cp),
        options,
        model,
        micro * dp,
        int(rng.integers(2, 40)),
        int(rng.integers(1 << 30)),
    )
    return case if rng.random() < 0.5 else with_experts(case, rng)


def with_experts(case: Draw, rng: np.random.Generator) -> Draw:
    """The case with a mixture of experts in place of its model's MLPs, in all layers or in some."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    family, number, layers = pick("qwen2_moe", "qwen3_moe", "mixtral"), pick(2, 3, 4, 6, 8), case.model["layers"]
    stage = case.ranks // case.sizes.pp
    etp = pick(*[n for n in (1, case.sizes.tp, 2) if stage % n == 0])
    ep = pick(*[n for n in range(1, number + 1) if number % n == 0 and stage % (n * etp) == 0])
    balancing = pick("aux_loss", "seq_aux_loss", "none")
    router = RouterOptions(
        balancing=balancing, aux_coeff=0.1 if balancing != "none" else 0.0, z_coeff=pick(0.0, 0.0, 0.01)
    )
    topk = int(rng.integers(2, min(number, 4) + 1))
    options = case.options | {
        "sequence_parallel": case.sizes.tp > 1,  # without it tensor-parallel ranks would route the same tokens
        "dispatcher": pick("alltoall", "allgather"),
        "grouped_experts": bool(rng.random() < 0.5),
        "router": router,
    }
    model = case.model | {"family": family, "num_experts_per_tok": topk}
    if family == "mixtral":
        model |= {"num_local_experts": number}
    else:
        dense = [i for i in range(layers) if rng.random() < 0.3]
        model |= {
            "num_experts": number,
            "moe_intermediate_size": pick(12, 20),
            "norm_topk_prob": bool(rng.random() < 0.5),
        }
        model |= {"mlp_only_layers": dense[: layers - 1]}
        if not model["norm_topk_prob"]:  # else one expert alone always has the weight 1
            model["num_experts_per_tok"] = pick(1, topk)
    if family == "qwen2_moe":
        model |= {"shared_expert_intermediate_size": pick(0, 12, 24)}
    sizes = dataclasses.replace(case.sizes, ep=ep, etp=pick(etp, None) if etp == case.sizes.tp else etp)
    return dataclasses.replace(case, sizes=sizes, options=options, model=model)


def data(case: Draw) -> list[list[list]]:
    """[step][micro-batch][sample], ragged, with anything from none to all tokens trained, but at least one in a step."""
    rng = np.random.default_rng(case.seed)

    def micro() -> list:
        return random_samples(
            rng, rng.integers(1, case.longest + 1, rng.integers(1, 4)), trained=rng.random(), vocab_size=259
        )

    def step() -> list[list]:
        whole = random_samples(rng, [int(rng.integers(2, case.longest + 2))], trained=1.0, vocab_size=259)
        return [whole, *(micro() for _ in range(case.micro - 1))]

    return [step() for _ in range(2)]


def check(case: Draw, folder: Path, tamper=lambda engine: None) -> None:
    """Raise AssertionError where the layout differs from one process."""
    make_tiny_model(folder, **case.model)
    samples = data(case)
    sparse = case.sizes.ep is not None
    expected = (
        by_hand_sparse(folder, torch.float64, samples, router_of(case.options))
        if sparse
        else by_hand(folder, torch.float64, samples)
    )
    run = (folder, torch.float64, samples, case.sizes, case.options)
    for found in run_ranks(lambda rank: on_layout(rank, *run, tamper=tamper), case.ranks):
        compare(found, expected, 1e-10)


@pytest.mark.parametrize("number", [int(os.environ["FUZZ_ONLY"])] if "FUZZ_ONLY" in os.environ else range(DRAWS))
def test_random_layouts(number, tmp_path):
    case = draw(SEED, number)
    try:
        check(case, tmp_path)
    except AssertionError as error:
        raise AssertionError(f"FUZZ_SEED={SEED} FUZZ_ONLY={number}: {case}\n{error}") from None


def mean_over_ranks(engine: Engine) -> None:
    for chunk in engine.chunks:
        for module in wrapped(chunk):
            module.set_gradient_divide_factor(float(engine.mesh.shard.size))


def head_norms_not_reduced(engine: Engine) -> None:
    for shard in engine.shards:
        if shard.name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            shard.partials = ()


def tied_gradient_not_added(engine: Engine) -> None:
    engine.shards.tied = None


def pads_counted(engine: Engine) -> None:
    right = engine._run

    def wrong(batches, **options):
        return right([b._replace(labels=np.where(b.tokens == 0, b.tokens, b.labels)) for b in batches], **options)

    engine._run = wrong


def labels_shifted_after_the_cut(engine: Engine) -> None:
    """Each rank shifts the labels of the tokens that it holds."""
    right = engine._row

    def wrong(batch):
        if engine.mesh.cp.size == 1:
            return right(batch)
        original = np.roll(batch.labels, 1)
        mine = engine_module.zigzag(batch.lengths, cp=engine.mesh.cp.size, rank=engine.mesh.cp.rank).numpy()
        labels = np.full_like(batch.labels, IGNORE)
        labels[mine] = np.roll(original[mine], -1)
        return right(batch._replace(labels=labels))

    engine._row = wrong


def expert_gradients_averaged(engine: Engine) -> None:
    """Over the ranks that hold the same experts, as if those saw all tokens."""
    right = engine.shards.pull

    def wrong(scale):
        right(scale)
        for shard in engine.shards:
            if is_expert(shard.name) and shard.master.grad is not None:
                shard.master.grad.div_(engine.mesh.edp.size)

    engine.shards.pull = wrong


def router_gradient_not_reduced(engine: Engine) -> None:
    """Under sequence parallelism each tensor-parallel rank routes other tokens."""
    for shard in engine.shards:
        if shard.name.endswith("router.weight"):
            shard.partials = ()


def balancing_loss_of_every_micro_batch(engine: Engine) -> None:
    """Added up over the micro-batches, not averaged."""
    right = engine.forward_backward

    def wrong(batches, *, num_rows, **options):
        return right(batches, num_rows=1, **options)

    engine.forward_backward = wrong


def edp(case: Draw) -> int:
    etp = case.sizes.tp if case.sizes.etp is None else case.sizes.etp
    return case.ranks // (case.sizes.pp * case.sizes.ep * etp) if case.sizes.ep is not None else 1


SHOWS = {
    mean_over_ranks: lambda c: c.ranks > c.sizes.tp * c.sizes.pp and c.options["sharding"] is not Sharding.NO_SHARD,
    head_norms_not_reduced: lambda c: c.sizes.tp > 1 and c.model["family"].startswith("qwen3"),
    tied_gradient_not_added: lambda c: c.sizes.pp > 1 and c.model["tied"],
    pads_counted: lambda c: c.sizes.cp > 1,
    labels_shifted_after_the_cut: lambda c: c.sizes.cp > 1,
    expert_gradients_averaged: lambda c: edp(c) > 1,
    router_gradient_not_reduced: lambda c: c.sizes.ep is not None and c.sizes.tp > 1,
    balancing_loss_of_every_micro_batch: lambda c: c.micro > 1 and router_of(c.options).aux_coeff > 0,
}


@pytest.mark.parametrize("fault", SHOWS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(fault, tmp_path):
    """Among the first draws that can show it, one does."""
    cases = [case for case in (draw(20261124, n) for n in range(200)) if SHOWS[fault](case) and case.ranks <= 4][:4]
    assert cases
    for number, case in enumerate(cases):
        check(case, tmp_path / f"right{number}")
        try:
            check(case, tmp_path / str(number), tamper=fault)
        except AssertionError as error:
            if "differ" not in str(error):
                raise
            return
    pytest.fail(f"{fault.__name__} went unnoticed")
