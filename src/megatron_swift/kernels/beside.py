"""Work that nothing waits for soon, on a second stream of a GPU: weights' gradients, which only the update reads.

They run while the backward pass goes on, and fill what it leaves of the GPU: the time between one kernel and the next, and the end of each
kernel, when some processors have no more to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Beside:
    """Runs work on `stream`, after all that was issued to the stream of whoever asks; at once where there is no stream, as on a CPU.

    What the work reads is kept until the asking stream has waited for it: its memory may be given out again only then. To hold little, that
    happens when the next piece of work is asked for. What the work makes may be used on the second stream alone until `join`.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self.stream = stream
        self._held: list[tuple[torch.cuda.Stream, torch.cuda.Event, tuple[Tensor, ...]]] = []

    def run(self, work: Callable[[], T], *reads: Tensor) -> T:
        """work(), which reads these tensors. The asking stream first waits for all work before it."""
        self._let_go()
        return self.follow(work, *reads)

    def follow(self, work: Callable[[], T], *reads: Tensor) -> T:
        """As `run`, for what goes on with the results of the last piece: nothing is waited for."""
        if self.stream is None:
            return work()
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            made = work()
        self._held.append((here, self.stream.record_event(), reads))
        return made

    def join(self) -> None:
        """Have the current stream wait for all work: from here on it may use what was made."""
        self._let_go()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _let_go(self) -> None:
        for asking, done, _ in self._held:
            asking.wait_event(done)
        self._held.clear()


AT_ONCE = Beside()
