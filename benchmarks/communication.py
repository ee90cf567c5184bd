"""Bytes that a rank sends in one training step, counted at torch.distributed's own operators, beside the formulas of docs/parallelism.md.

    python benchmarks/communication.py [--dtype float32]

A tiny Qwen3 on forked gloo ranks; `Shape` holds its numbers. An operator that is not known here is an error, so nothing goes uncounted. What
a collective sends depends on the library's algorithm: counted is what a bandwidth-optimal one sends (a ring), from the size of its tensors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.weights import TORCH_DTYPES
from megatron_swift.data.loader import collate
from megatron_swift.data.types import IGNORE, Batch, Sample
from megatron_swift.models.families import describe
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.engine import Counts, EngineOptions
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import load_weights
from megatron_swift.train.step import train_step

Bytes = Counter  # kind of operation -> bytes that one rank sends, exact
ONCE = ("all_gather", "reduce_scatter", "all_to_all")
# c10d's operator -> its kind, and which argument is the larger tensor (what is gathered, what is scattered).
OPERATORS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("", 0),
}


def sent(kind: str, size: int, bytes_: int | Fraction) -> Bytes:
    """What each of `size` ranks sends in an operation on `bytes_` (the gathered or scattered whole), by the best algorithm."""
    share = {"all_reduce": Fraction(2 * (size - 1), size), "send": Fraction(1)}.get(kind, Fraction(size - 1, size))
    return Bytes({kind: share * bytes_})


class Sent(TorchDispatchMode):
    """Adds up in `bytes` what this rank sends. Raises AssertionError at an operator that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Bytes = Bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional")):
            assert name in OPERATORS, f"{name} is not counted"
            kind, place = OPERATORS[name]
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            if kind:
                self.bytes += sent(kind, group.size(), sum(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Shape:
    """The numbers of a tiny Qwen3 with tied embeddings, and the micro-batches of a step of one data-parallel rank: rows of these segments."""

    layers: int = 4
    hidden: int = 64
    inner: int = 96
    heads: int = 4
    groups: int = 2
    head_size: int = 32
    vocabulary: int = 264
    micro: int = 3
    segments: tuple[int, ...] = (24, 48, 16)  # each divisible by 2 cp
    trained: int = 40  # tokens with loss in each micro-batch

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return sum(self.segments)

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        rows = (self.heads + 2 * self.groups) * self.head_size
        matrices = self.hidden * (rows + self.heads * self.head_size + 3 * self.inner)
        return matrices + 2 * self.hidden + 2 * self.head_size

    @property
    def other_parameters(self) -> int:
        """Embedding and last norm."""
        return self.vocabulary * self.hidden + self.hidden


@dataclass(frozen=True)
class Case:
    """A layout. Every axis but one has one rank; context-parallel ranks shard the optimizer too."""

    ranks: int
    sizes: Sizes
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "tp2": Case(2, Sizes(tp=2)),
    "tp2 sequence_parallel": Case(2, Sizes(tp=2), {"sequence_parallel": True}),
    "pp2": Case(2, Sizes(pp=2)),
    **{
        f"cp{n} {kind}": Case(n, Sizes(cp=n), {"context_kind": kind})
        for n in (2, 4)
        for kind in ("all_gather", "p2p", "a2a")
    },
    **{f"dp2 {sharding.value}": Case(2, Sizes(), {"sharding": sharding}) for sharding in Sharding},
}


def formula(case: Case, shape: Shape, dtype: torch.dtype) -> Bytes:
    """What a rank sends in a step, as docs/parallelism.md has it. Divisions are exact for `Shape`'s numbers."""
    total = sent("all_reduce", case.ranks, 8 * (len(Counts._fields) + 2))  # besides the counts, the loss and the norm
    sizes, options = case.sizes, case.options
    if sizes.tp > 1:
        total += _tensor(shape, dtype, sizes.tp, options.get("sequence_parallel", False))
    if sizes.pp > 1:
        total += _pipeline(shape, dtype)
    if sizes.cp > 1:
        total += _context(shape, dtype, sizes.cp, options["context_kind"])
    if sizes.tp * sizes.pp < case.ranks:
        total += _data(shape, dtype, case.ranks, options.get("sharding", Sharding.OPTIM))
    return total


def _exact(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize


def _times(count: int, bytes_: Bytes) -> Bytes:
    return Bytes({kind: count * value for kind, value in bytes_.items()})


def _tensor(shape: Shape, dtype: torch.dtype, tp: int, sequence_parallel: bool) -> Bytes:
    """Four per layer; embedding and output layer have one each. Softmax: a maximum and two sums per trained token."""
    whole = shape.tokens * shape.hidden * dtype.itemsize
    total: Bytes = Bytes()
    for kind in ("all_gather", "reduce_scatter") if sequence_parallel else ("all_reduce",):
        total += _times(shape.micro * (4 * shape.layers + 2), sent(kind, tp, whole))
    total += _times(shape.micro, sent("all_reduce", tp, 3 * shape.trained * _exact(dtype)))
    norms = shape.layers * 2 * shape.head_size
    if sequence_parallel:
        norms += (2 * shape.layers + 1) * shape.hidden
    return total + sent("all_reduce", tp, norms * _exact(dtype))


def _pipeline(shape: Shape, dtype: torch.dtype) -> Bytes:
    """Of two stages each has one neighbour, and both hold the tied embedding."""
    tied = sent("all_reduce", 2, shape.vocabulary * shape.hidden * _exact(dtype))
    return tied + _times(shape.micro, sent("send", 2, shape.tokens * shape.hidden * dtype.itemsize))


def _context(shape: Shape, dtype: torch.dtype, cp: int, kind: str) -> Bytes:
    keys_values = shape.tokens * 2 * shape.groups * shape.head_size
    values, gradients = keys_values * dtype.itemsize, keys_values * _exact(dtype)
    if kind == "all_gather":
        once = _times(2, sent("all_gather", cp, values)) + sent("reduce_scatter", cp, gradients)
    elif kind == "p2p":
        once = _times(2 * (cp - 1), sent("send", cp, Fraction(values, cp))) + _times(
            cp, sent("send", cp, Fraction(gradients, cp))
        )
    else:
        groups = max(shape.groups, cp)  # fewer than ranks: replicated
        rows = shape.tokens * (2 * shape.heads + 2 * groups) * shape.head_size
        once = _times(2, sent("all_to_all", cp, Fraction(rows * dtype.itemsize, cp)))
    return _times(shape.micro * shape.layers, once)


def _data(shape: Shape, dtype: torch.dtype, ranks: int, sharding: Sharding) -> Bytes:
    layers, other = shape.layers * shape.layer_parameters, shape.other_parameters
    if sharding is Sharding.NO_SHARD:
        return sent("all_reduce", ranks, (layers + other) * _exact(dtype))
    reductions = 1 if sharding is Sharding.OPTIM else shape.micro
    total = _times(reductions, sent("reduce_scatter", ranks, (layers + other) * _exact(dtype)))
    gathers = (2 * shape.micro, shape.micro) if sharding is Sharding.OPTIM_GRADS_PARAMS else (1, 1)
    return total + sent("all_gather", ranks, (gathers[0] * layers + gathers[1] * other) * dtype.itemsize)


def make_model(folder: Path, shape: Shape) -> Path:
    """The tiny model of a shape."""
    return make_tiny_model(
        folder,
        family="qwen3",
        layers=shape.layers,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_size,
    )


def make_batches(shape: Shape) -> list[Batch]:
    """A step's micro-batches: the same on each data-parallel rank, which changes no size."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(shape.micro):
        samples, left = [], shape.trained
        for length in shape.segments:
            ids = rng.integers(0, shape.vocabulary, length).astype(np.int32)
            count = min(left, length - 1)  # the first token of a segment is predicted by none
            labels = np.where((np.arange(length) > 0) & (np.arange(length) <= count), ids, IGNORE).astype(np.int32)
            samples.append(Sample(ids, labels))
            left -= count
        assert left == 0
        batches.append(collate(samples, pad_to_multiple=1, pad_id=0, rows=()))
    return batches


def count_step(rank: int, folder: Path, case: Case, shape: Shape, dtype: torch.dtype) -> Bytes:
    """What this rank sends in its second training step, counted."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=case.sizes)
    cfg = describe(folder, model_type=None, template="chatml", chat_template=None).config
    engine = build_engine(cfg, mesh, EngineOptions(compute_dtype=dtype, **case.options))
    load_weights(engine.shards, tensor_specs(cfg), HuggingFaceWeights(folder, cfg))
    optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
    for _ in range(2):
        with Sent() as step:
            train_step(
                engine,
                optimizer,
                make_batches(shape),
                lr=1e-3,
                clip_grad=1.0,
                loss_scale=LossScale.for_dtype("float32"),
            )
    mesh_module.stop()
    return step.bytes


def line(name: str, expected: Bytes, counted: Bytes) -> str:
    """A line of the table in docs/parallelism.md, in kB; kinds below 0.1 kB (a few numbers per step) are left out of the last column."""
    kinds = ", ".join(f"{kind} {float(value) / 1e3:,.1f}" for kind, value in sorted(counted.items()) if value > 100)
    return f"| {name} | {float(expected.total()) / 1e3:,.1f} | {float(counted.total()) / 1e3:,.1f} | {kinds} |"


def main() -> None:
    """Print the table: of each case what is sent by formula and as counted on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    dtype, shape = TORCH_DTYPES[parser.parse_args().dtype], Shape()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), shape)
        for name, case in CASES.items():
            counted, expected = (
                run_ranks(count_step, case.ranks, model, case, shape, dtype)[0],
                formula(case, shape, dtype),
            )
            print(line(name, expected, counted), flush=True)


if __name__ == "__main__":
    main()
