"""The layouts on the GPUs of one machine: the same numbers first, then speed, overlap and faults. One call does everything.

    python benchmarks/many_gpus.py [--gpus N] [--parts numbers speed scaling peers] [--out FILE] [--trace FOLDER]
    python benchmarks/many_gpus.py --rehearse --gpus 8        # the same lines on CPU and gloo, tiny shapes
    LD_PRELOAD=libnccl.so.2 python benchmarks/many_gpus.py --one_gpu --gpus 4 --parts numbers     # NCCL between ranks that share one GPU

numbers : 3 optimizer steps of a small dense and a small MoE model under each layout, against one process of it: losses and gradient norms of every
          step and the norm of the parameters at the end, relative differences. float32 (TF32 off) to 1e-4; bfloat16 to 3e-2.
speed   : the settings of ms-swift's two benchmarks, cut to fit: Qwen2.5-14B's shape, TP 4 with sequence parallelism, packed 8192, global batch 16;
          Qwen1.5-MoE-A2.7B, TP 2, EP 4. Beside each, our own ZeRO-3. s/it, tokens/s/GPU, model TFLOP/s/GPU, GiB; NCCL time under compute.
scaling : Qwen2.5-1.5B's shape on 1, 2, 4, 8 GPUs, the batch growing with them; TP 2 with and without --tp_comm_overlap.
peers   : the 14B shape in transformers with FSDP2 (fully_shard), what a user would pick.

--one_gpu shows that NCCL and symmetric memory give the same numbers where there is a single GPU; it says nothing of speed, as the ranks take
turns on it. It takes NCCL 2.30 or later (preloaded where torch comes with an older one).

Each job runs in processes of its own, forked from one that has imported torch; one that fails is recorded and the next one runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu import DENSE, FULL, MOE, fill, release

from megatron_swift.checkpoint.initial import InitialWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.data.loader import collate
from megatron_swift.data.types import Batch, Sample
from megatron_swift.models.config import ModelConfig, MoEConfig
from megatron_swift.parallel import mesh as meshes
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Mesh, Sizes
from megatron_swift.testing import run_ranks
from megatron_swift.train.flops import step_flops
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import load_weights
from megatron_swift.train.step import train_step

WARM_UP = 2
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
SP = {"sequence_parallel": True}
DENSE_14B = DENSE.replace(
    num_layers=48,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=8,
    vocab_size=152064,
    tied_embeddings=False,
)


def small(*, moe: bool) -> ModelConfig:
    """A model that a moment computes, of odd sizes: five layers, a prime vocabulary."""
    experts = MoEConfig(
        num_experts=8,
        topk=2,
        ffn_hidden_size=96,
        shared_size=128,
        pre_softmax=False,
        sparse_layers=(True,) * 5,
        aux_loss_coeff=0.01,
    )
    return DENSE.replace(
        num_layers=5,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=1009,
        tied_embeddings=not moe,
        moe=experts if moe else None,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one world of ranks does. lengths: segments of a micro-batch. batch: micro-batches of a step over all data-parallel ranks."""

    part: str
    name: str
    ranks: int
    model: str
    lengths: tuple[int, ...]
    batch: int
    dtype: str = "bfloat16"
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3


def models(rehearse: bool) -> dict[str, ModelConfig]:
    """The shapes by name; when rehearsing, all of them small."""
    dense, moe = small(moe=False), small(moe=True)
    if rehearse:
        return {"small": dense, "small moe": moe, "14b": dense, "a2.7b": moe, "1.5b": dense}
    whole = MOE.replace(num_layers=24, moe=dataclasses.replace(MOE.moe, sparse_layers=(True,) * 24))  # type: ignore[type-var]
    return {"small": dense, "small moe": moe, "14b": DENSE_14B, "a2.7b": whole, "1.5b": DENSE}


# (name, sizes, options) for N ranks; those that do not divide N are left out.
LAYOUTS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("dp", {}, {}),
    ("zero0", {}, {"sharding": "no_shard"}),
    ("zero2", {}, {"sharding": "optim_grads"}),
    ("zero3", {}, {"sharding": "optim_grads_params"}),
    ("tp2", {"tp": 2}, {}),
    ("tp2 sp", {"tp": 2}, SP),
    ("tp4 sp", {"tp": 4}, SP),
    ("tp2 sp overlap", {"tp": 2}, SP | {"tp_comm_overlap": True}),
    ("tp4 sp overlap", {"tp": 4}, SP | {"tp_comm_overlap": True}),
    ("pp2", {"pp": 2}, {}),
    ("pp2 virtual", {"pp": 2}, {"chunks_per_rank": 2}),
    ("pp4", {"pp": 4}, {}),
    ("cp2", {"cp": 2}, {}),
    ("cp2 p2p", {"cp": 2}, {"context_kind": "p2p"}),
    ("cp2 a2a", {"cp": 2}, {"context_kind": "a2a"}),
    ("tp2 pp2 sp", {"tp": 2, "pp": 2}, SP),
    ("tp2 pp2 cp2 sp", {"tp": 2, "pp": 2, "cp": 2}, SP),
]
EXPERT_LAYOUTS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("ep2", {"ep": 2}, {}),
    ("ep4", {"ep": 4}, {}),
    ("ep4 tp2 sp", {"ep": 4, "tp": 2, "etp": 1}, SP),
    ("ep2 etp2 tp2 sp", {"ep": 2, "tp": 2, "etp": 2}, SP),
    ("ep2 pp2", {"ep": 2, "pp": 2}, {}),
]


def numbers_jobs(gpus: int) -> Iterator[Job]:
    """One process, then each layout that `gpus` ranks can have."""
    for model, layouts in (("small", LAYOUTS), ("small moe", EXPERT_LAYOUTS)):
        for dtype in BOUNDS:
            common = dict(part="numbers", model=model, dtype=dtype, lengths=(96, 32, 128), batch=gpus)
            yield Job(name="one process", ranks=1, sizes={"ep": 1} if "moe" in model else {}, **common)  # type: ignore[arg-type]
            for name, sizes, options in layouts:
                both = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
                of_experts = sizes.get("etp", sizes.get("tp", 1)) * sizes.get("ep", 1) * sizes.get("pp", 1)
                if gpus % both == 0 and gpus % of_experts == 0 and (name != "pp2 virtual" or gpus // both >= 1):
                    yield Job(name=name, ranks=gpus, sizes=sizes, options=options, **common)  # type: ignore[arg-type]


def speed_jobs(gpus: int) -> Iterator[Job]:
    """The two settings, and ZeRO-3 on the same rows."""
    tp = min(4, gpus)
    dense = dict(part="speed", ranks=gpus, model="14b", lengths=(8192,), batch=16)
    yield Job(name=f"14b tp{tp} sp", sizes={"tp": tp}, options=SP | {"recompute": True}, **dense)  # type: ignore[arg-type]
    yield Job(name="14b zero3", options={"sharding": "optim_grads_params", "recompute": True}, **dense)  # type: ignore[arg-type]
    tp, ep = min(2, gpus), min(4, gpus)
    moe = dict(part="speed", ranks=gpus, model="a2.7b", lengths=(8192,), batch=16)
    sizes = {"tp": tp, "ep": ep, "etp": 1}
    yield Job(name=f"a2.7b tp{tp} ep{ep}", sizes=sizes, options=SP | {"recompute": True}, **moe)  # type: ignore[arg-type]
    options = {"sharding": "optim_grads_params", "recompute": True}
    yield Job(name="a2.7b zero3", sizes={"ep": 1}, options=options, **moe)  # type: ignore[arg-type]


def scaling_jobs(gpus: int) -> Iterator[Job]:
    """The same work on each of more and more GPUs."""
    ranks = [n for n in (1, 2, 4, 8) if n <= gpus]
    for n in ranks:
        yield Job(part="scaling", name=f"1.5b dp{n}", ranks=n, model="1.5b", lengths=(4096,) * 4, batch=n)
    if gpus >= 2:
        for overlap in (False, True):
            options = SP | {"tp_comm_overlap": overlap}
            name = "1.5b tp2" + (" overlap" if overlap else "")
            yield Job(
                **dict(part="scaling", name=name, ranks=2, model="1.5b", lengths=(4096,) * 4, batch=1),  # type: ignore[arg-type]
                sizes={"tp": 2},
                options=options,
            )


# --- what a rank does ------------------------------------------------------------------------------------------------


def make_batches(job: Job, cfg: ModelConfig, mesh: Mesh, multiple: int, step: int) -> list[Batch]:
    """This data-parallel rank's micro-batches of a step."""
    rng = np.random.default_rng(step)
    batches = []
    for micro in range(job.batch):
        rows = [rng.integers(0, cfg.vocab_size, n).astype(np.int32) for n in job.lengths]
        if micro % mesh.dp_size == mesh.dp_rank:
            samples = [Sample(ids, ids) for ids in rows]
            batches.append(collate(samples, pad_to_multiple=multiple, pad_id=0, rows=()))
    return batches


def engine_for(job: Job, cfg: ModelConfig, mesh: Mesh) -> Engine:
    """The engine that the job asks for."""
    options = dict(job.options)
    if options.pop("recompute", False):
        options["recompute"] = FULL
    if "sharding" in options:
        options["sharding"] = Sharding(options["sharding"])
    return build_engine(cfg, mesh, EngineOptions(compute_dtype=getattr(torch, job.dtype), **options))


def do(job: Job, cfg: ModelConfig, trace: str | None) -> dict[str, Any]:
    """Run one job on this rank."""
    mesh = meshes.start(backend="nccl", timeout_minutes=3, sizes=Sizes(**job.sizes))
    cuda = mesh.device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        engine = engine_for(job, cfg, mesh)
        if job.part == "numbers":
            load_weights(engine.shards, tensor_specs(cfg), InitialWeights(num_layers=cfg.num_layers, seed=1, std=0.02))
        else:
            fill(engine)
        optimizer = Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1))
        scale = LossScale.for_dtype(job.dtype)
        found, at = [], 0.0
        warm_up = 0 if job.part == "numbers" else WARM_UP
        for number in range(warm_up + job.steps):
            if number == warm_up:
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                at = time.perf_counter()
            batches = make_batches(job, cfg, mesh, engine.row_multiple, number)
            found.append(train_step(engine, optimizer, batches, lr=1e-4, clip_grad=1.0, loss_scale=scale))
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - at) / job.steps
        last = found[-1]
        result: dict[str, Any] = {
            "losses": [report.loss for report in found],
            "grad_norms": [report.grad_norm for report in found],
            "seconds": seconds,
            "tokens_per_second_gpu": last.counts.tokens / seconds / job.ranks,
            "tflops_gpu": step_flops(cfg, last.counts) / seconds / job.ranks / 1e12,
        }
        if job.part == "numbers":
            result["params_norm"] = engine.shards.params_norm()
        if cuda:
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if cuda and job.ranks > 1 and job.part != "numbers":
            result |= overlap(
                lambda: train_step(engine, optimizer, batches, lr=1e-4, clip_grad=1.0, loss_scale=scale),
                trace,
                job.name,
            )
        release(engine, optimizer)
        return result
    finally:
        meshes.stop()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def overlap(step: Any, trace: str | None, name: str) -> dict[str, float]:
    """Of one profiled step on this rank: seconds of NCCL kernels, and the share of them during which another kernel runs too."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    if trace and int(os.environ.get("RANK", "0")) == 0:
        profiler.export_chrome_trace(str(Path(trace) / f"{name.replace(' ', '_')}.json.gz"))
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    communication, compute = merged(spans[True]), merged(spans[False])
    total = sum(stop - start for start, stop in communication)
    hidden = covered(communication, compute)
    return {"nccl_seconds": total / 1e6, "nccl_under_compute": hidden / total if total else 1.0}


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def covered(spans: Sequence[tuple[float, float]], by: Sequence[tuple[float, float]]) -> float:
    """How much of `spans` lies within `by`; both as `merged` gives them."""
    total, at = 0.0, 0
    for start, stop in spans:
        while at < len(by) and by[at][1] <= start:
            at += 1
        index = at
        while index < len(by) and by[index][0] < stop:
            total += min(stop, by[index][1]) - max(start, by[index][0])
            index += 1
    return total


def rank_job(rank: int, job: Job, rehearse: bool, trace: str | None, one_gpu: bool, limit: float) -> dict[str, Any]:
    """A job on one rank, in a fresh process. one_gpu: all ranks are on the first GPU. limit: of seconds; a rank that nears it says where it is."""
    faulthandler.dump_traceback_later(0.8 * limit)
    if one_gpu:
        os.environ["LOCAL_RANK"] = "0"
    cfg = models(rehearse)[job.model].replace(dtype=job.dtype)
    return do(job, cfg, trace)


def line(result: dict[str, Any]) -> str:
    """A result in a line."""
    if "error" in result:
        return result["error"].splitlines()[0]
    figures = {key: value for key, value in result.items() if not isinstance(value, list)}
    return f"loss {result['losses'][-1]:.6f}  " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items())


# --- the parent ------------------------------------------------------------------------------------------------------


def run_job(job: Job, *, rehearse: bool, trace: str | None, timeout: float, one_gpu: bool = False) -> dict[str, Any]:
    """The job and what rank 0 found, or the error of the ranks; said in a line."""
    try:
        result = run_ranks(rank_job, job.ranks, job, rehearse, trace, one_gpu, timeout, timeout=timeout)[0]
    except (AssertionError, RuntimeError, TimeoutError) as error:
        result = {"error": str(error)[-1500:]}
    print(f"{job.part:8s} {job.ranks} ranks  {job.model:9s} {job.dtype:8s} {job.name:16s} {line(result)}", flush=True)
    return dataclasses.asdict(job) | {"result": result}


def count_gpus() -> int:
    """Without CUDA, which must not be started in a process that forks ranks."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return 0
    return listed.count("GPU ")


def rehearsed(job: Job) -> Job:
    """The job in float32 and with short rows."""
    return dataclasses.replace(job, lengths=tuple(min(n, 128) for n in job.lengths), dtype="float32")


def judge(results: list[dict[str, Any]]) -> list[str]:
    """The layouts whose numbers are not those of one process, each in a line."""
    wrong = []
    references = {(r["model"], r["dtype"]): r["result"] for r in results if r["part"] == "numbers" and r["ranks"] == 1}
    for entry in results:
        result = entry["result"]
        name = f"{entry['part']} {entry['model']} {entry['dtype']} {entry['name']}"
        if "error" in result:
            wrong.append(f"{name}: {result['error']}")
        elif entry["part"] == "numbers" and "losses" in (one := references[entry["model"], entry["dtype"]]):
            pairs = [
                *zip(result["losses"], one["losses"], strict=True),
                *zip(result["grad_norms"], one["grad_norms"], strict=True),
            ]
            pairs.append((result["params_norm"], one["params_norm"]))
            result["difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            if not result["difference"] <= BOUNDS[entry["dtype"]]:
                wrong.append(f"{name}: differs by {result['difference']:.2e}")
    return wrong


def main() -> None:
    """Run the parts, print the verdict, perhaps keep the JSON. Exit code 1 where a layout is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=count_gpus() or 2)
    parser.add_argument(
        "--parts", nargs="+", choices=("numbers", "speed", "scaling", "peers"), default=["numbers", "speed", "scaling"]
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--one_gpu", action="store_true", help="all ranks share the first GPU: numbers only")
    parser.add_argument("--dtypes", nargs="+", choices=BOUNDS, default=list(BOUNDS), help="of the part numbers")
    parser.add_argument("--layouts", nargs="+", help="of the part numbers, by name; all where left out")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one job")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", help="folder for Chrome traces of one step of each speed job")
    arguments = parser.parse_args()
    makers = {"numbers": numbers_jobs, "speed": speed_jobs, "scaling": scaling_jobs}
    jobs = [job for part in arguments.parts if part in makers for job in makers[part](arguments.gpus)]
    jobs = [job for job in jobs if job.part != "numbers" or job.dtype in arguments.dtypes]
    if arguments.layouts:
        wanted = {"one process", *arguments.layouts}
        jobs = [job for job in jobs if job.part != "numbers" or job.name in wanted]
    if arguments.one_gpu:
        jobs = [job for job in jobs if job.part == "numbers"]
        # NCCL refuses ranks that share a GPU, and torch's symmetric memory does, unless they are told.
        os.environ.update(NCCL_MULTI_RANK_GPU_ENABLE="1", TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")
    if arguments.rehearse:
        jobs = [
            rehearsed(job)
            for job in jobs
            if not job.options.get("tp_comm_overlap") and not (job.part == "numbers" and job.dtype == "bfloat16")
        ]
    settings = dict(
        rehearse=arguments.rehearse, trace=arguments.trace, one_gpu=arguments.one_gpu, timeout=arguments.timeout
    )
    results = [run_job(job, **settings) for job in jobs]
    if "peers" in arguments.parts:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.gpus}"]
        subprocess.run(
            [*command, str(Path(__file__).with_name("many_gpus_peer.py"))], timeout=arguments.timeout, check=False
        )
    wrong = judge(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    compared = [entry["result"]["difference"] for entry in results if "difference" in entry["result"]]
    if compared:
        print(f"{len(compared)} layouts compared with one process, largest relative difference {max(compared):.2e}")
    print("\n".join(wrong) if wrong else "nothing is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
