"""Our training step beside a plain transformers loop: same weights, same rows, same optimizer, alternating in one process.

    python benchmarks/step.py [--models dense moe] [--steps 5] [--rows 16] [--dtype float32] [--out FILE]

Random weights (no download) in the shapes of SmolLM2-135M (dense) and of a Qwen2-MoE of about as many parameters, 16 experts, 4 per token
and a shared one (moe; transformers computes its experts in its own default way). The rows have the lengths of the demo's conversations, half
of each trained. transformers pads its batch and masks it; we pack. Both use torch's fused AdamW and clip to 1. Prints JSON; only ratios
measured side by side mean anything on a shared machine. Exit code 1 where ours is the slower one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.weights import TORCH_DTYPES
from megatron_swift.data.loader import collate
from megatron_swift.data.types import IGNORE, Batch, Sample
from megatron_swift.models.families import FAMILIES
from megatron_swift.parallel.build import build_engine
from megatron_swift.parallel.engine import EngineOptions
from megatron_swift.parallel.mesh import start
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import load_weights
from megatron_swift.train.step import train_step

VOCABULARY = 49152
LR, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0


def make_model(folder: Path, name: str, *, dtype: str) -> transformers.PreTrainedModel:
    """A model of the named shape with random weights, saved to `folder`."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    config: transformers.PretrainedConfig
    if name == "dense":
        config = transformers.LlamaConfig(intermediate_size=1536, num_hidden_layers=30, **sizes)
    else:
        config = transformers.Qwen2MoeConfig(
            num_hidden_layers=8,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=384,
            shared_expert_intermediate_size=1536,
            router_aux_loss_coef=0.0,
            **sizes,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).to(TORCH_DTYPES[dtype])
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


def make_samples(num_rows: int, *, longest: int) -> list[Sample]:
    """Conversations of ragged length, the second half of each trained."""
    rng = np.random.default_rng(0)
    samples = []
    for length in rng.integers(longest // 4, longest + 1, num_rows):
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORE, ids).astype(np.int32)
        samples.append(Sample(ids, labels))
    return samples


def theirs(model: transformers.PreTrainedModel, samples: list[Sample]) -> Callable[[], float]:
    """One step of a plain transformers loop on a padded batch."""
    longest = max(len(s.ids) for s in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.long)
    labels, mask = torch.full_like(tokens, IGNORE), torch.zeros_like(tokens)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        tokens[row, :length] = torch.from_numpy(sample.ids)
        labels[row, :length] = torch.from_numpy(sample.labels)
        mask[row, :length] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    model.train()

    def step() -> float:
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours(folder: Path, samples: list[Sample], *, dtype: str) -> Callable[[], float]:
    """One step of the product's engine on the packed batch."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cfg = FAMILIES[written["model_type"]].read_config(written)
    engine = build_engine(
        cfg, start(backend="nccl", timeout_minutes=1), EngineOptions(compute_dtype=TORCH_DTYPES[dtype])
    )
    load_weights(engine.shards, tensor_specs(cfg), HuggingFaceWeights(folder, cfg))
    options = OptimizerOptions(kind="adam", weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1])
    optimizer, scale = Optimizer(engine.shards, options), LossScale.for_dtype(dtype)
    batch: Batch = collate(samples, pad_to_multiple=1, pad_id=0, rows=tuple(range(len(samples))))

    def step() -> float:
        return train_step(engine, optimizer, [batch], lr=LR, clip_grad=CLIP, loss_scale=scale).loss

    return step


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate the two steps and report medians, their ratio and both loss sequences."""
    samples = make_samples(arguments.rows, longest=arguments.longest)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), name, dtype=arguments.dtype)
        steps = {"transformers": theirs(model, samples), "ours": ours(Path(folder), samples, dtype=arguments.dtype)}
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        losses: dict[str, list[float]] = {side: [] for side in steps}
        for number in range(arguments.steps + 1):  # the first one warms up
            for side, step in steps.items():
                began = time.perf_counter()
                losses[side].append(round(step(), 6))
                if number:
                    seconds[side].append(time.perf_counter() - began)
    median = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "case": f"{name}, {model.num_parameters() / 1e6:.0f} M parameters, {arguments.rows} rows up to {arguments.longest} tokens, "
        + arguments.dtype,
        "tokens": sum(len(s.ids) for s in samples),
        "seconds_per_step": {side: round(value, 4) for side, value in median.items()},
        "transformers_over_ours": round(median["transformers"] / median["ours"], 3),
        "losses": losses,
    }


def main() -> None:
    """Parse, measure, print and perhaps keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--longest", type=int, default=80, help="tokens of the longest row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    results = [measure(name, arguments) for name in arguments.models]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    report = {
        "results": results,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit.stdout.strip(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(any(float(str(result["transformers_over_ours"])) < 1 for result in results))


if __name__ == "__main__":
    main()
