"""How much memory a conversion takes: a child process may not allocate more than a twentieth of the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatron_swift.checkpoint.layout import hugging_face_tensors, tensor_specs
from megatron_swift.checkpoint.safetensors_io import write_safetensors
from megatron_swift.models.families import describe
from megatron_swift.testing import make_tiny_model
from scripts import environment

MIB = 1 << 20
HEAD_ROOM = 32 * MIB
# What is imported and set up does not count: it is there before the limit is.
CHILD = """
import json, resource, sys, threading
import torch, torch._dynamo
from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.commands import export

threading.stack_size(1 << 20)  # 8 MiB each would count whole, touched or not
warm, flags, room = json.load(sys.stdin)
for argv in warm:
    export.run(parse(ExportArguments, argv))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
size, rss = (int(status[name].split()[0]) * 1024 for name in ("VmSize", "VmRSS"))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
try:
    torch.empty(room + (1 << 20), dtype=torch.uint8)
except RuntimeError:
    print("limited", flush=True)
export.run(parse(ExportArguments, flags))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(status["VmHWM"].split()[0]) * 1024 - rss)
"""
SIZES = {
    # two writing threads and 56 layers: whatever is not given back piles up
    "qwen2": {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 3000, "num_hidden_layers": 56},
    # all experts of a layer are twice the head-room
    "qwen3_moe": {"hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 512, "num_hidden_layers": 7},
}


def make_large(folder, family):
    """A model whose weights are never in memory as a whole; returns (bytes, bytes of the largest matrix on disk)."""
    wanted = SIZES[family]
    few = {name: n for name, n in wanted.items() if name not in ("num_hidden_layers", "num_experts")}
    make_tiny_model(folder, family=family, tied=False, dtype="bfloat16", layers=1, **few)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    tensors = hugging_face_tensors(
        tensor_specs(describe(folder, model_type=None, template="qwen2_5", chat_template=None).config).values()
    )
    noise = torch.randn(4 * MIB, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    numbers = {name: number for number, name in enumerate(tensors)}

    def read(name):
        size = torch.Size(tensors[name].shape).numel()
        return [noise.roll(numbers[name])[:size]]

    shapes = {name: (torch.bfloat16, tensor.shape) for name, tensor in tensors.items()}
    largest = max(torch.Size(tensor.shape).numel() for tensor in tensors.values()) * 2
    return write_safetensors(folder / "model.safetensors", shapes, read).bytes, largest


def convert(tmp_path, warm, *flags):
    """Run one conversion under the limit; its peak in bytes above what was there before."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1"),
        input=json.dumps([warm, flags, HEAD_ROOM]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "limited" in done.stdout  # or nothing was shown
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_twenty_times_the_memory(family, tmp_path, capsys):
    size, largest = make_large(tmp_path / "large", family)
    assert size > 20 * HEAD_ROOM
    make_tiny_model(tmp_path / "small")
    warm = [
        ["--model", "small", "--to_mcore", "true", "--output_dir", "small-m"],
        ["--mcore_model", "small-m", "--to_hf", "true", "--output_dir", "small-hf"],
    ]
    to_mcore = convert(tmp_path, warm, "--model", "large", "--to_mcore", "true", "--output_dir", "m")
    for name in ("small-m", "small-hf"):
        (tmp_path / name).rename(tmp_path / f"{name}-1")
    flags = ("--mcore_model", "m", "--to_hf", "true", "--output_dir", "hf", "--max_shard_size", "100MB")
    to_hf = convert(tmp_path, warm, *flags)
    assert max(to_mcore, to_hf) < 3 * largest + 16 * MIB
    with capsys.disabled():
        figures = ", ".join(f"{name} {n / MIB:.1f} MiB" for name, n in (("to_mcore", to_mcore), ("to_hf", to_hf)))
        print(f"\n{family}: model {size / MIB:.0f} MiB, largest matrix {largest / MIB:.1f} MiB, peak: {figures}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5
