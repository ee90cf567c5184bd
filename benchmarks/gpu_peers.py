"""What `benchmarks/gpu.py` is measured beside: transformers with Liger's kernels, on the same shapes and rows, padded where ours are packed.

    python benchmarks/gpu_peers.py [--cases llama8b ragged8192 ...] [--steps 4]

bfloat16 weights, SDPA attention, clip 1, torch's fused AdamW on float32 masters (moments and masters 12 bytes a parameter). Needs
transformers and liger-kernel. Ragged rows are padded to the longest of each of the batches that hold about 8192 real tokens, sorted by
nothing: a plain fine-tuning loop. Tokens per second count real tokens. The case alpaca takes the rows of gpu_rows.py, 64 per optimizer step, in
padded micro-batches of --rows (each count in turn; the fastest is the peer).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from gpu import CASES, Case
from gpu_rows import padded_batches
from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2
from torch import Tensor

from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.engine import Counts
from megatron_swift.train.flops import step_flops

WARM_UP = 2
ROWS_PER_STEP = 64


def make_model(cfg: ModelConfig) -> transformers.PreTrainedModel:
    """The shape as a transformers model with Liger's kernels, on the GPU in bfloat16."""
    sizes = dict(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_query_groups,
        vocab_size=cfg.vocab_size,
        tie_word_embeddings=cfg.tied_embeddings,
        max_position_embeddings=cfg.max_position_embeddings,
    )
    if cfg.qkv_bias:
        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=True)
        config: transformers.PretrainedConfig = transformers.Qwen2Config(**sizes)
    else:
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
        config = transformers.LlamaConfig(**sizes)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train()


PaddedBatch = tuple[Tensor, Tensor | None, Tensor]  # tokens, mask, labels


def make_batches(case: Case) -> list[PaddedBatch]:
    """The micro-batches of a step."""
    rng = np.random.default_rng(0)
    lengths = list(case.lengths)
    groups = [lengths] if len(set(lengths)) == 1 else [lengths[i::2] for i in range(2)]
    batches: list[PaddedBatch] = []
    for group in groups:
        tokens = torch.from_numpy(rng.integers(0, case.model.vocab_size, (len(group), max(group)))).cuda()
        mask = (torch.arange(max(group))[None] < torch.tensor(group)[:, None]).cuda()
        labels = tokens.masked_fill(~mask, -100)
        batches.append((tokens, None if mask.all() else mask.long(), labels))
    return batches


def alpaca_steps(rows: int) -> list[list[PaddedBatch]]:
    """The micro-batches of each step of an epoch."""
    batches = [tuple(torch.from_numpy(part).cuda() for part in batch) for batch in padded_batches(rows=rows)]
    each = ROWS_PER_STEP // rows
    return [batches[i : i + each] for i in range(0, len(batches) - each + 1, each)]


def make_step(case: Case) -> Callable[[list[PaddedBatch]], float]:
    """One optimizer step on its micro-batches; returns the loss, the mean over trained tokens."""
    model = make_model(case.model)
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().requires_grad_() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[PaddedBatch]) -> float:
        total = torch.zeros((), device="cuda")
        items = sum((labels[:, 1:] != -100).sum() for _, _, labels in batches)
        for tokens, mask, labels in batches:
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return float(total)

    return step


def measure(case: Case, *, steps: int, rows: int) -> dict[str, float]:
    """Seconds, rates and memory of one case. rows: of a micro-batch of alpaca's."""
    step = make_step(case)
    epoch = [make_batches(case)] if case.lengths else alpaca_steps(rows)
    turn = itertools.cycle(epoch)
    for _ in range(max(WARM_UP, len(epoch))):  # every shape once: nothing is compiled or tuned while it is timed
        step(next(turn))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    chosen = [next(turn) for _ in range(steps)]
    began = time.perf_counter()
    losses = [step(batches) for batches in chosen]
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    batches = [batch for part in chosen for batch in part]
    lengths = [n for t, mask, _ in batches for n in ([t.shape[1]] * len(t) if mask is None else mask.sum(1).tolist())]
    trained = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in batches)
    flops = step_flops(case.model, Counts(trained, sum(lengths), sum(n * n for n in lengths)))
    return {
        "seconds": round(took / steps, 4),
        "tflops": round(flops / took / 1e12, 1),
        "tokens_per_second": round(sum(lengths) / took),
        "trained_per_second": round(trained / took),
        "padding": round(1 - sum(lengths) / sum(t.numel() for t, _, _ in batches), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(losses[-1], 4),
    }


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dense = [name for name, case in CASES.items() if case.model.moe is None and not case.options]
    parser.add_argument("--cases", nargs="+", choices=dense, default=["llama8b", "ragged8192", "alpaca"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="rows of a micro-batch of alpaca's")
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    arguments = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    runs = [(name, n) for name in arguments.cases for n in (arguments.rows if name == "alpaca" else [0])]
    for name, rows in runs:
        try:
            result: dict[str, object] = dict(measure(CASES[name], steps=arguments.steps, rows=rows))
        except torch.OutOfMemoryError as error:
            result = {"error": str(error).splitlines()[0][:160]}
        print("transformers + Liger", name, rows or "", json.dumps(result), flush=True)
        results[f"{name} {rows or ''}".strip()] = result
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out:
        versions = {module.__name__: module.__version__ for module in (torch, transformers)}
        report = {
            "results": results,
            "versions": versions | {"liger_kernel": importlib.metadata.version("liger-kernel")},
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
