"""`ckpt_format torch`, written by any number of ranks: one file, which torch.load and we read, and no hang where something fails."""

from __future__ import annotations

import argparse
import errno
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from foreign import MODELS, Foreign
from tiny_weights import pieces_of_rank, random_weights

from megatron_swift.checkpoint.dcp import Piece, pieces_of
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_common import common_values
from megatron_swift.checkpoint.publish import publish
from megatron_swift.checkpoint.ranks import all_ranks, single
from megatron_swift.checkpoint.snapshot import Snapshot
from megatron_swift.checkpoint.torch_file import write_torch
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import StorageError

LAYERS = 4


def made(model, dtype=torch.float32):
    return Foreign(MODELS[model], random_weights(tensor_specs(MODELS[model]), dtype))


def content(model):
    return common_values(MODELS[model], iteration=5, consumed_samples=20, parallel_size=1)


def _write(rank, folder, model, ranks, dtype):
    foreign = made(model, dtype)
    if ranks > 1:
        dist.init_process_group("gloo")
    mine = pieces_of_rank(foreign.specs, foreign.weights, rank, ranks, num_layers=LAYERS)
    write_torch(folder, mine, all_ranks(), content(model) if rank == 0 else None)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_what_ranks_write(tmp_path, model, ranks, dtype):
    """Rows that end inside experts and halves; the keys are GPTModel.state_dict()'s."""
    run_ranks(_write, ranks, tmp_path, model, ranks, dtype)
    foreign = made(model, dtype)
    assert not foreign.differences(tmp_path)
    value = torch.load(tmp_path / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    args = value["args"]
    assert isinstance(args, argparse.Namespace) and (args.tensor_model_parallel_size, args.num_layers) == (1, LAYERS)
    assert (value["checkpoint_version"], value["iteration"], args.consumed_train_samples) == (3.0, 5, 20)
    state = value["model"]
    for name, spec in foreign.specs.items():
        if not spec.experts:
            assert torch.equal(state[name], foreign.weights[name]) and state[name].dtype == dtype
    extra = {key for key, tensor in state.items() if tensor is None}
    assert all(key.endswith("._extra_state") for key in extra)
    at = "decoder.layers.0.mlp." + ("experts.local_experts.3." if foreign.cfg.moe else "")
    assert {f"{at}linear_fc1._extra_state", "decoder.layers.3.self_attention.linear_proj._extra_state"} <= extra
    assert ("output_layer._extra_state" in extra) != foreign.cfg.tied_embeddings
    if foreign.cfg.moe:
        third = foreign.weights["decoder.layers.2.mlp.experts.linear_fc2.weight"].chunk(4)[2]
        assert torch.equal(state["decoder.layers.2.mlp.experts.local_experts.2.linear_fc2.weight"], third)


def test_columns(tmp_path):
    """A rank of tensor parallelism holds some columns of each row."""
    foreign = made("moe")
    pieces = []
    for name, spec in foreign.specs.items():
        weight = foreign.weights[name]
        if weight.dim() == 1 or weight.shape[1] % 2:
            pieces += pieces_of(spec, weight, 0, num_layers=LAYERS)
            continue
        half = weight.shape[1] // 2
        for columns in ((0, half), (half, 2 * half)):
            pieces += pieces_of(spec, weight[:, slice(*columns)], 0, num_layers=LAYERS, columns=columns)
    write_torch(tmp_path, pieces, single(), content("moe"))
    assert not foreign.differences(tmp_path)


def _failing(rank, folder, failing, kind):
    dist.init_process_group("gloo")
    foreign = made("tied")
    mine = pieces_of_rank(foreign.specs, foreign.weights, rank, 2, num_layers=LAYERS)
    if kind == "piece" and rank == failing:
        bad = mine[7]

        def fail():
            raise OSError(errno.EIO, "cannot be read")

        mine[7] = Piece(bad.key, fail, bad.dtype, bad.size, bad.offset, bad.shape)
    if kind == "folder":
        folder = folder / "missing"
    try:
        write_torch(folder, mine, all_ranks(), {})
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


@pytest.mark.parametrize(
    ("failing", "kind", "said"), [(0, "piece", "EIO"), (1, "piece", "EIO"), (0, "folder", "ENOENT")]
)
def test_what_fails_is_raised_on_all(tmp_path, failing, kind, said):
    assert run_ranks(_failing, 2, tmp_path, failing, kind, timeout=30) == [said, said]


def _peak(rank, folder):
    """MB that writing 256 MB in pieces of 8 MB adds to this process at most."""
    number, rows, columns = 32, 1024, 2048

    def piece(i):
        read = partial(torch.full, (rows, columns), float(i))
        return Piece(f"decoder.layers.{i}.w", read, torch.float32, (rows, columns), (0, 0), (rows, columns))

    def memory(name):
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) / 1000

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    write_torch(folder, [piece(i) for i in range(number)], single(), {})
    grown = memory("VmHWM") - before
    value = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=True, mmap=True)["model"]
    assert all(bool((value[f"decoder.layers.{i}.w"] == i).all()) for i in range(number))
    return grown


def test_a_piece_is_in_memory_at_a_time(tmp_path):
    (grown,) = run_ranks(_peak, 1, tmp_path)
    assert grown < 64


def _limited(rank, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    foreign = made("moe")
    mine = pieces_of_rank(foreign.specs, foreign.weights, 0, 1, num_layers=LAYERS)
    try:
        publish(
            folder,
            1,
            lambda staging: Snapshot(mine, {}, file_format="torch").write(staging, single()) or {},
            group=single(),
        )
    except StorageError as error:
        return error.block()
    return "nothing"


def test_a_full_disk(tmp_path):
    (said,) = run_ranks(_limited, 1, tmp_path)
    assert "the disk or a quota is full" in said or "File too large" in said, said
    assert not list(tmp_path.iterdir())


def test_a_snapshot_in_this_format(tmp_path):
    """The optimizer's state lies beside it as ever; common.pt is left out, and the small files are not."""
    foreign, state = made("untied"), {}
    pieces = pieces_of_rank(foreign.specs, foreign.weights, 0, 1, num_layers=LAYERS)
    prefix = "optimizer.state.exp_avg."
    for name, spec in foreign.specs.items():
        state[name] = foreign.weights[name] + 1
        pieces += pieces_of(spec, state[name], 0, num_layers=LAYERS, prefix=prefix)
    files = {"state.json": b"{}", "common.pt": b"not wanted"}
    Snapshot(pieces, files, content=content("untied"), file_format="torch").write(tmp_path, single())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mp_rank_00", "optimizer", "state.json"]
    assert not foreign.differences(tmp_path) and not foreign.differences(tmp_path, prefix, state)
