"""Pre-training from Megatron's initial weights on real text: the loss falls, and as in transformers' own loop over the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_layouts import SP
from test_transformers_judge import by_transformers, on_rank

from megatron_swift.checkpoint.huggingface import write_hugging_face
from megatron_swift.checkpoint.initial import InitialWeights
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Sample
from megatron_swift.models.families import family_of
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.testing import make_tiny_model, run_ranks
from shapes import shape

pytestmark = pytest.mark.shared

STEPS, ROWS, LENGTH, LR = 30, 4, 64, 3e-3
MODEL = shape(vocab_size=384, qkv_bias=True)
FILES = ("tinyshakespeare.txt", "wiki_demo.txt", "c4_demo.jsonl")


def first_text(path: Path, characters: int = 30_000) -> str:
    text = path.read_text(encoding="utf-8")[: 4 * characters]
    if path.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines()[:-1])
    return text[:characters]


@pytest.mark.parametrize("name", [FILES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FILES[1:])])
def test_from_scratch_as_transformers(shared, tmp_path, name):
    _, cfg, written = family_of(MODEL)
    like, folder = make_tiny_model(tmp_path / "like", vocab_size=384), tmp_path / "hf"
    (like / "config.json").write_text(json.dumps(written))
    folder.mkdir()
    initial = InitialWeights(num_layers=cfg.num_layers, seed=42, std=0.02)
    write_hugging_face(initial, cfg, folder, like=like, dtype="float32", max_shard_size=10**9)
    ids = np.array(Tokenizer.load(folder).encode(first_text(shared / "data" / name)), np.int32)
    pieces = [Sample(part, part) for part in ids[: STEPS * ROWS * LENGTH].reshape(-1, LENGTH)]
    assert len(pieces) == STEPS * ROWS, "too little text"
    steps = [[pieces[i : i + 2], pieces[i + 2 : i + ROWS]] for i in range(0, len(pieces), ROWS)]
    losses, norms = by_transformers(folder, steps, lr=LR)
    print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[0] == pytest.approx(np.log(384), abs=0.1) and losses[-1] < losses[0] - 1.0
    sizes = Sizes(tp=2, pp=2)
    for found in run_ranks(lambda rank: on_rank(rank, folder, steps, sizes, SP, lr=LR), 4):
        np.testing.assert_allclose(found[0], losses, rtol=1e-4, atol=0)
        np.testing.assert_allclose(found[1], norms, rtol=1e-3, atol=0)
