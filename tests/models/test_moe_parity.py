"""The balancing loss of a mixture of experts against transformers' own (`output_router_logits`), through our engine.

transformers computes E * sum over experts of (choices of the expert / tokens) * (mean probability of the expert): a token counts k times,
once for each of its experts, and an even load gives k. Ours, as Megatron's, divides by k: an even load gives 1. So

    router_aux_loss_coef of transformers = c    <=>    moe_aux_loss_coeff = c * k.

With several sparse layers transformers first averages choices and probabilities over the layers and then multiplies, so an expert that is
busy in one layer makes up for one of the same number that is idle in another; ours is a sum of one loss per layer. Models here have one
sparse layer, where that makes no difference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_swift.data.types import IGNORE
from megatron_swift.models.routing import RouterOptions
from megatron_swift.testing import make_tiny_model
from tiny_models import as_batch, make_engine, random_samples, read_config, under_hugging_face_names

MODELS = [
    ("qwen2_moe", {"layers": 3, "mlp_only_layers": [0, 2]}),
    ("qwen2_moe", {"layers": 2, "mlp_only_layers": [0], "norm_topk_prob": True}),
    ("qwen3_moe", {"layers": 2, "mlp_only_layers": [1], "num_experts": 6, "num_experts_per_tok": 3}),
    ("mixtral", {"layers": 1}),
]
SAMPLES = random_samples(np.random.default_rng(4), [41, 7, 19], trained=0.7)


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{m[1]['layers']}")
def folder(request, tmp_path_factory):
    family, config = request.param
    return make_tiny_model(tmp_path_factory.mktemp("model"), family=family, tied=False, **config)


def by_transformers(folder, coeff: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(balancing loss, lm loss + coeff * balancing loss, gradients) of a padded batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.router_aux_loss_coef = coeff
    longest = max(len(s.ids) for s in SAMPLES)
    ids, labels = (torch.full((len(SAMPLES), longest), fill) for fill in (0, -100))
    for number, sample in enumerate(SAMPLES):
        ids[number, : len(sample.ids)] = torch.from_numpy(sample.ids.astype(np.int64))
        kept = np.where(sample.labels == IGNORE, -100, sample.labels).astype(np.int64)
        labels[number, : len(sample.ids)] = torch.from_numpy(kept)
    mask = torch.arange(longest) < torch.tensor([len(s.ids) for s in SAMPLES])[:, None]
    out = model(ids, attention_mask=mask.long(), labels=labels, output_router_logits=True)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return float(out.aux_loss.detach()), float(out.loss.detach()), gradients


def by_engine(folder, router: RouterOptions):
    """(balancing loss of the sparse layer, lm loss, gradients under Hugging Face names) of one packed, padded row."""
    engine, batches = make_engine(folder, torch.float32, router=router), [as_batch(SAMPLES)]
    assert batches[0].padding > 0  # which must not be routed
    counts = engine.count(batches)
    loss = engine.forward_backward(batches, num_tokens=counts.trained, num_rows=1).item() / counts.trained
    (report,) = engine.routers.reports(engine.routers.take().numpy())
    gradients = {shard.name: shard.master.grad for shard in engine.shards}
    return report.balance, loss, under_hugging_face_names(gradients, read_config(folder))


@pytest.mark.parametrize("coeff", [0.0, 0.3])
def test_loss_and_gradients(folder, coeff):
    """Each Hugging Face tensor's gradient within 1e-5 of its norm; lm loss free of the balancing loss."""
    topk = read_config(folder).moe.topk
    aux, total, wanted = by_transformers(folder, coeff)
    balance, loss, found = by_engine(folder, RouterOptions(balancing="aux_loss", aux_coeff=coeff * topk))
    assert topk * balance == pytest.approx(aux, rel=1e-5)
    assert loss == pytest.approx(total - coeff * aux, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name


def test_the_relation_is_needed(folder):
    """Without the factor k, and without any balancing loss, the router's gradient is another."""
    _, _, wanted = by_transformers(folder, 0.3)
    for coeff in (0.3, 0.0):
        _, _, found = by_engine(folder, RouterOptions(balancing="aux_loss", aux_coeff=coeff))
        (name,) = (name for name in wanted if name.endswith("mlp.gate.weight"))
        assert (found[name] - wanted[name]).norm() > 1e-2 * wanted[name].norm()
