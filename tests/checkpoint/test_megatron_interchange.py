"""Megatron-Core itself as a judge of checkpoints, both ways: it loads ours strictly and computes the logits, we read its to the last bit.

MCORE_PYTHON names the Python of an environment with megatron-core 0.16, MCORE11_PYTHON that of one with 0.11 (docs/parallelism.md says how to make
one); without it, this is skipped. INTERCHANGE_TABLE names a file for the table of docs/checkpoints.md.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_weights import config_of
from torch import Tensor

from megatron_swift.args.commands import ExportArguments, SftArguments, parse
from megatron_swift.checkpoint.dcp import DcpFolder
from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.megatron_weights import MASTER, MegatronWeights
from megatron_swift.checkpoint.publish import latest
from megatron_swift.commands import export, train
from megatron_swift.commands.setup import prepare_run
from megatron_swift.testing import make_tiny_model, run_ranks
from scripts import environment

pytestmark = [pytest.mark.slow, pytest.mark.shared]

TOLERANCE = "2e-5"
SMALL = {"layers": 4, "vocab_size": 448}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# 0.11's sequential experts are as wide as its dense layers.
WIDE = {"intermediate_size": 48, "moe_intermediate_size": 48}
MODELS: dict[str, dict[str, object]] = {
    "qwen2": {"family": "qwen2"},
    "qwen2 untied": {"family": "qwen2", "tied": False},
    "qwen3": {"family": "qwen3"},
    "qwen3 untied": {"family": "qwen3", "tied": False},
    "llama": {"family": "llama", "tied": False},
    "llama 3": {"family": "llama", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "qwen2_moe": {"family": "qwen2_moe", "tied": False},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
    "qwen2_moe, every second layer": {"family": "qwen2_moe", "tied": False, "decoder_sparse_step": 2, **WIDE},
    "qwen3_moe, layer 1 dense": {"family": "qwen3_moe", "tied": False, "mlp_only_layers": [1], **WIDE},
}
MIXED = [name for name in MODELS if "layer" in name]
EXPERTS = [name for name in MODELS if "moe" in name]
VERSIONS = {"0.16": "MCORE_PYTHON", "0.11": "MCORE11_PYTHON"}
HERE = Path(__file__).parent


class Judge(NamedTuple):
    """megatron-core of a version, with the scripts that drive it."""

    python: str
    oracle: Path

    def run(self, script: Path, *words: object) -> str:
        """What the script says at its end. Fails where it fails."""
        argv = [self.python, str(script), *map(str, words)]
        done = subprocess.run(
            argv,
            env=environment(PYTHONPATH=str(self.oracle)),
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-2500:]
        return done.stdout.strip().rsplit("\n", 1)[-1]

    def core(self, *words: object) -> str:
        """The oracle's own commands."""
        return self.run(self.oracle / "mcore_oracle.py", *words)

    def files(self, *words: object) -> str:
        """Likewise in `ckpt_format torch`."""
        return self.run(HERE / "mcore_torch_files.py", *words)


@pytest.fixture(scope="module")
def judges(shared) -> dict[str, Judge]:
    return {
        version: Judge(os.environ[name], shared / "oracle") for version, name in VERSIONS.items() if name in os.environ
    }


@pytest.fixture
def judge(judges, version) -> Judge:
    if version not in judges:
        pytest.skip(f"{VERSIONS[version]} does not name the Python of an environment with megatron-core {version}")
    return judges[version]


Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """model -> what was tried -> what came out; written where INTERCHANGE_TABLE says."""
    found: Table = defaultdict(dict)
    yield found
    if "INTERCHANGE_TABLE" in os.environ:
        columns = sorted({column for row in found.values() for column in row})
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(row.get(column, "") for column in columns) + " |" for name, row in found.items()
        ]
        Path(os.environ["INTERCHANGE_TABLE"]).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_model(place / name.replace(" ", "_").replace(",", ""), **SMALL, **what)
        for name, what in MODELS.items()
    }


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """exported(name, format): our Megatron folder of a model, made once."""
    place, made = tmp_path_factory.mktemp("exported"), {}

    def get(name: str, ckpt_format: str = "torch_dist") -> Path:
        out = place / f"{models[name].name}-{ckpt_format}"
        if out not in made:
            flags = ("--model", str(models[name]), "--to_mcore", "true", "--ckpt_format", ckpt_format)
            export.run(parse(ExportArguments, [*flags, "--output_dir", str(out)], warn=False))
            made[out] = True
        return out

    return get


def differences(model: Path, checkpoint: Path) -> list[str]:
    """The parameters that a Megatron folder does not hold to the last bit."""
    cfg = config_of(model)
    specs, source = tensor_specs(cfg), HuggingFaceWeights(model, cfg)
    folder = latest(checkpoint)
    assert folder is not None
    stored = MegatronWeights(folder, specs, num_layers=cfg.num_layers)
    return [name for name, spec in specs.items() if not torch.equal(stored.read(spec), source.read(spec))]


# Ours to Megatron

LOADS = [
    (version, name, flags)
    for version, name in itertools.product(VERSIONS, MODELS)
    for flags in ("--tp 1", "--tp 2", "--pp 2", *(["--ep 2"] if name in EXPERTS else []))
]
LOADS.append(("0.16", "qwen3", "--tp 2 --pp 2"))


@pytest.mark.parametrize(("version", "name", "flags"), LOADS)
def test_megatron_loads_ours(judge, version, models, exported, table, name, flags):
    """With Megatron-LM's own strictness, the extra states of Transformer Engine among it; and computes what transformers does."""
    words = ["--hf", models[name], "--mcore", exported(name), "--tol", TOLERANCE, *flags.split()]
    words += ["--require-te"] if name not in MIXED else []  # the judge's list of them knows layers of one kind only
    said = json.loads(judge.core("check", *words))
    assert said["ok"] and said["max_abs_logits_diff"] <= float(TOLERANCE)
    key = f"{version} loads ours"
    table[name][key] = (
        f"{table[name].get(key, '')} {flags.replace('-', '').replace(' ', '')} {said['max_abs_logits_diff']:.0e}".strip()
    )


@pytest.mark.parametrize(
    ("version", "name"), [*(("0.16", name) for name in MODELS), ("0.11", "qwen2"), ("0.11", "qwen3_moe")]
)
def test_megatron_loads_our_torch_file(judge, version, models, exported, table, name):
    """With strict=True."""
    said = json.loads(
        judge.files("check", "--hf", models[name], "--mcore", exported(name, "torch"), "--tol", TOLERANCE)
    )
    assert said["ok"]
    table[name][f"{version} loads our torch file"] = f"{said['max_abs_logits_diff']:.0e}"


@pytest.mark.parametrize(
    ("version", "name", "ckpt_format"),
    [
        *itertools.product(["0.16"], ["qwen3", "qwen2_moe"], ["torch_dist", "torch"]),
        ("0.11", "qwen3", "torch_dist"),
    ],
)
def test_megatron_loads_what_training_saves(judge, version, models, tmp_path, name, ckpt_format):
    """With our optimizer's state in it, trained on two ranks; the judge compares with our own export of it."""
    save, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"query": "one of the", "response": "you was " * n}) + "\n" for n in range(1, 9))
    )
    flags = ["--model", models[name], "--dataset", rows, "--save", save, "--add_version", "false"]
    flags += ["--train_iters", 2, "--global_batch_size", 2, "--micro_batch_size", 1, "--num_workers", 0]
    flags += ["--report_to", "none", "--split_dataset_ratio", 0, "--save_interval", 2, "--ckpt_format", ckpt_format]
    setup = prepare_run(parse(SftArguments, [str(f) for f in flags], warn=False), {"NPROC_PER_NODE": "2"})
    run_ranks(lambda _: train.run(setup), 2, timeout=120)
    words = ["--mcore_model", str(save), "--to_hf", "true", "--output_dir", str(tmp_path / "hf")]
    export.run(parse(ExportArguments, words, warn=False))
    folder = save / "iter_0000002"
    assert (folder / "optimizer" / ".metadata").is_file()
    command = judge.core if ckpt_format == "torch_dist" else judge.files
    more = ("--require-te", "--tp", 2) if ckpt_format == "torch_dist" else ()
    said = json.loads(command("check", "--hf", tmp_path / "hf", "--mcore", save, "--tol", TOLERANCE, *more))
    assert said["ok"], said
    assert differences(models[name], save), "nothing was trained"


# Megatron to us

WRITES = [
    *(("0.16", name, "--tp 2 --te-extra-state") for name in MODELS),
    *(("0.16", name, "--layout local" + (" --ep 2" if name in EXPERTS else " --pp 2")) for name in MODELS),
    ("0.16", "qwen2", "--tp 2 --pp 2 --padded-vocab 512"),
    ("0.16", "qwen2_moe", "--tp 2 --ep 2 --padded-vocab 512"),
    *(("0.11", name, "--ep 2" if name in EXPERTS else "--tp 2") for name in MODELS),
]


@pytest.mark.parametrize(("version", "name", "flags"), WRITES)
def test_we_read_megatrons(judge, version, models, table, tmp_path, name, flags):
    judge.core("make", "--hf", models[name], "--out", tmp_path, *flags.split())
    assert not differences(models[name], tmp_path)
    key, said = f"we read {version}'s", flags.replace("--te-extra-state", "").replace("-", "").replace(" ", "")
    table[name][key] = f"{table[name].get(key, '')} {said}".strip()


@pytest.mark.parametrize(
    ("version", "name", "flags"),
    [
        *(("0.16", name, "--ep 2" if name in EXPERTS else "--tp 2 --pp 2 --layout local") for name in MODELS),
        ("0.16", "qwen2", "--tp 2 --padded-vocab 512"),
        ("0.16", "qwen2_moe", "--tp 2 --pp 2 --ep 2"),
        ("0.11", "qwen3", "--tp 2 --pp 2"),
        ("0.11", "qwen3_moe", "--ep 2 --layout local"),
    ],
)
def test_we_read_megatrons_torch_files(judge, version, models, table, tmp_path, name, flags):
    """What model.state_dict() gives on each rank."""
    judge.files("make", "--hf", models[name], "--out", tmp_path, *flags.split())
    assert not differences(models[name], tmp_path)
    key = f"we read {version}'s torch files"
    table[name][key] = f"{table[name].get(key, '')} {flags.replace('-', '').replace(' ', '')}".strip()


@pytest.mark.parametrize("flags", ["--tp 2 --dp 2 --dist-opt", ""])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_moe", "qwen3_moe, layer 1 dense"])
@pytest.mark.parametrize("version", VERSIONS)
def test_we_read_megatrons_optimizer(judge, version, models, table, tmp_path, name, flags):
    """After three steps; every moment and master to the last bit, put together here in another way than the product does."""
    words = flags.split() + (["--optim-format", "fully_reshardable"] if version == "0.16" and flags else [])
    words += ["--sp"] if name in EXPERTS and "--tp 2" in flags else []
    judge.core("train", "--hf", models[name], "--dtype", "bfloat16", "--save", tmp_path, *words)
    folder, cfg = latest(tmp_path), config_of(models[name])
    assert folder is not None
    specs = tensor_specs(cfg)
    source, seen = MegatronWeights(folder, specs, num_layers=cfg.num_layers), set()
    for spec in specs.values():
        for prefix in (MASTER, "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
            key = source.key(spec, prefix)
            whole = put_together(source.files, key)
            inner = (whole[spec.layer] if spec.layer is not None else whole).reshape(spec.shape)
            assert torch.equal(source.read(spec, prefix=prefix), inner) and inner.any()
            assert inner.dtype == torch.float32
            seen.add(key)
    assert {key for key in source.files.tensors if key.startswith("optimizer.state.")} == seen
    table[name][f"we go on from {version}'s optimizer"] = "yes"


def put_together(files: DcpFolder, key: str) -> Tensor:
    """A tensor that may be cut into a grid of flattened boxes: axes of the grid and of the boxes laid side by side."""
    shape, stored = files.shape(key), files.tensors[key].shape
    raw = torch.empty(stored, dtype=torch.float32)
    files._fill(raw, key, (0,) * len(stored))
    if stored == shape:
        return raw
    grid = stored[:-1]
    boxes = [size // number for size, number in zip(shape, grid, strict=True)]
    order = list(itertools.chain(*((axis, axis + len(grid)) for axis in range(len(grid)))))
    return raw.reshape(*grid, *boxes).permute(order).reshape(shape)
