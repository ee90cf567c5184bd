"""Megatron-Core's GPTModel as the judge of every shape: it loads our checkpoint strictly and computes the same logits.

Needs ../shared/oracle and MCORE_PYTHON, the Python of an environment with megatron-core (docs/parallelism.md says how to make one).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from test_written_configs import FITS

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.checkpoint.huggingface import write_hugging_face
from megatron_swift.commands.export import run
from megatron_swift.kernels.attention import Segments
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.families import family_of
from megatron_swift.testing import make_tiny_model
from scripts import environment
from shapes import SHAPES, RandomWeights, random_decoder

pytestmark = [pytest.mark.slow, pytest.mark.shared]

NAMES = ("llama", "qwen3", "qwen2_moe", "stablelm", "starcoder2", "phi3")
MODELS = SHAPES | {name: FITS[name] for name in NAMES}
TOKENS = torch.randint(0, 263, (45,), generator=torch.Generator().manual_seed(4))


def exported(cfg: ModelConfig, folder: Path) -> Path:
    """A Megatron checkpoint of the random weights, by way of a Hugging Face folder and `swift export --to_mcore`."""
    _, cfg, written = family_of(cfg)
    like, hf = make_tiny_model(folder / "like", vocab_size=451), folder / "hf"
    (like / "config.json").write_text(json.dumps(written))
    hf.mkdir()
    write_hugging_face(RandomWeights(), cfg, hf, like=like, dtype="float32", max_shard_size=10**9)
    flags = ["--model", str(hf), "--to_mcore", "true", "--template", "chatml", "--output_dir", str(folder / "mcore")]
    run(parse(ExportArguments, flags))
    return folder / "mcore" / "iter_0000001"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_megatrons(shared, name, tmp_path):
    python = os.environ.get("MCORE_PYTHON")
    if not python:
        pytest.skip("MCORE_PYTHON does not name the Python of an environment with megatron-core (docs/parallelism.md)")
    cfg = MODELS[name]
    checkpoint = exported(cfg, tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    torch.save(TOKENS, tmp_path / "tokens.pt")
    judge = Path(__file__).with_name("megatron_shapes_judge.py")
    files = [tmp_path / "model.json", checkpoint, tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    argv = [str(word) for word in (python, judge, shared / "oracle", *files)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(files[-1])
    model = random_decoder(cfg, torch.float32)
    with torch.no_grad():
        hidden = model.hidden_states(TOKENS, torch.arange(len(TOKENS)), Segments.of([len(TOKENS)], TOKENS.device))
        ours = model.logits(hidden)
    print(f"{name}: largest difference {float((ours - theirs).abs().max()):.1e} of {float(ours.abs().max()):.1f}")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
