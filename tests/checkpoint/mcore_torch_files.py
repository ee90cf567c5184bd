"""Run by megatron-core's own interpreter, beside ../shared/oracle: its GPTModel writes and reads `ckpt_format torch`.

make writes what Megatron-LM's save_checkpoint does: a file for each model-parallel rank, of the module's state_dict(). check loads such a file
with strict=True, after the norms were renamed from Transformer Engine's keys to those of the local layers, which run without it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mcore_oracle as oracle  # its folder is on PYTHONPATH
import torch
import torch.distributed as dist

RENAMED = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


def te_name(name: str, dense: bool) -> str:
    """A local layer's key as Transformer Engine calls it."""
    for theirs, ours in RENAMED if dense else RENAMED[:1]:
        name = name.replace(ours, theirs)
    return name


def do_make(o: Any, rank: int) -> None:
    from megatron.core import parallel_state as ps

    cfg, weights = oracle.read_hf(o.hf)
    dtype = getattr(torch, cfg["torch_dtype"])
    model = oracle.build_model(cfg, o, dtype, o.padded_vocab, "local")
    oracle.load_from_hf(model, cfg, weights)
    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    name += f"_{ps.get_pipeline_model_parallel_rank():03d}" if o.pp > 1 else ""
    name += f"_{ps.get_expert_model_parallel_rank():03d}" if o.ep > 1 else ""
    folder = Path(o.out) / "iter_0000001" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if o.layout == "te":
        sparse = {key.split(".mlp.")[0] for key in state if ".mlp.router." in key}
        state = {te_name(key, key.rsplit(".pre_mlp", 1)[0] not in sparse): value for key, value in state.items()}
    value = {"args": oracle.megatron_args(cfg, o, dtype), "checkpoint_version": 3.0, "iteration": 1, "model": state}
    torch.save(value, folder / "model_optim_rng.pt")
    if rank == 0:
        (Path(o.out) / "latest_checkpointed_iteration.txt").write_text("1")
        print(json.dumps(sorted(state)))


def do_check(o: Any, rank: int) -> int:
    cfg, _ = oracle.read_hf(o.hf)
    _, folder = oracle.iter_dir(o.mcore)
    value = torch.load(Path(folder) / "mp_rank_00" / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    assert value["checkpoint_version"] == 3.0 and value["args"].num_layers == cfg["num_hidden_layers"]
    model = oracle.build_model(cfg, o, torch.float32, None, "local")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = {}
    for key, tensor in value["model"].items():
        for theirs, ours in RENAMED:
            key = re.sub(re.escape(theirs) + "(?=weight|bias)", ours, key)
        state[key] = tensor
    model.load_state_dict(state, strict=True)
    ids = oracle.test_ids(cfg)
    found, wanted = oracle.mcore_logits(model, ids, o), oracle.hf_logits(o.hf, ids)
    difference = (found[..., : wanted.shape[-1]] - wanted).abs().max().item()
    print(json.dumps({"ok": difference <= o.tol, "max_abs_logits_diff": difference, "mcore": oracle.mcore_version()}))
    return 0 if difference <= o.tol else 1


def worker(rank: int, o: Any, port: int, world: int, answers: Any) -> None:
    """The oracle's launcher, with the two commands of this file."""
    oracle.do_make, oracle.do_check = do_make, do_check
    _inner(rank, o, port, world, answers)


_inner = oracle._worker

if __name__ == "__main__":
    assert not dist.is_initialized()
    oracle._worker = worker
    sys.exit(oracle.main())
