"""When data-parallel collectives are issued: what --overlap_grad_reduce and --overlap_param_gather say about each sharding.

That numbers are the same in each is shown in test_layouts.py. Here the order in which one rank issues its work is written down.
"""

from __future__ import annotations

import pytest
import torch
from test_data_parallel import samples_of_steps
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.data import Sharding
from megatron_swift.testing import make_tiny_model, run_ranks
from tiny_models import SMALL, as_batch, make_engine

LAYERS, MICRO = 4, 3
COLLECTIVES = {"reduce_scatter": "reduce", "allgather": "gather", "allreduce": "reduce"}


class Diary(TorchDispatchMode):
    """Writes down collectives, and the layers whose forward or backward begins."""

    def __init__(self, layers):
        super().__init__()
        self.lines = []
        for number, layer in enumerate(layers):
            layer.self_attention.register_forward_pre_hook(self.forward_of(number))
            layer.mlp.register_forward_hook(self.backward_of(number))

    def forward_of(self, number):
        return lambda module, args: self.lines.append(f"forward {number}")

    def backward_of(self, number):
        def watch(module, args, out):
            out[1].register_hook(lambda grad: self.lines.append(f"backward {number}"))

        return watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name, line in COLLECTIVES.items():
            if str(func).startswith("c10d") and name in str(func):
                self.lines.append(line)
        return func(*args, **(kwargs or {}))


def diary(rank, folder, sharding):
    """A step of MICRO micro-batches, without the sums of losses and of the gradient's squares, which are all-reduces too."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1)
    engine = make_engine(folder, torch.float32, mesh, sharding=sharding)
    batches = [as_batch(micro) for micro in samples_of_steps(MICRO)[0]]
    engine._total = lambda losses, *counts: [0.0]
    engine.shards.issue_grad_norm = lambda: None
    with Diary(engine.chunks[0].layers) as written:
        engine.forward_backward(batches, num_tokens=1)
    mesh_module.stop()
    return written.lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS, **SMALL)


def between(lines, start, end):
    return lines[lines.index(start) : lines.index(end)]


@pytest.mark.parametrize("sharding", list(Sharding), ids=lambda s: s.value)
def test_when_gradients_are_reduced(folder, sharding):
    """With FSDP2 each layer's, before the next layer's backward begins; without shards all at once, when the last backward is over."""
    for lines in run_ranks(diary, 2, folder, sharding):
        assert lines.count("backward 0") == MICRO
        last = lines[len(lines) - lines[::-1].index("forward 0") - 1 :]
        if sharding is Sharding.NO_SHARD:
            assert lines.count("reduce") == 1 and last[-2:] == ["backward 0", "reduce"]
            continue
        for number in range(LAYERS - 1, 0, -1):
            assert between(last, f"backward {number}", f"backward {number - 1}").count("reduce") == 1
        micro_batches = 1 if sharding is Sharding.OPTIM else MICRO
        assert lines.count("reduce") == micro_batches * (LAYERS + 1)  # the layers, and what is around them


@pytest.mark.parametrize("sharding", list(Sharding), ids=lambda s: s.value)
def test_when_weights_are_gathered(folder, sharding):
    """With FSDP2 each layer's once the layer before has been issued, in the first micro-batch or, where weights are shards, in each."""
    for lines in run_ranks(diary, 2, folder, sharding):
        if sharding is Sharding.NO_SHARD:
            assert "gather" not in lines
            continue
        for number in range(1, LAYERS):
            assert between(lines, f"forward {number - 1}", f"forward {number}").count("gather") == 1
        whole = sharding is not Sharding.OPTIM_GRADS_PARAMS
        second = lines[lines.index("backward 0") :]
        assert second.count("gather") == 0 if whole else second.count("gather") >= (MICRO - 1) * (LAYERS + 1)
