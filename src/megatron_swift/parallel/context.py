"""Context parallelism: each segment is cut into 2 x cp chunks, rank r holding chunks r and 2 cp - 1 - r, so that causal work is even.

Labels are shifted and positions counted before the cut. Three ways to let a query see the keys of other ranks, all exact:
all-gather of keys and values, a ring that passes them on (p2p), and an exchange of tokens for heads (a2a).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_swift.kernels.attention import AttentionCore, Segments
from megatron_swift.kernels.block_attention import Blocks, attend, attend_backward, merge
from megatron_swift.parallel.collectives import AllToAll, all_gather, reduce_scatter
from megatron_swift.parallel.mesh import Axis

KINDS = ("all_gather", "p2p", "a2a")


class KeyBlocks(NamedTuple):
    """Keys that a chunk of queries of every segment sees. keys: their global positions; causal: the mask of square blocks."""

    blocks: Blocks
    keys: Tensor
    causal: bool


@dataclass(frozen=True)
class ContextSegments(Segments):
    """The global segments of a row whose tokens are spread over cp ranks, with the index tensors that every layer needs.

    lengths are global, each a multiple of 2 cp. order: positions in the all-gathered row (rank by rank) that put it into global order;
    place: its inverse. halves: local positions of the first and second chunk of every segment.
    """

    cp: int
    order: Tensor
    place: Tensor
    halves: tuple[Tensor, Tensor]
    _seen: dict[int, tuple[KeyBlocks, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def chunks(self) -> list[int]:
        """Tokens per chunk of each segment."""
        return [length // (2 * self.cp) for length in self.lengths]

    def seen_by(self, number: int) -> tuple[KeyBlocks, ...]:
        """What query chunk `number` of every segment sees: its own square, and the rectangle of all keys before it unless it is the first.

        Made once per row: every layer and both passes get the same tensors.
        """
        if number not in self._seen:
            self._seen[number] = tuple(self._key_blocks(number))
        return self._seen[number]

    def _key_blocks(self, number: int) -> Iterator[KeyBlocks]:
        chunks, device = self.chunks, self.order.device
        own, before, start = [], [], 0
        for length, chunk in zip(self.lengths, chunks, strict=True):
            own.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
            before.append(torch.arange(start, start + number * chunk))
            start += length
        yield KeyBlocks(Blocks.of(chunks, chunks), torch.cat(own).to(device), True)
        if number:
            yield KeyBlocks(
                Blocks.of(chunks, [number * chunk for chunk in chunks]), torch.cat(before).to(device), False
            )


def zigzag(lengths: Sequence[int], *, cp: int, rank: int) -> Tensor:
    """The global positions, int64 [T / cp], that a rank holds, in its local order. Lengths are multiples of 2 cp."""
    parts, start = [], 0
    for length in lengths:
        chunk = length // (2 * cp)
        assert chunk * 2 * cp == length, (length, cp)
        for number in (rank, 2 * cp - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(parts)


def context_segments(lengths: Sequence[int], *, cp: int, device: torch.device) -> ContextSegments:
    """The segments and index tensors of one row."""
    plain = Segments.of(lengths, device)
    place = torch.cat([zigzag(lengths, cp=cp, rank=rank) for rank in range(cp)])
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    for length in lengths:
        chunk = length // (2 * cp)
        for half in range(2):
            halves[half].append(torch.arange(start + half * chunk, start + (half + 1) * chunk))
        start += 2 * chunk
    first, second = (torch.cat(parts).to(device) for parts in halves)
    order = torch.argsort(place).to(device)
    return ContextSegments(plain.lengths, plain.cumulative, plain.longest, cp, order, place.to(device), (first, second))


def context_core(kind: str, axis: Axis, inner: AttentionCore) -> AttentionCore:
    """The attention core of a rank. inner: the kernel for whole segments, which a2a uses on its share of the heads."""
    assert axis.group is not None
    if kind == "a2a":
        return _Exchange(axis, inner)
    attention = _AllGather if kind == "all_gather" else _Ring

    def core(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), segments, axis)  # type: ignore[no-any-return]

    return core


def own_kernels(kind: str, axis: Axis) -> str:
    """Why the kernel for whole segments is not asked; "" where it is."""
    return "" if axis.size == 1 or kind == "a2a" else f"context parallelism by {kind} attends block by block"


class _AllGather(torch.autograd.Function):
    """Keys and values of all ranks are gathered; in the backward pass they are gathered again rather than kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, axis: Axis) -> Tensor:
        keys, values = _gather_pair(k, v, segments, axis)
        out, log_sums = torch.empty_like(q), []
        for half, number in enumerate((axis.rank, 2 * axis.size - 1 - axis.rank)):
            queries = q[segments.halves[half]]
            (square, own, _), *earlier = segments.seen_by(number)
            part, log_sum = attend(queries, keys[own], values[own], square, causal=True)
            for rectangle, before, _ in earlier:
                more, more_sum = attend(queries, keys[before], values[before], rectangle, causal=False)
                part, log_sum = merge(part, log_sum, more, more_sum)
            out[segments.halves[half]] = part.to(q.dtype)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.meta = segments, axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, *log_sums = ctx.saved_tensors
        segments, axis = ctx.meta
        keys, values = _gather_pair(k, v, segments, axis)
        exact = torch.promote_types(q.dtype, torch.float32)
        grad_q, grad_keys, grad_values = (
            torch.empty_like(q),
            *(torch.zeros(x.shape, dtype=exact, device=x.device) for x in (keys, values)),
        )
        for half, number in enumerate((axis.rank, 2 * axis.size - 1 - axis.rank)):
            at = segments.halves[half]
            part = torch.zeros(q[at].shape, dtype=exact, device=q.device)
            for blocks, where, causal in segments.seen_by(number):
                dq, dk, dv = attend_backward(
                    grad[at], q[at], keys[where], values[where], out[at], log_sums[half], blocks, causal=causal
                )
                part += dq
                grad_keys[where] += dk
                grad_values[where] += dv
            grad_q[at] = part.to(q.dtype)
        both = torch.stack((grad_keys, grad_values), 1)[segments.place]
        assert axis.group is not None
        mine = reduce_scatter(both, axis.group)
        return grad_q, mine[:, 0].to(k.dtype), mine[:, 1].to(v.dtype), None, None


def _gather_pair(k: Tensor, v: Tensor, segments: ContextSegments, axis: Axis) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values in global order."""
    assert axis.group is not None
    whole = all_gather(torch.stack((k, v), 1), axis.group)[segments.order]
    return whole[:, 0].contiguous(), whole[:, 1].contiguous()


class _Ring(torch.autograd.Function):
    """Keys and values go round; the forward pass merges one block after the other by their log-sum-exp.

    In the backward pass the gradients of keys and values travel with them and come home with one hop more.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, axis: Axis) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        first, second = segments.halves
        whole, half = [2 * c for c in segments.chunks], segments.chunks
        pair = torch.stack((k, v))
        for hop in range(axis.size):
            travelling = _pass_on(axis, pair) if hop < axis.size - 1 else None
            if hop == 0:
                out, log_sum = attend(q, pair[0], pair[1], Blocks.of(whole, whole), causal=True)
                out = out.to(exact)
            elif hop <= axis.rank:  # from an earlier rank: every query sees the first half of its keys
                more, more_sum = attend(q, pair[0][first], pair[1][first], Blocks.of(whole, half), causal=False)
                out, log_sum = merge(out, log_sum, more, more_sum)
            else:  # from a later rank: the second half of the queries sees all of its keys
                more, more_sum = attend(q[second], pair[0], pair[1], Blocks.of(half, whole), causal=False)
                out[second], log_sum[:, second] = merge(out[second], log_sum[:, second], more, more_sum)
            if travelling is not None:
                pair = travelling.arrive()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.meta = segments, axis
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum = ctx.saved_tensors
        segments, axis = ctx.meta
        exact = torch.promote_types(q.dtype, torch.float32)
        first, second = segments.halves
        whole, half = [2 * c for c in segments.chunks], segments.chunks
        pair, grad_q = torch.stack((k, v)), torch.zeros(q.shape, dtype=exact, device=q.device)
        homeward: _Travelling | None = None
        for hop in range(axis.size):
            travelling = _pass_on(axis, pair) if hop < axis.size - 1 else None
            grads = homeward.arrive() if homeward is not None else torch.zeros(pair.shape, dtype=exact, device=q.device)
            if hop == 0:
                dq, dk, dv = attend_backward(
                    grad, q, pair[0], pair[1], out, log_sum, Blocks.of(whole, whole), causal=True
                )
                grad_q += dq
                grads[0] += dk
                grads[1] += dv
            elif hop <= axis.rank:
                blocks = Blocks.of(whole, half)
                dq, dk, dv = attend_backward(
                    grad, q, pair[0][first], pair[1][first], out, log_sum, blocks, causal=False
                )
                grad_q += dq
                grads[0, first] += dk.to(exact)
                grads[1, first] += dv.to(exact)
            else:
                blocks = Blocks.of(half, whole)
                args = grad[second], q[second], pair[0], pair[1], out[second], log_sum[:, second]
                dq, dk, dv = attend_backward(*args, blocks, causal=False)
                grad_q[second] += dq.to(exact)
                grads[0] += dk
                grads[1] += dv
            homeward = _pass_on(axis, grads)
            if travelling is not None:
                pair = travelling.arrive()
        assert homeward is not None
        home = homeward.arrive()
        return grad_q.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), None, None


@dataclass
class _Travelling:
    """A tensor on its way from the previous rank, and mine on its way to the next."""

    into: Tensor
    sent: Tensor
    works: list[dist.Work]

    def arrive(self) -> Tensor:
        """What the previous rank sent."""
        for work in self.works:
            work.wait()
        return self.into


def _pass_on(axis: Axis, tensor: Tensor) -> _Travelling:
    into, tensor = torch.empty_like(tensor), tensor.contiguous()
    after, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    ops = [dist.P2POp(dist.isend, tensor, after, axis.group), dist.P2POp(dist.irecv, into, before, axis.group)]
    return _Travelling(into, tensor, dist.batch_isend_irecv(ops))


@dataclass
class _Exchange:
    """Ulysses: tokens are exchanged for heads, each rank attends whole segments with its heads, and back."""

    axis: Axis
    inner: AttentionCore

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        assert isinstance(segments, ContextSegments)
        size = self.axis.size
        if k.shape[1] % size:  # too few key/value heads to share: replicate them, autograd sums
            k, v = (x.repeat_interleave(size // k.shape[1], 1) for x in (k, v))
        q, k, v = (self._to_heads(x)[segments.order] for x in (q, k, v))
        out = self.inner(q, k, v, segments)[segments.place]
        return self._to_tokens(out)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[T / cp, heads, d] -> [T, heads / cp, d], rank by rank."""
        tokens, heads, d = x.shape
        parts = x.view(tokens, self.axis.size, heads // self.axis.size, d).transpose(0, 1)
        return self._exchanged(parts).reshape(-1, heads // self.axis.size, d)  # type: ignore[no-any-return]

    def _to_tokens(self, x: Tensor) -> Tensor:
        total, heads, d = x.shape
        parts = self._exchanged(x.view(self.axis.size, total // self.axis.size, heads, d))
        return parts.transpose(0, 1).reshape(total // self.axis.size, -1, d)  # type: ignore[no-any-return]

    def _exchanged(self, parts: Tensor) -> Tensor:
        """[size, ...]: part i goes to rank i."""
        ones = [1] * self.axis.size
        return AllToAll.apply(parts, ones, ones, self.axis.group)  # type: ignore[no-any-return]
