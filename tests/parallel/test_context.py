"""What a query chunk sees under context parallelism: the right keys, made once per row. Numbers are shown in test_layouts.py."""

from __future__ import annotations

import pytest
import torch
from test_data_parallel import samples_of_steps

from megatron_swift.data.loader import collate
from megatron_swift.parallel import mesh as mesh_module
from megatron_swift.parallel.context import ContextSegments, context_segments, own_kernels, zigzag
from megatron_swift.parallel.mesh import Axis, Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from tiny_models import SMALL, make_engine

CPU = torch.device("cpu")
LENGTHS = (4, 12, 8)


@pytest.mark.parametrize("cp", [1, 2])
def test_a_chunk_sees_every_earlier_token_of_its_segment(cp):
    """Square and rectangle together are the causal mask of each segment, pair by pair."""
    segments = context_segments(LENGTHS, cp=cp, device=CPU)
    of_segment = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.int64)
    for rank in range(cp):
        mine = zigzag(LENGTHS, cp=cp, rank=rank)
        for half, number in enumerate((rank, 2 * cp - 1 - rank)):
            queries = mine[segments.halves[half]]
            for blocks, keys, causal in segments.seen_by(number):
                for rows, columns in blocks:
                    visible = torch.ones(len(queries[rows]), len(keys[columns]), dtype=torch.int64)
                    seen[queries[rows][:, None], keys[columns]] += visible.tril() if causal else visible
    expected = (of_segment[:, None] == of_segment) & torch.ones_like(seen).bool().tril()
    assert torch.equal(seen, expected.long())


def indexes_made(rank, folder):
    """How often key blocks are made in a step of four rows."""
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=Sizes(cp=2))
    engine = make_engine(folder, torch.float64, mesh)
    made, make = [], ContextSegments._key_blocks

    def counted(segments, number):
        made.append(number)
        return make(segments, number)

    ContextSegments._key_blocks = counted  # in this rank alone, which is a fork
    multiples = {"pad_to_multiple": engine.row_multiple, "segment_multiple": engine.segment_multiple}
    batches = [collate(micro, pad_id=0, rows=(), **multiples) for micro in samples_of_steps(4)[0]]
    engine.forward_backward(batches, num_tokens=1)
    mesh_module.stop()
    return made


@pytest.mark.parametrize(
    ("kind", "size", "own"),
    [("all_gather", 1, ""), ("a2a", 2, ""), ("p2p", 2, "by p2p"), ("all_gather", 2, "by all_gather")],
)
def test_which_form_asks_for_no_other_kernel(kind, size, own):
    said = own_kernels(kind, Axis(0, tuple(range(size))))
    assert own in said and bool(said) == bool(own)


def attention_line(rank, folder, kind):
    mesh = mesh_module.start(backend="gloo", timeout_minutes=1, sizes=Sizes(cp=2))
    engine = make_engine(folder, torch.float32, mesh, context_kind=kind, transformer_engine="where it runs")
    mesh_module.stop()
    return engine.kernels["attention"]


@pytest.mark.parametrize(("kind", "said"), [("p2p", "by p2p attends block by block"), ("a2a", "takes a CUDA device")])
def test_transformer_engine_is_accounted_for(tmp_path, kind, said):
    folder = make_tiny_model(tmp_path, layers=1, **SMALL)
    assert all(said in line for line in run_ranks(attention_line, 2, folder, kind))


def test_made_once_per_row(tmp_path):
    """However many layers there are, forward and backward."""
    folder = make_tiny_model(tmp_path, layers=3, **SMALL)
    assert run_ranks(indexes_made, 2, folder) == [[0, 3] * 4, [1, 2] * 4]
