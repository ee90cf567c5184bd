"""Mixtures of experts give the numbers of one process in every layout: loss, norm, evaluation and each parameter after three steps.

The reference (by_hand_sparse) uses neither the engine nor the routing formulas of the product: it runs a micro-batch sequence by
sequence, looks at the logits of each router and writes the balancing losses out with loops.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_data_parallel import CLIP, LR, Result, compare, samples_of_steps
from test_layouts import HEADS, RING, VIRTUAL, ZERO0, ZERO2, ZERO3, full, name, on_layout, parts

from megatron_swift.data.types import IGNORE, Sample
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from tiny_models import SMALL, load, random_samples

SAMPLES = samples_of_steps(num_micro=4)
LR32 = 1e-4  # experts see few tokens: more gradients near zero, whose rounding Adam turns into its share of lr
SP = {"sequence_parallel": True}
GATHER = {"dispatcher": "allgather"}
LOOP = {"grouped_experts": False}
AUX = {"router": RouterOptions(balancing="aux_loss", aux_coeff=0.1, z_coeff=0.01)}
SEQ = {"router": RouterOptions(balancing="seq_aux_loss", aux_coeff=0.1)}
MODEL = SMALL | {"num_hidden_layers": 4}


def routed(ranks, options, **sizes):
    return ranks, Sizes(**{"ep": 1} | sizes), options


LAYOUTS = [
    routed(1, AUX),
    routed(1, SEQ | LOOP),
    routed(2, AUX | parts("moe_act", "layernorm"), ep=2),
    routed(2, AUX | GATHER, ep=2),
    routed(4, AUX, ep=4),
    routed(4, AUX | GATHER, ep=4),
    routed(4, AUX, ep=2),  # two ranks hold the same experts
    routed(4, SEQ | ZERO0, ep=2),
    routed(4, AUX | ZERO2, ep=2),
    routed(4, ZERO3, ep=2),
    routed(2, AUX | ZERO3 | parts("moe_act", "layernorm", "mlp")),  # experts sharded as the rest is
    routed(2, AUX | SP, tp=2),  # an expert's tensors over both ranks
    routed(
        2, SEQ | SP | LOOP | parts("moe_act", "layernorm"), tp=2, etp=1
    ),  # replicated experts under tensor parallelism
    routed(2, AUX | SP, tp=2, ep=2, etp=1),
    routed(4, AUX | SP, tp=2, ep=2),
    routed(4, SEQ | SP | GATHER, tp=2, ep=2),
    routed(4, AUX | SP | GATHER | LOOP, tp=2, ep=2),
    routed(4, AUX | SP | ZERO3, tp=4, ep=2, etp=1),  # key/value heads and experts replicated
    routed(2, AUX | LOOP | parts("moe_act"), pp=2),
    routed(4, AUX, pp=2, ep=2),
    routed(4, SEQ | VIRTUAL | full("uniform", 1), pp=2, ep=2),
    routed(2, AUX, cp=2, ep=2),
    routed(2, SEQ | RING, cp=2),
    routed(4, SEQ | HEADS, cp=2, ep=4),
    routed(4, AUX | SP | RING, tp=2, cp=2, ep=4, etp=1),
    routed(4, AUX | full("block", 2) | ZERO3, ep=2),
    routed(8, AUX | SP, tp=2, pp=2, ep=4, etp=1),
    routed(8, SEQ | SP | VIRTUAL, tp=2, pp=2, ep=2),
    routed(8, AUX | SP | GATHER, tp=2, pp=2, cp=2, ep=2),
    routed(8, {} | ZERO3 | SP, tp=2, cp=2, ep=4),
]
MODELS = [
    ("qwen2_moe", {"mlp_only_layers": [1]}),  # shared expert, dense layer among sparse ones, softmax before the choice
    ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3}),
]


def router_of(options) -> RouterOptions:
    return options.get("router", RouterOptions())


def balance_by_hand(logits: torch.Tensor, lengths: list[int], topk: int, options: RouterOptions) -> torch.Tensor:
    """The weighted losses of one router for one micro-batch of sequences of these lengths; written out expert by expert."""
    experts = logits.shape[1]

    def switch(part: torch.Tensor) -> torch.Tensor:
        probs, chosen = part.softmax(-1), part.topk(topk, dim=-1).indices
        loss = logits.new_zeros(())
        for e in range(experts):
            share = float((chosen == e).sum()) / (len(part) * topk)
            loss = loss + experts * share * probs[:, e].mean()
        return loss

    total = options.z_coeff * (logits.exp().sum(-1).log() ** 2).mean()
    if options.balancing == "aux_loss":
        total = total + options.aux_coeff * switch(logits)
    if options.balancing == "seq_aux_loss":
        total = total + options.aux_coeff * torch.stack([switch(part) for part in logits.split(lengths)]).mean()
    return total


def by_hand_sparse(folder: Path, dtype: torch.dtype, steps, options: RouterOptions, lr: float = LR) -> Result:
    """One process without engine and optimizer of ours."""
    model = load(folder, dtype)
    named = dict(model.named_parameters())
    matrices, vectors = ([p for p in named.values() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    seen: dict[int, list[torch.Tensor]] = {}
    for layer in model.sparse:
        layer.router.register_forward_hook(
            lambda module, args, _: seen.setdefault(module.number, []).append(F.linear(args[0], module.weight))
        )

    def loss_sum(sample: Sample) -> torch.Tensor:
        ids, labels = (torch.from_numpy(x.astype(np.int64)) for x in sample[:2])
        hidden = model.hidden_states(ids, torch.arange(len(ids)), Segments.of([len(ids)], ids.device))
        return F.cross_entropy(model.logits(hidden[:-1]), labels[1:], ignore_index=IGNORE, reduction="sum")

    def trained(micros) -> int:
        return sum(int((s.labels[1:] != IGNORE).sum()) for micro in micros for s in micro)

    def evaluate():
        with torch.no_grad():
            return sum(float(loss_sum(s)) for micro in steps[0] for s in micro), trained(steps[0])

    result = Result([], [], [evaluate()], {})
    for micros in steps:
        total, tokens = 0.0, trained(micros)
        for micro in micros:
            seen.clear()
            loss = sum(loss_sum(sample) for sample in micro)
            total += float(loss.detach())
            lengths = [len(sample.ids) for sample in micro]
            for logits in seen.values():
                extra = balance_by_hand(torch.cat(logits), lengths, model.cfg.moe.topk, options)
                loss = loss + extra * tokens / len(micros)
            (loss / tokens).backward()
        result.losses.append(total / tokens)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    result.evaluations.append(evaluate())
    result.params = {n: p.detach().double().numpy() for n, p in named.items()}
    return result


# The second model runs in `make test-slow`: with both, the ordinary run would come near the time that it may take.
BOTH = [pytest.param(MODELS[0], id=MODELS[0][0]), pytest.param(MODELS[1], id=MODELS[1][0], marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BOTH)
def folder(request, tmp_path_factory):
    family, config = request.param
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), family=family, tied=family == "qwen3_moe", **MODEL | config
    )


@pytest.fixture(scope="module")
def expected(folder):
    """The reference for some router options, computed once each."""
    found: dict[tuple, Result] = {}

    def get(options: RouterOptions, dtype: torch.dtype, lr: float) -> Result:
        key = (options, dtype, lr)
        if key not in found:
            found[key] = by_hand_sparse(folder, dtype, SAMPLES, options, lr)
        return found[key]

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_float64(folder, expected, layout):
    ranks, sizes, options = layout
    for result in run_ranks(on_layout, ranks, folder, torch.float64, SAMPLES, sizes, options):
        compare(result, expected(router_of(options), torch.float64, LR), 1e-10)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x[0] <= 2 or x[0] == 8], ids=name)
def test_float32(folder, expected, layout):
    """Experts run in one grouped product here; in float64 torch has none and they run one by one."""
    ranks, sizes, options = layout
    result = run_ranks(on_layout, ranks, folder, torch.float32, SAMPLES, sizes, options, LR32)[0]
    compare(result, expected(router_of(options), torch.float32, LR32), 1e-5)


CROSSING = [  # what has no second implementation here: one process of the engine is the reference
    {"router": RouterOptions(balancing="sinkhorn")},
    {"router": RouterOptions(balancing="global_aux_loss", aux_coeff=0.1)},
    {"router": RouterOptions(balancing="aux_loss", aux_coeff=0.1, capacity_factor=0.7)},
    {"router": RouterOptions(capacity_factor=0.5, drop_policy="position")},
    {"router": RouterOptions(balancing="aux_loss", aux_coeff=0.1, capacity_factor=1.0, pad_to_capacity=True)},
]
WIDE = [
    routed(2, SP, tp=2),
    routed(2, {}, cp=2, ep=2),
    routed(2, {}, pp=2),
    routed(2, full("uniform", 1)),
    routed(4, SP, tp=2, cp=2, ep=4, etp=1),
    routed(4, {}, ep=2, cp=2),
]


@pytest.mark.parametrize("router", CROSSING, ids=lambda r: r["router"].balancing + str(r["router"].capacity_factor))
def test_what_couples_tokens_sees_whole_rows(folder, router):
    """Sinkhorn and capacity look at a whole micro-batch, wherever its tokens lie."""
    alone = run_ranks(on_layout, 1, folder, torch.float64, SAMPLES, Sizes(ep=1), router)[0]
    for ranks, sizes, options in WIDE:
        if router["router"].balancing == "global_aux_loss" and ranks > sizes.tp * sizes.pp * sizes.cp:
            continue  # micro-batches that run side by side count at once there: documented, and tested below
        for found in run_ranks(on_layout, ranks, folder, torch.float64, SAMPLES, sizes, options | router):
            compare(found, alone, 1e-10)


def test_dropped_tokens_change_the_numbers(folder):
    plain, *others = (
        run_ranks(on_layout, 1, folder, torch.float64, SAMPLES, Sizes(ep=1), {"router": router})[0].losses
        for router in (
            RouterOptions(),
            RouterOptions(capacity_factor=0.5),
            RouterOptions(capacity_factor=0.5, drop_policy="position"),
            RouterOptions(capacity_factor=9.0),
        )
    )
    assert plain == pytest.approx(others[2], rel=1e-12)
    assert abs(plain[0] - others[0][0]) > 1e-6 and abs(others[0][0] - others[1][0]) > 1e-6


def crowd(folder: Path) -> None:
    """Make every token go to experts 0 and 1: a constant feature of all tokens that only the routers look at."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][:, 0] = 40.0
    for key, value in weights.items():
        if key.endswith("mlp.gate.weight"):
            value.mul_(0.1)[:, 0] = torch.arange(len(value), 0, -1) * 1.0
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [AUX, AUX | GATHER], ids=["alltoall", "allgather"])
def test_all_tokens_on_one_rank(tmp_path, options):
    folder = make_tiny_model(tmp_path, family="qwen2_moe", tied=False, **MODEL)
    crowd(folder)
    by_hand = by_hand_sparse(folder, torch.float64, SAMPLES, AUX["router"])
    for ranks, sizes in ((2, Sizes(ep=2)), (4, Sizes(ep=4)), (4, Sizes(tp=2, ep=2))):
        wanted = options | (SP if sizes.tp > 1 else {})
        for found in run_ranks(on_layout, ranks, folder, torch.float64, SAMPLES, sizes, wanted):
            compare(found, by_hand, 1e-10)


def test_experts_without_a_token(folder):
    """Rows of two tokens: most experts, and whole ranks, get none."""
    rng = np.random.default_rng(2)
    samples = [[random_samples(rng, [2], trained=1.0) for _ in range(4)] for _ in range(3)]
    by_hand = by_hand_sparse(folder, torch.float64, samples, AUX["router"])
    for options in (AUX, AUX | GATHER, AUX | ZERO3):
        for found in run_ranks(on_layout, 4, folder, torch.float64, samples, Sizes(ep=4), options):
            compare(found, by_hand, 1e-10)
