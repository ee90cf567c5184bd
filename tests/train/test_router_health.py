"""Figures of routers for the log and trackers, and the warning about experts that nothing reaches."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from megatron_swift.models.routing import LayerRecord, Routing
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.parallel.routers import LayerReport, RouterTotals
from megatron_swift.testing import make_tiny_model
from megatron_swift.train.router_health import RouterHealth, by_layer, summary
from tiny_models import read_config


def layer(number: int, load: list[float], dropped: int = 0, balance=1.0, z=0.5, entropy=1.0) -> LayerReport:
    return LayerReport(number, np.array(load, dtype=np.float64), dropped, balance, z, entropy)


REPORTS = (layer(1, [6, 2, 0, 0], balance=1.5, z=4.0, entropy=0.5), layer(3, [2, 2, 3, 1], balance=1.1, entropy=1.3))


def test_summary():
    """Means over the layers; the busiest expert of all; experts without a token in all."""
    assert summary(REPORTS) == {
        "load_balancing_loss": pytest.approx(1.3),
        "z_loss": pytest.approx(2.25),
        "router-entropy": pytest.approx(0.9),
        "expert-load max/ideal": pytest.approx(3.0),
        "idle experts": 2.0,
    }
    assert summary(()) == {}


def test_dropped_tokens_are_named_where_there_are_some():
    assert "dropped tokens" not in summary(REPORTS)
    assert summary((layer(0, [4, 4], dropped=3), layer(1, [8, 0], dropped=4)))["dropped tokens"] == 7


def test_by_layer():
    values = by_layer(REPORTS)
    kinds = ("load_balancing_loss", "z_loss", "entropy", "load max/ideal", "idle experts")
    assert sorted(values) == sorted(f"moe/{kind} layer {number}" for kind in kinds for number in (1, 3))
    assert values["moe/load max/ideal layer 1"] == 3.0 and values["moe/load max/ideal layer 3"] == 1.5
    assert values["moe/idle experts layer 1"] == 2 and values["moe/idle experts layer 3"] == 0
    assert values["moe/entropy layer 3"] == 1.3 and values["moe/z_loss layer 1"] == 4.0
    assert values["moe/load_balancing_loss layer 1"] == 1.5


def test_a_layer_without_any_token():
    assert summary((layer(0, [0, 0]),))["expert-load max/ideal"] == 0


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The warnings so far, and none twice."""
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)

    def take() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return take


def test_a_dead_expert_is_named_once(warnings):
    health = RouterHealth(patience=3)
    for iteration in (1, 2):
        health.step(iteration, REPORTS)
    assert warnings() == []
    health.step(3, REPORTS)
    (said,) = warnings()
    assert said.startswith("iteration 3: layer 1, experts 2, 3: no token for 3 iterations")
    assert "--moe_aux_loss_coeff" in said
    for iteration in range(4, 12):
        health.step(iteration, REPORTS)
    assert warnings() == []


def test_a_token_starts_the_count_anew(warnings):
    health = RouterHealth(patience=2)
    idle, busy = (layer(0, [8, 0]),), (layer(0, [7, 1]),)
    for iteration, reports in enumerate((idle, busy, idle, busy), 1):
        health.step(iteration, reports)
    assert warnings() == []
    for iteration in (5, 6, 7):
        health.step(iteration, idle)
    (said,) = warnings()
    assert said.startswith("iteration 6: layer 0, expert 1: no token for 2 iterations")
    health.step(8, busy)  # it lived again
    health.step(9, idle)
    health.step(10, idle)
    assert len(warnings()) == 1


def test_layers_are_counted_apart(warnings):
    health = RouterHealth(patience=2)
    health.step(1, (layer(0, [8, 0]), layer(1, [0, 8])))
    health.step(2, (layer(0, [4, 4]), layer(1, [0, 8])))
    assert [said[:32] for said in warnings()] == ["iteration 2: layer 1, expert 0: "]


def test_totals_of_a_step(tmp_path):
    """Loads and drops are summed over micro-batches, losses averaged over them, entropy over tokens; then it starts anew."""
    cfg = read_config(make_tiny_model(tmp_path, family="qwen3_moe", layers=3, mlp_only_layers=[1]))
    totals = RouterTotals(cfg, Mesh(0, 1, torch.device("cpu"), "gloo"))
    empty = torch.zeros(0, dtype=torch.int64)

    def routed(load, dropped, entropy, balance, z) -> Routing:
        numbers = (torch.tensor(float(v)) for v in (dropped, entropy, balance, z))
        record = LayerRecord(torch.tensor(load), *numbers)
        routing = Routing(None, empty, empty, empty, 0)
        routing.records.update({0: record, 2: record})
        return routing

    totals.add([routed([2.0, 2, 2, 0], 1, 3.0, 1.2, 5.0)])
    totals.add([routed([4.0, 0, 0, 6], 0, 2.0, 1.4, 7.0)])
    reports = totals.reports(totals.take().numpy())
    assert [r.number for r in reports] == [0, 2]
    for report in reports:
        assert report.load.tolist() == [6, 2, 2, 6] and report.dropped == 1
        assert report.balance == pytest.approx(1.3) and report.z == pytest.approx(6.0)
        assert report.entropy == pytest.approx(5.0 / 8)  # 16 choices of two experts each
        assert report.busiest == 1.5
    assert all(r.load.sum() == 0 and math.isclose(r.balance, 0) for r in totals.reports(totals.take().numpy()))
