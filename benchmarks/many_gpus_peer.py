"""What `benchmarks/many_gpus.py` is measured beside: transformers and FSDP2's fully_shard, the ZeRO-3 a user would pick.

    torchrun --nproc_per_node=8 benchmarks/many_gpus_peer.py

Qwen2.5-14B's shape with random weights; each decoder layer a unit, bfloat16 compute on float32 masters (MixedPrecisionPolicy), full
recomputation, SDPA, Liger's kernels where they are installed, torch's fused AdamW, clip 1; rows of 8192 tokens, 16 a step. Rank 0 prints a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

LENGTH, BATCH, WARM_UP, STEPS = 8192, 16, 2, 3


def make_model() -> transformers.PreTrainedModel:
    """The shape, sharded, with random weights."""
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=True)
    config = transformers.Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        inverse = 1e6 ** (-torch.arange(0, 128, 2, device="cuda").float() / 128)
        model.model.rotary_emb.inv_freq = inverse  # a buffer, which to_empty left without values
    return model.train()


def main() -> None:
    """Measure and print."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    world, rank = dist.get_world_size(), dist.get_rank()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator("cuda").manual_seed(rank)
    tokens = torch.randint(0, 152064, (BATCH // world, LENGTH), device="cuda", generator=generator)
    loss, at = torch.zeros(()), 0.0
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            at = time.perf_counter()
        for row in tokens.split(1):
            loss = model(input_ids=row, labels=row).loss / len(tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - at) / STEPS
    if rank == 0:
        figures = {
            "seconds": round(seconds, 3),
            "tokens_per_second_gpu": round(BATCH * LENGTH / seconds / world),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "loss": round(float(loss.detach()) * len(tokens), 4),
        }
        print("transformers + FSDP2, 14b", json.dumps(figures), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
