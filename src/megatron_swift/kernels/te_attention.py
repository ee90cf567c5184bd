"""Attention of packed rows by NVIDIA's Transformer Engine, where that is installed: cuDNN's kernel on Hopper and later.

What is used of its interface was read in the Python sources of transformer_engine 2.20.2 (pytorch/attention/dot_product_attention).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_swift.kernels.attention import LONG, AttentionChoice, AttentionCore, Segments, choose_attention
from megatron_swift.kernels.dense_attention import is_even

NAME = "Transformer Engine"


class TransformerEngineAttention:
    """An attention core (see kernels.attention) of 16-bit types on CUDA.

    dot_product : transformer_engine.pytorch.DotProductAttention.  One object of it is made for each shape of heads that comes.
    """

    def __init__(self, dot_product: Any):
        self._dot_product, self._modules = dot_product, {}  # type: Any, dict[tuple[int, int, int], Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q [T, heads, d], k and v [T, groups, d] -> [T, heads, d]."""
        q, k, v = (_at_its_start(x) for x in (q, k, v))
        ends, longest = segments.cumulative, segments.longest
        # Without the lengths it would read the longest from the GPU. Without padded ones it knows that no token lies between segments.
        attended = self._module(q.shape[1], k.shape[1], q.shape[2])(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        assert isinstance(attended, Tensor)
        return attended.view(q.shape)

    def _module(self, heads: int, groups: int, dim: int) -> Any:
        key = heads, groups, dim
        if key not in self._modules:
            self._modules[key] = self._dot_product(
                heads,
                dim,
                num_gqa_groups=groups,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
            )
        return self._modules[key]


@dataclass(frozen=True)
class ForLongRaggedRows:
    """An attention core: `engine` for ragged rows with a segment of LONG tokens or more, `own` for all others, where it was measured ahead."""

    engine: AttentionCore
    own: AttentionCore

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q [T, heads, d], k and v [T, groups, d] -> [T, heads, d]."""
        ragged = segments.longest >= LONG and not is_even(segments.lengths)
        return (self.engine if ragged else self.own)(q, k, v, segments)


def _at_its_start(x: Tensor) -> Tensor:
    """x, contiguous and at the start of its memory: it guesses by addresses how q, k and v lie to each other, and refuses most views."""
    if x.is_contiguous() and not x.storage_offset():
        return x
    return x.clone(memory_format=torch.contiguous_format)


def choose_core(
    wish: str,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    head_dim: int,
    softmax_in_fp32: bool = True,
    without: str = "",
) -> AttentionChoice:
    """Transformer Engine's attention or that of `choose_attention`, and the sentence about it.

    wish           : "never", "where it runs" (and is ahead) or "required" (for every row); see args.transformer_engine.
    heads, groups  : query heads and key/value heads of this rank, of head_dim dims.
    without        : why this layout takes a kernel of its own, even where Transformer Engine is required; "" where it does not.
    Raises ValueError for what is required and cannot run.
    """
    core = None
    if wish != "never" and not without:
        core, why = _try(device, dtype, heads=heads, groups=groups, head_dim=head_dim)
        if wish == "required":
            if core is None:
                raise ValueError(f"{NAME}: {why}")
            return AttentionChoice(core, f"{NAME} {why}")
        without = why
    own = choose_attention(backend, device=device, dtype=dtype, head_dim=head_dim, softmax_in_fp32=softmax_in_fp32)
    if wish == "never":
        return own
    if core is not None:
        reason = f"{NAME} {why} for ragged rows with a segment of {LONG} tokens or more, for others {own.reason}"
        return AttentionChoice(ForLongRaggedRows(core, own.core), reason, own.keeps_weights)
    return AttentionChoice(own.core, f"{own.reason}; not {NAME}: {without}", own.keeps_weights)


def _try(
    device: torch.device, dtype: torch.dtype, *, heads: int, groups: int, head_dim: int
) -> tuple[TransformerEngineAttention | None, str]:
    """(the core, its version) or (None, why it cannot run)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None, "it takes a CUDA device and a 16-bit type"
    if torch.are_deterministic_algorithms_enabled():
        # Its deterministic backward pass of packed rows on Hopper asks cuDNN for some 128 bytes x segments x heads x longest^2, and is
        # given up for the unfused form where that is too much.
        return None, "its deterministic backward pass takes memory that grows with the square of the longest segment"
    dot_product, said = load()
    if dot_product is None:
        return None, said
    core = TransformerEngineAttention(dot_product)
    refused = why_refused(core, device, dtype, heads=heads, groups=groups, head_dim=head_dim)
    return (None, refused) if refused else (core, said)


def load() -> tuple[Any, str]:
    """(DotProductAttention, the version) or (None, why it does not load). Takes seconds.

    Its unfused form, taken where neither cuDNN nor flash-attn fits, pads segments to the longest and keeps all their weights: it is switched off
    by the variable that Transformer Engine reads, unless the user has set that.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "it is not installed"
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    try:
        if (folder := _cudnn_of_pip()) is not None:
            keep_to_one_cudnn(folder)
        # Not the package alone, which goes on without PyTorch's part where that fails.
        dot_product = importlib.import_module("transformer_engine.pytorch").DotProductAttention
    except (
        ImportError,
        OSError,
        RuntimeError,
        AssertionError,
    ) as error:  # no library, another CUDA, an old cuDNN, parts of two versions
        return None, f"it does not load ({_in_a_line(error)})"
    return dot_product, str(importlib.import_module("transformer_engine").__version__)


def keep_to_one_cudnn(folder: Path) -> None:
    """Have Transformer Engine take cuDNN's libraries from this folder, unless the user names one in CUDNN_HOME. OSError: one does not load.

    By itself it looks for a copy of the system's first, and the linker finds the parts that torch has not loaded yet there, too. Parts of two
    versions then mix: measured on a machine with an older copy, cuDNN's attention was given up without a word.
    """
    if "CUDNN_HOME" in os.environ:
        return
    os.environ["CUDNN_HOME"] = str(folder)
    # Those first that others ask for by name alone, which LD_LIBRARY_PATH would answer before the folder.
    needed = ("libcudnn_graph.", "libcudnn_ops.")
    for library in sorted(
        folder.glob("libcudnn*.so.*"), key=lambda path: (not path.name.startswith(needed), path.name)
    ):
        ctypes.CDLL(str(library))


def _cudnn_of_pip() -> Path | None:
    """Where pip put cuDNN's libraries for torch; None where torch brought its own or takes the system's."""
    if importlib.util.find_spec("nvidia") is None or (found := importlib.util.find_spec("nvidia.cudnn")) is None:
        return None
    folders = [Path(place, "lib") for place in found.submodule_search_locations or ()]
    return next((folder for folder in folders if folder.is_dir()), None)


def why_refused(
    core: TransformerEngineAttention,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    groups: int,
    head_dim: int,
) -> str:
    """Why it does not compute a small row forward and backward; "" where it does. Which heads a GPU's kernels take only it knows."""
    segments = Segments.of((64, 32), device)
    q, k, v = (
        torch.zeros(96, n, head_dim, dtype=dtype, device=device, requires_grad=True) for n in (heads, groups, groups)
    )
    try:
        core(q, k, v, segments).sum().backward()
    except (ValueError, RuntimeError, AssertionError) as error:
        return f"it does not take {heads} heads of {groups} groups and {head_dim} dimensions here ({_in_a_line(error)})"
    return ""


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
