"""Work that nothing waits for soon, on a second stream of a GPU: weights' gradients, which only the update reads.

They run while the backward pass goes on, and fill what it leaves of the GPU: the time between one kernel and the next, and the end of each
kernel, when some processors have no more to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Work(NamedTuple):
    asked_by: torch.cuda.Stream
    done: torch.cuda.Event
    reads: tuple[Tensor, ...]


class Beside:
    """Runs work on `stream`, after all that was issued to the stream of whoever asks; at once where there is no stream, as on a CPU.

    What the work reads is kept until the asking stream has waited for it: its memory may be given out again only then. To hold little, only
    so many `pieces` may be under way. What the work makes may be used on the second stream alone until `join`.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None, *, pieces: int = 1):
        assert pieces > 0
        self.stream, self.pieces = stream, pieces
        self._under_way: deque[list[_Work]] = deque()

    def run(self, work: Callable[[], T], *reads: Tensor) -> T:
        """work(), which reads these tensors: a piece. The asking stream first waits for the earliest, where there are enough."""
        if self.stream is not None:
            while len(self._under_way) >= self.pieces:
                self._let_go()
            self._under_way.append([])
        return self.follow(work, *reads)

    def follow(self, work: Callable[[], T], *reads: Tensor) -> T:
        """As `run`, for what goes on with the results of the last piece, and belongs to it: nothing is waited for."""
        if self.stream is None:
            return work()
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            made = work()
        if not self._under_way:
            self._under_way.append([])
        self._under_way[-1].append(_Work(here, self.stream.record_event(), reads))
        return made

    def join(self) -> None:
        """Have the current stream wait for all work: from here on it may use what was made."""
        while self._under_way:
            self._let_go()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _let_go(self) -> None:
        for work in self._under_way.popleft():
            work.asked_by.wait_event(work.done)


AT_ONCE = Beside()
