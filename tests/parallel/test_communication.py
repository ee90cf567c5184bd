"""What a rank sends in a training step is what docs/parallelism.md says: counted at torch.distributed's operators, to the byte."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.testing import run_ranks

ROOT = Path(__file__).parents[2]


def load_benchmark():
    """benchmarks/communication.py as a module."""
    spec = importlib.util.spec_from_file_location("communication", ROOT / "benchmarks" / "communication.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


communication = load_benchmark()
SHAPE = communication.Shape()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return communication.make_model(tmp_path_factory.mktemp("model"), SHAPE)


# In bfloat16 what is gathered has two bytes and what is summed four.
MIXED = ("tp2 sequence_parallel", "pp2", "cp2 all_gather", "cp2 p2p", "dp2 no_shard", "dp2 optim_grads_params")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in communication.CASES] + [(name, torch.bfloat16) for name in MIXED],
    ids=str,
)
def test_every_byte_is_in_the_formula(folder, name, dtype):
    case = communication.CASES[name]
    expected = communication.formula(case, SHAPE, dtype)
    assert expected.total() > 10_000
    for counted in run_ranks(communication.count_step, case.ranks, folder, case, SHAPE, dtype):
        assert counted == expected


def test_the_table_of_the_docs():
    """Its figures are the formula's."""
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for name, case in communication.CASES.items():
        expected = communication.formula(case, SHAPE, torch.float32)
        assert communication.line(name, expected, expected) in text, name


def _talk(rank: int) -> list[object]:
    """A collective of each kind, counted; and the complaint about one that is not known."""
    mesh_module.start(backend="gloo", timeout_minutes=1)
    whole, part = torch.ones(12), torch.ones(4)
    counts: list[object] = []

    def count(call) -> None:
        with communication.Sent() as step:
            call()
        counts.append(dict(step.bytes))

    count(lambda: dist.all_reduce(whole))
    count(lambda: dist.all_gather_into_tensor(whole, part))
    count(lambda: dist.reduce_scatter_tensor(part, whole))
    count(lambda: dist.all_to_all_single(torch.empty(12), whole))
    count(lambda: dist.send(part, (rank + 1) % 3) if rank < 2 else None)
    count(lambda: dist.recv(part, rank - 1) if rank else None)
    try:
        count(lambda: dist.broadcast(part, 0))
    except AssertionError as error:
        counts.append(str(error))
    mesh_module.stop()
    return counts


def test_the_counter():
    """48 bytes over three ranks: twice two thirds of them for an all-reduce, two thirds for the others."""
    common = [{"all_reduce": 64}, {"all_gather": 32}, {"reduce_scatter": 32}, {"all_to_all": 32}]
    refused = "c10d::broadcast_ is not counted"
    for rank, counts in enumerate(run_ranks(_talk, 3)):
        assert counts == [*common, {"send": 16} if rank < 2 else {}, {}, refused]
