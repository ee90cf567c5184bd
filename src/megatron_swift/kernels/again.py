"""A value between two operations that is computed again for the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Forgotten(NamedTuple):
    """What stands for the value in the autograd graph: how to see it, once it is there again."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again:
    """make(x), whose result was `first`: forgotten wherever it would be kept, made once when the first of those places asks for it."""

    def __init__(self, make: Callable[[Tensor], Tensor], x: Tensor, first: Tensor) -> None:
        self._make, self._x = make, x.detach()
        self._place, self._dtype = first.untyped_storage().data_ptr(), first.dtype
        self._forgotten = self._left = 0
        self._value: Tensor | None = None
        self._stream = self._made_on = _stream(x)

    def forget(self, kept: Tensor) -> Tensor | _Forgotten:
        if kept.dtype != self._dtype or kept.untyped_storage().data_ptr() != self._place:
            return kept
        self._forgotten += 1
        return _Forgotten(kept.size(), kept.stride(), int(kept.storage_offset()))

    def recall(self, kept: Tensor | _Forgotten) -> Tensor:
        if not isinstance(kept, _Forgotten):
            return kept
        here = _stream(self._x)
        if self._value is None:
            self._left = self._forgotten
        if self._value is None or here != self._made_on:  # streams do not wait for each other
            if here is not None and here != self._stream:
                self._x.record_stream(here)
            with torch.no_grad():
                self._value, self._made_on = self._make(self._x), here
        value = self._value
        self._left -= 1
        if not self._left:  # nobody else will ask
            self._value = None
        return value.as_strided(kept.size, kept.stride, kept.offset)


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def through(
    make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor], x: Tensor, *, again: bool = True
) -> Tensor:
    """use(make(x)). With `again`, what `use` would keep of make(x) for its backward pass is made anew from x instead.

    make is called once more, without gradients, so it should cost little and must give the same value again; use is not repeated. Nothing
    is saved where use keeps a copy in another precision or order. Views are seen through. The parameters in make are those of the time
    of the backward pass.
    """
    value = make(x)
    if not (again and torch.is_grad_enabled() and value.requires_grad):
        return use(value)
    anew = _Again(make, x, value)
    with torch.autograd.graph.saved_tensors_hooks(anew.forget, anew.recall):
        return use(value)
