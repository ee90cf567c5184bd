"""Real rows for benchmarks/gpu.py and gpu_peers.py: alpaca conversations in a model's template, encoded by the product, packed or one by one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from megatron_swift.data.encode import encode_many
from megatron_swift.data.loader import collate
from megatron_swift.data.packing import pack
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Batch, Message, Sample

DATA, TOKENIZER = "BENCH_DATA", "BENCH_TOKENIZER"  # environment: alpaca's json, and a folder with tokenizer.json


def alpaca_samples() -> list[Sample]:
    """Every row of the file as one training sample, in an order drawn from seed 0."""
    rows = json.loads(Path(os.environ[DATA]).read_text(encoding="utf-8"))
    conversations = [
        [
            Message("user", "\n".join(part for part in (row["instruction"], row["input"]) if part)),
            Message("assistant", row["output"]),
        ]
        for row in rows
    ]
    outcomes = encode_many(
        get_template("chatml"), Tokenizer.load(Path(os.environ[TOKENIZER])), conversations, max_length=8192
    )
    samples = [outcome[0] for outcome in outcomes if isinstance(outcome, list)]
    return [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]


def packed_batches(*, capacity: int, packs_per_batch: int) -> list[Batch]:
    """The samples in packs of at most `capacity` tokens, the last few packs left out that make no whole batch."""
    samples = alpaca_samples()
    packs = pack([len(sample.ids) for sample in samples], capacity)
    batches = []
    for start in range(0, len(packs) - packs_per_batch + 1, packs_per_batch):
        chosen = [samples[i] for one in packs[start : start + packs_per_batch] for i in one]
        batches.append(collate(chosen, pad_to_multiple=1, pad_id=0, rows=()))
    return batches


def padded_batches(*, rows: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, mask, labels), each int64 [rows, longest, padded to a multiple of 8]: what a plain data collator makes of the samples."""
    samples = alpaca_samples()
    batches = []
    for start in range(0, len(samples) - rows + 1, rows):
        chosen = samples[start : start + rows]
        longest = -(-max(len(sample.ids) for sample in chosen) // 8) * 8
        tokens, mask = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.int64)
        labels = np.full((rows, longest), -100, np.int64)
        for row, sample in enumerate(chosen):
            number = len(sample.ids)
            tokens[row, :number], mask[row, :number], labels[row, :number] = sample.ids, 1, sample.labels
        batches.append((tokens, mask, labels))
    return batches
