"""Our training step beside a plain transformers loop: same weights, same rows, same optimizer, alternating in one process.

    python benchmarks/step.py [--steps 5] [--rows 16] [--layers 30] [--dtype float32] [--out FILE]

The model has SmolLM2-135M's shape with random weights (no download); the rows have the lengths of the demo's conversations, half of each
trained. transformers pads its batch and masks it; we pack. Both use torch's fused AdamW and clip to 1. Prints JSON; only ratios measured
side by side mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
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
from megatron_swift.parallel.engine import EngineOptions, build_engine
from megatron_swift.parallel.mesh import start
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.state import load_weights
from megatron_swift.train.step import train_step

LR, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0


def make_model(folder: Path, *, layers: int, dtype: str) -> transformers.PreTrainedModel:
    """SmolLM2-135M's shape, random weights, saved to `folder`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    model = transformers.LlamaForCausalLM(config).to(TORCH_DTYPES[dtype])
    model.save_pretrained(folder)
    return model


def make_samples(num_rows: int, *, longest: int) -> list[Sample]:
    """Conversations of ragged length, the second half of each trained."""
    rng = np.random.default_rng(0)
    samples = []
    for length in rng.integers(longest // 4, longest + 1, num_rows):
        ids = rng.integers(0, 49152, length).astype(np.int32)
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
    family = FAMILIES["llama"]
    cfg = family.read_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
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


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate the two steps and report medians, their ratio and both loss sequences."""
    samples = make_samples(arguments.rows, longest=arguments.longest)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), layers=arguments.layers, dtype=arguments.dtype)
        steps = {"transformers": theirs(model, samples), "ours": ours(Path(folder), samples, dtype=arguments.dtype)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.steps + 1):  # the first one warms up
            for name, step in steps.items():
                began = time.perf_counter()
                losses[name].append(round(step(), 6))
                if number:
                    seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "case": f"SmolLM2-135M shape, {arguments.layers} layers, {arguments.rows} rows up to {arguments.longest} tokens, {arguments.dtype}",
        "tokens": sum(len(s.ids) for s in samples),
        "seconds_per_step": {name: round(value, 4) for name, value in median.items()},
        "transformers_over_ours": round(median["transformers"] / median["ours"], 3),
        "losses": losses,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
    }


def main() -> None:
    """Parse, measure, print and perhaps keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--longest", type=int, default=80, help="tokens of the longest row")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
