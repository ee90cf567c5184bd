"""The same pre-training from random weights by `megatron pt` in bfloat16 and in FP8: are FP8's losses within bfloat16's noise?

    python benchmarks/gpu_fp8_pt.py --tokenizer FOLDER --data PREFIX [--ways "hybrid rowwise" ...] [--seeds 3] [--steps 1000] [--out FILE]

PREFIX.bin and PREFIX.idx are Megatron's indexed data, as `megatron preprocess --output_prefix` writes them. A Llama of 12 layers of 768; eight rows
of 2048 tokens a step, none of them seen twice if there are enough; documents at the end are held out. Of each seed the weights and the order
of the rows are others. fp8_runs.py says what is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fp8_runs import BASE, keep, run_all, schedule

MODEL = dict(num_layers=12, hidden_size=768, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=2048)


def main() -> None:
    """Train each way with each seed, print what lies between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", required=True, metavar="PREFIX")
    parser.add_argument("--ways", nargs="*", default=["hybrid tensorwise", "hybrid rowwise"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    def flags(seed: int) -> dict[str, Any]:
        return {
            **MODEL,
            "model": arguments.tokenizer,
            "data_path": arguments.data,
            "no_initialization": "false",
            "untie_embeddings_and_output_weights": "false",
            "seed": 42 + seed,
            "max_length": 2048,
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "split_dataset_ratio": 0.02,
            **schedule(arguments.steps, arguments.lr, warmup=arguments.steps // 10),
        }

    keep(run_all("pt", [BASE, *arguments.ways], flags, seeds=arguments.seeds, jobs=arguments.jobs), arguments.out)


if __name__ == "__main__":
    main()
