"""Generation token by token: the keys and values of all earlier tokens are kept, so that only new tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from megatron_swift.kernels.attention import SDPA_KERNELS, AttentionCore, Segments
from megatron_swift.models.decoder import Decoder
from megatron_swift.models.layers import Attention

_SPARE = 128  # tokens of room when the buffers are made; they grow by half when it is used up


class LayerCache:
    """The attention core of one layer: it stores the new keys and values, then lets the new queries attend.

    keys, values : [batch, groups, capacity, d], zero where nothing was stored (a masked score times NaN would be NaN).
    """

    def __init__(self, batch: Batch, prompt_core: AttentionCore) -> None:
        self.batch, self.prompt_core = batch, prompt_core
        self.keys = self.values = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        batch = self.batch
        if batch.decoding:
            self.reserve(k, batch.longest)
        else:
            shape = (len(batch.lengths), k.shape[1], batch.longest + _SPARE, k.shape[2])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[batch.rows, :, batch.slots] = k
        self.values[batch.rows, :, batch.slots] = v
        if not batch.decoding:
            return self.prompt_core(q, k, v, segments)
        # One query position per sequence: the query heads of a group take the place of positions, which needs no copy of k and v.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
        keys, values = self.keys[:, :, : batch.longest], self.values[:, :, : batch.longest]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=batch.mask).reshape(q.shape)

    def reserve(self, like: Tensor, capacity: int) -> None:
        """Make room for `capacity` tokens."""
        present = self.keys.shape[2]
        if capacity > present:
            more = max(capacity, present + present // 2) - present
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def keep(self, index: Tensor) -> None:
        """Drop all sequences but those at `index`."""
        self.keys, self.values = self.keys[index], self.values[index]


class Batch:
    """What all layers need to know of the tokens being computed.

    lengths  : tokens of each sequence, the new ones included.
    rows, slots : int64 [T], where the key and value of each new token belong.
    mask     : bool [batch, 1, 1, longest], None where all sequences are equally long. Decoding only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.decoding = False
        self.lengths: list[int] = []
        self.rows = self.slots = torch.empty(0, dtype=torch.int64, device=device)
        self.mask: Tensor | None = None
        self.segments = Segments.of([1], device)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def start(self, lengths: Sequence[int]) -> None:
        """All tokens of the prompts are new."""
        self.decoding, self.lengths = False, list(lengths)
        counts = torch.tensor(self.lengths)
        self.rows = torch.arange(len(counts)).repeat_interleave(counts).to(self.device)
        self.slots = torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)
        self.segments = Segments.of(self.lengths, self.device)

    def advance(self) -> None:
        """One token of each sequence is new."""
        if not self.decoding or len(self.rows) != len(self.lengths):
            self.rows = torch.arange(len(self.lengths), device=self.device)
            self.segments = Segments.of([1] * len(self.lengths), self.device)
        self.decoding = True
        self.slots = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        ragged = min(self.lengths) != self.longest
        self.mask = (
            (torch.arange(self.longest, device=self.device) <= self.slots[:, None])[:, None, None] if ragged else None
        )


class CachedDecoder:
    """A whole Decoder that generates; while the `with` block lasts, its attention reads and fills this object's cache.

        with CachedDecoder(model) as cached:
            logits = cached.prefill(prompts)
            logits = cached.step(tokens)

    Logits are float32 [batch, vocabulary], of the last token of each sequence.
    """

    def __init__(self, model: Decoder) -> None:
        assert model.first and model.last, "a pipeline stage cannot generate by itself"
        self.model = model
        self.device = model.output_weight().device
        self.batch = Batch(self.device)
        self.caches: list[LayerCache] = []

    def __enter__(self) -> CachedDecoder:
        for attention in self._attentions():
            self.caches.append(LayerCache(self.batch, attention.core))
            attention.core = self.caches[-1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attention, cache in zip(self._attentions(), self.caches, strict=True):
            attention.core = cache.prompt_core
        self.caches = []

    def _attentions(self) -> list[Attention]:
        return list(self.model.attentions)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Forget everything and read the prompts, each at least one token, as one packed row."""
        self.batch.start([len(prompt) for prompt in prompts])
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        ends = self.batch.segments.cumulative[1:].long() - 1
        return self._logits(tokens, ends)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each sequence: tokens int64 [batch]."""
        self.batch.advance()
        with sdpa_kernel(SDPA_KERNELS):  # each step has a new length
            return self._logits(tokens, None)

    @torch.inference_mode()
    def keep(self, index: Sequence[int]) -> None:
        """Drop all sequences but those at `index`, which keep their order."""
        where = torch.tensor(index, device=self.device)
        self.batch.lengths = [self.batch.lengths[number] for number in index]
        for cache in self.caches:
            cache.keep(where)

    def _logits(self, tokens: Tensor, ends: Tensor | None) -> Tensor:
        assert self.caches, "use it as a context manager"
        hidden = self.model.hidden_states(tokens, self.batch.slots, self.batch.segments)
        return self.model.logits(hidden if ends is None else hidden[ends]).float()
