"""Causal attention over ragged packed rows by cuDNN, through NVIDIA's cudnn-frontend where that package is installed.

cuDNN plans for fixed sizes and takes the segments' places at run time. So the number of segments and the longest one are rounded up, with
segments of no token at the end: packs of short rows share a few plans, each made once per process.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)  # on which it was measured and compared
_SEGMENTS, _LONGEST, _TOKENS = 64, 512, 4096  # the least of what a plan is made for; more goes by powers of two


def _grain(number: int, least: int) -> int:
    """The next power of two, `least` at least: a plan takes 0.1 s, so that there must be few."""
    return max(least, 1 << (number - 1).bit_length())


def why_no_frontend() -> str:
    """Why cudnn-frontend cannot be used; "" where it can."""
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    try:
        import cudnn  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"nvidia-cudnn-frontend does not start: {str(error).splitlines()[0]}"
    return ""


def takes(q: Tensor) -> bool:
    """Whether q [T, heads, d] has such heads, and places that 32 bits hold."""
    return q.shape[-1] in HEAD_DIMS and q.numel() < 2**31


@dataclass(frozen=True)
class _Size:
    """What a plan is made for."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    segments: int
    longest: int
    heads: int
    groups: int
    dim: int


@dataclass(frozen=True)
class _Plan:
    """A built graph, its tensors by name and the bytes of its workspace."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int

    def run(self, handle: Any, device: torch.device, **given: Tensor) -> None:
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.graph.execute({self.tensors[name]: value for name, value in given.items()}, workspace, handle=handle)


@functools.cache
def _handle(device: torch.device) -> Any:
    import cudnn

    # Freed while cudnn is still there: its bindings count what outlives them, and print it.
    atexit.register(_forget)
    with torch.cuda.device(device):
        return cudnn.create_handle()


def _forget() -> None:
    for cached in (_forward_plan, _backward_plan, _handle):
        cached.cache_clear()


def _ready(device: torch.device) -> Any:
    """The handle, issuing to the current stream."""
    import cudnn

    handle = _handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


class _Sketch:
    """A graph in the making: its inputs and outputs, rows of tokens as [segments, heads, longest, dim] with ragged offsets."""

    def __init__(self, size: _Size):
        import cudnn

        types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.size, self.kind, self.cudnn = size, types[size.dtype], cudnn
        self.graph = cudnn.pygraph(
            io_data_type=self.kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_handle(size.device),
        )
        self.tensors: dict[str, Any] = {}
        for name in ("q_offsets", "kv_offsets", "stats_offsets"):
            self.tensors[name] = self._numbers(name, size.segments + 1)
        self.lengths = self.tensors["lengths"] = self._numbers("lengths", size.segments)

    def _numbers(self, name: str, count: int) -> Any:
        return self.graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.cudnn.data_type.INT32
        )

    def shape(self, heads: int, dim: int) -> tuple[list[int], list[int]]:
        size = self.size
        return [size.segments, heads, size.longest, dim], [size.longest * heads * dim, dim, heads * dim, 1]

    def rows(self, name: str, heads: int) -> Any:
        dims, strides = self.shape(heads, self.size.dim)
        tensor = self.tensors[name] = self.graph.tensor(name=name, dim=dims, stride=strides, data_type=self.kind)
        return tensor.set_ragged_offset(self.tensors["q_offsets" if heads == self.size.heads else "kv_offsets"])

    def out(self, name: str, tensor: Any, heads: int) -> None:
        dims, strides = self.shape(heads, self.size.dim)
        tensor.set_output(True).set_dim(dims).set_stride(strides).set_data_type(self.kind)
        tensor.set_ragged_offset(self.tensors["q_offsets" if heads == self.size.heads else "kv_offsets"])
        self.tensors[name] = tensor

    def stats(self, tensor: Any) -> Any:
        """The logarithms of the softmax sums, float32 [T, heads]."""
        dims, strides = self.shape(self.size.heads, 1)
        tensor.set_dim(dims).set_stride(strides).set_data_type(self.cudnn.data_type.FLOAT)
        self.tensors["stats"] = tensor
        return tensor.set_ragged_offset(self.tensors["stats_offsets"])

    def built(self) -> _Plan:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        return _Plan(self.graph, self.tensors, self.graph.get_workspace_size())


@functools.cache
def _forward_plan(size: _Size) -> _Plan:
    sketch = _Sketch(size)
    q, k, v = (sketch.rows(n, h) for n, h in (("q", size.heads), ("k", size.groups), ("v", size.groups)))
    out, stats = sketch.graph.sdpa(
        name="attention",
        q=q,
        k=k,
        v=v,
        is_inference=False,
        attn_scale=size.dim**-0.5,
        use_causal_mask=True,
        use_padding_mask=True,
        seq_len_q=sketch.lengths,
        seq_len_kv=sketch.lengths,
    )
    sketch.out("out", out, size.heads)
    sketch.stats(stats).set_output(True)
    return sketch.built()


@functools.cache
def _backward_plan(size: _Size) -> _Plan:
    sketch = _Sketch(size)
    q, k, v = (sketch.rows(n, h) for n, h in (("q", size.heads), ("k", size.groups), ("v", size.groups)))
    out, grad = (sketch.rows(name, size.heads) for name in ("out", "grad"))
    dims, strides = sketch.shape(size.heads, 1)
    stats = sketch.stats(
        sketch.graph.tensor(name="stats", dim=dims, stride=strides, data_type=sketch.cudnn.data_type.FLOAT)
    )
    dq, dk, dv = sketch.graph.sdpa_backward(
        name="attention_backward",
        q=q,
        k=k,
        v=v,
        o=out,
        dO=grad,
        stats=stats,
        attn_scale=size.dim**-0.5,
        use_causal_mask=True,
        use_padding_mask=True,
        seq_len_q=sketch.lengths,
        seq_len_kv=sketch.lengths,
        max_total_seq_len_q=size.tokens,  # else the workspace is as large as segments x longest
        max_total_seq_len_kv=size.tokens,
    )
    for name, tensor, heads in (("dq", dq, size.heads), ("dk", dk, size.groups), ("dv", dv, size.groups)):
        sketch.out(name, tensor, heads)
    return sketch.built()


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        tokens, heads, dim = q.shape
        groups, number = k.shape[1], len(ends) - 1
        most = _grain(number, _SEGMENTS)
        more = most - number
        size = _Size(q.device, q.dtype, _grain(tokens, _TOKENS), most, _grain(longest, _LONGEST), heads, groups, dim)
        ends = torch.nn.functional.pad(ends, (0, more), value=tokens)
        places = {
            "lengths": ends.diff(),
            "q_offsets": ends * (heads * dim),
            "kv_offsets": ends * (groups * dim),
            "stats_offsets": ends * heads,
        }
        out, stats = torch.empty_like(q), q.new_empty(tokens, heads, dtype=torch.float32)
        _forward_plan(size).run(_ready(q.device), q.device, q=q, k=k, v=v, out=out, stats=stats, **places)
        ctx.save_for_backward(q, k, v, out, stats, *places.values())
        ctx.size, ctx.names = size, tuple(places)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, stats, *values = ctx.saved_tensors
        places = dict(zip(ctx.names, values, strict=True))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = dict(q=q, k=k, v=v, out=out, grad=grad.contiguous(), stats=stats, dq=dq, dk=dk, dv=dv, **places)
        _backward_plan(ctx.size).run(_ready(q.device), q.device, **given)
        return dq, dk, dv, None, None


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, *, ends: Tensor, longest: int) -> Tensor:
    """Causal attention within segments: q [T, heads, d], k and v [T, groups, d] in a 16-bit type on a GPU -> [T, heads, d].

    ends : int32 [segments + 1] on the device, from 0 to T.  longest : the longest segment.
    """
    return _Ragged.apply(q, k, v, ends, longest)  # type: ignore[no-any-return]
