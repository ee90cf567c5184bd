"""What a pipeline prepares before its schedules run, so that on GPUs no stage waits for another one for ever."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.pipeline import Links, Pipeline
from megatron_swift.testing import run_ranks

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


class Noted(Links):
    """Links that note who talks to whom, in which direction and whether over the end of the ring."""

    def __init__(self, *args, **options):
        self.used: list[tuple[str, str, bool]] = []
        super().__init__(*args, **options)

    def send(self, tensor, direction):
        to = self.axis.rank + (1 if direction == "forward" else -1)
        self.used.append(("to", direction, 0 <= to < self.axis.size))
        return super().send(tensor, direction)

    def receive(self, into, direction):
        source = self.axis.rank - (1 if direction == "forward" else -1)
        self.used.append(("from", direction, 0 <= source < self.axis.size))
        return super().receive(into, direction)


def links_of_a_run(rank, stages, chunks):
    """(links used before the schedule, links used by it) on one rank."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=Sizes(pp=stages))
    links = Noted(mesh.pp, mesh.device, ring=chunks > 1)
    before, links.used = set(links.used), []
    weight = torch.ones(3, requires_grad=True)

    def forward(chunk, micro, hidden):
        out = weight * (1.0 if hidden is None else hidden)
        return out.sum() if (rank, chunk) == (stages - 1, chunks - 1) else out

    losses = Pipeline(mesh.pp, links, chunks).run(
        4, forward, shape=lambda micro: (3,), dtype=torch.float32, device=mesh.device, train=True
    )
    mesh_module.stop()
    return before, set(links.used), [float(loss) for loss in losses]


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (3, 2)])
def test_every_link_of_a_schedule_has_met_before(stages, chunks):
    """And no other: each would hold memory of a GPU."""
    found = run_ranks(links_of_a_run, stages, stages, chunks)
    for before, used, _ in found:
        assert used and before == used
    assert found[-1][2] == [3.0] * 4


def queues_on_a_rank(rank, sizes, asked):
    os.environ.pop(QUEUES, None)
    if asked is not None:
        os.environ[QUEUES] = asked
    mesh_module.start(backend="gloo", timeout_minutes=1, sizes=sizes)
    mesh_module.stop()
    return os.environ.get(QUEUES)


@pytest.mark.parametrize(
    ("sizes", "asked", "expected"), [(Sizes(pp=2), "1", "32"), (Sizes(pp=2), None, "32"), (Sizes(tp=2), "1", "1")]
)
def test_pipeline_stages_have_queues_of_their_own(sizes, asked, expected):
    """Megatron-SWIFT sets 1, and its users have that in their scripts."""
    assert run_ranks(queues_on_a_rank, 2, sizes, asked) == [expected] * 2


def test_who_asked_for_one_queue_is_told(monkeypatch, caplog):
    monkeypatch.setenv(QUEUES, "1")
    mesh_module._ask_for_queues()
    assert f"{QUEUES}=1 is raised to 32" in caplog.text
    caplog.clear()
    mesh_module._ask_for_queues()
    assert not caplog.text and os.environ[QUEUES] == "32"
