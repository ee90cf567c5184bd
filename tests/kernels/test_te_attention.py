"""Transformer Engine's attention behind our seam. The real package needs a GPU and was not run: a stand-in with its interface, as its 2.20.2
sources show it, checks what it is handed and computes by our plain form."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_swift.kernels import te_attention
from megatron_swift.kernels.attention import Segments, plain_attention
from megatron_swift.kernels.te_attention import TransformerEngineAttention, choose_core, load, why_refused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (3, 17, 1, 40)
SHAPE = {"heads": 4, "groups": 2, "head_dim": 8}

STAND_IN = """
import torch
from megatron_swift.kernels.attention import Segments, plain_attention

made = []

class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"):
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_dropout) == ("thd", "padding_causal", 0.0)
        self.shape = num_attention_heads, num_gqa_groups, kv_channels
        made.append(self.shape)

    def forward(self, query_layer, key_layer, value_layer, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        heads, groups, dim = self.shape
        if dim % 8:
            raise ValueError("No dot product attention backend is available for the provided inputs.\\nPlease run")
        assert query_layer.shape[1:] == (heads, dim) and key_layer.shape[1:] == value_layer.shape[1:] == (groups, dim)
        for x in (query_layer, key_layer, value_layer):
            assert x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous() and x.storage_offset() == 0
        for ends, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_kv, max_seqlen_kv)):
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(query_layer)
            assert type(longest) is int and longest == max(ends.diff())
        segments = Segments.of(cu_seqlens_q.diff().tolist(), query_layer.device)
        return plain_attention(query_layer, key_layer, value_layer, segments).reshape(len(query_layer), -1)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(text): a package transformer_engine whose PyTorch part is this text."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")  # restores it afterwards

    def put(text=STAND_IN):
        folder = tmp_path / "transformer_engine"
        (folder / "pytorch").mkdir(parents=True)
        (folder / "__init__.py").write_text('__version__ = "2.20.2"\n')
        (folder / "pytorch" / "__init__.py").write_text(text)
        importlib.invalidate_caches()

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def packed(heads: int, groups: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values of a layer in one tensor, as its linear layer gives them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(LENGTHS), heads + 2 * groups, dim, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_plain_form(install, heads, groups, dtype):
    """Output and gradients, from views that lie within one tensor."""
    install()
    core, found = TransformerEngineAttention(load()[0]), []
    for form in (core, plain_attention):
        leaf = packed(heads, groups, 8, dtype).requires_grad_()
        out = form(*leaf.split((heads, groups, groups), 1), Segments.of(LENGTHS, CPU))
        assert out.shape == (sum(LENGTHS), heads, 8)
        out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(dtype))
        found.append((out.detach(), leaf.grad))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


def test_one_object_for_each_shape_of_heads(install):
    install()
    core = TransformerEngineAttention(load()[0])
    for heads, groups in ((4, 2), (4, 2), (2, 2), (4, 2)):
        core(*packed(heads, groups, 8, torch.bfloat16).split((heads, groups, groups), 1), Segments.of(LENGTHS, CPU))
    assert sys.modules["transformer_engine.pytorch"].made == [(4, 2, 8), (2, 2, 8)]


def test_a_small_row_tells_what_it_takes(install):
    install()
    core = TransformerEngineAttention(load()[0])
    assert why_refused(core, CPU, torch.bfloat16, **SHAPE) == ""
    why = why_refused(core, CPU, torch.bfloat16, heads=4, groups=2, head_dim=12)
    assert "2 groups and 12 dimensions" in why and "No dot product attention backend" in why and "Please" not in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("raise ImportError('undefined symbol: x\\nmore')", "ImportError: undefined symbol: x)"),
        ("raise RuntimeError('Transformer Engine requires cuDNN 9.12.0 or later')", "requires cuDNN 9.12.0"),
        ("assert False", "AssertionError"),
    ],
)
def test_a_package_that_does_not_load(install, text, said):
    install(text)
    found, why = load()
    assert found is None and "does not load" in why and said in why and "more" not in why


def test_a_defect_of_the_package_is_not_hidden(install):
    install("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load()


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_its_slow_form_is_off_unless_asked_for(install, monkeypatch, before, after):
    install()
    monkeypatch.delenv("NVTE_UNFUSED_ATTN")
    if before:
        monkeypatch.setenv("NVTE_UNFUSED_ATTN", before)
    assert load()[1] == "2.20.2" and os.environ["NVTE_UNFUSED_ATTN"] == after


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads which libraries Linux has loaded")
@pytest.mark.parametrize("named", [None, "/theirs"])
def test_cudnn_is_taken_from_where_torch_has_it(install, tmp_path, monkeypatch, named):
    """All its libraries, and before Transformer Engine loads; not where the user names a folder."""
    monkeypatch.setenv("CUDNN_HOME", named or "")  # restores it afterwards
    if named is None:
        monkeypatch.delenv("CUDNN_HOME")
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9"):  # any library does: its name is what counts
        shutil.copy(importlib.import_module("_ctypes").__file__, folder / name)
    monkeypatch.setattr(te_attention, "_cudnn_of_pip", lambda: folder)
    install("import os\nDotProductAttention = os.environ.get('CUDNN_HOME'), open('/proc/self/maps').read()\n")
    (home, maps), _ = load()
    assert home == (named or str(folder))
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9"):
        assert (str(folder / name) in maps) == (named is None)


def test_where_pip_put_cudnn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert te_attention._cudnn_of_pip() is None
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    importlib.invalidate_caches()
    assert te_attention._cudnn_of_pip() == folder
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.delitem(sys.modules, "nvidia.cudnn", raising=False)


def choose(wish, device=CUDA, dtype=torch.bfloat16, backend="auto", **options):
    return choose_core(wish, backend, device=device, dtype=dtype, **SHAPE, **options)


def test_where_it_runs_it_is_taken(install, monkeypatch):
    install()
    monkeypatch.setattr(te_attention, "why_refused", lambda core, device, dtype, **shape: "")  # there is no GPU
    choice, own = choose("required"), choose("never")
    assert isinstance(choice.core, TransformerEngineAttention) and choice.reason == "Transformer Engine 2.20.2"
    choice = choose("where it runs")
    assert choice.reason.startswith(
        "Transformer Engine 2.20.2 for ragged rows with a segment of 1024 tokens or more, for others "
    )
    assert isinstance(choice.core.engine, TransformerEngineAttention) and choice.core.own is own.core
    assert choice.reason.endswith(own.reason)
    assert not isinstance(choose("never").core, TransformerEngineAttention)
    assert "Engine" not in choose("never").reason


@pytest.mark.parametrize(
    ("lengths", "taken"), [((1024, 7), "engine"), ((1023, 7), "own"), ((2048, 2048), "own"), ((2048,), "own")]
)
def test_which_rows_it_gets_by_itself(lengths, taken):
    q = torch.empty(sum(lengths), 2, 128)
    core = te_attention.ForLongRaggedRows(lambda *_: "engine", lambda *_: "own")
    assert core(q, q, q, Segments.of(lengths, torch.device("cpu"))) == taken


def test_a_layout_with_kernels_of_its_own_is_not_refused(install):
    install()
    choice = choose("required", without="context parallelism by p2p attends block by block")
    assert choice.core is choose("never").core and choice.reason.endswith(
        "not Transformer Engine: context parallelism by p2p attends block by block"
    )


@pytest.mark.parametrize(
    ("device", "dtype", "deterministic", "text", "why"),
    [
        (CPU, torch.bfloat16, False, STAND_IN, "a CUDA device and a 16-bit type"),
        (CUDA, torch.float32, False, STAND_IN, "a CUDA device and a 16-bit type"),
        (CUDA, torch.bfloat16, True, STAND_IN, "deterministic"),
        (CUDA, torch.bfloat16, False, None, "it is not installed"),
        (CUDA, torch.bfloat16, False, "raise OSError('no library')", "OSError: no library"),
    ],
)
def test_where_it_cannot_run(install, monkeypatch, device, dtype, deterministic, text, why):
    """The default says why and takes the kernel that it takes without; a request is refused."""
    if text is not None:
        install(text)
    else:
        monkeypatch.setattr(te_attention.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    own, choice = choose("never", device, dtype), choose("where it runs", device, dtype)
    assert choice.core is own.core and choice.keeps_weights == own.keeps_weights
    assert choice.reason.startswith(own.reason + "; not Transformer Engine: ") and why in choice.reason
    with pytest.raises(ValueError, match=f"Transformer Engine: .*{why}"):
        choose("required", device, dtype)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine",
)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(12, 2, 128), (8, 8, 64)])
def test_the_real_package(heads, groups, dim):
    """Against our plain form in float64 on the same values: output and gradients."""
    choice = choose_core(
        "required", "auto", device=CUDA, dtype=torch.bfloat16, heads=heads, groups=groups, head_dim=dim
    )
    lengths, found = (700, 1, 30, 293), []
    values = torch.randn(1024, heads + 2 * groups, dim, generator=torch.Generator().manual_seed(0)).bfloat16().to(CUDA)
    for form, dtype in ((choice.core, torch.bfloat16), (plain_attention, torch.float64)):
        leaf = values.detach().to(dtype).requires_grad_()
        out = form(*leaf.split((heads, groups, groups), 1), Segments.of(lengths, CUDA))
        out.backward(torch.cos(torch.arange(out.numel(), device=CUDA)).view(out.shape).to(dtype))
        found.append((out.detach().double(), leaf.grad.double()))
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).norm() <= 6e-3 * exact.norm()
