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
STREAM_SAID = "; weights' gradients on a second stream"  # in the banner


class Later:
    """Does work that nothing waits for soon: here at once, the plain twin of `SecondStream`."""

    def run(self, work: Callable[[], T], *reads: Tensor) -> T:
        """work(), which reads these tensors and makes others. To be used in further work alone, until `join`."""
        return work()

    def follow(self, work: Callable[[], T], *reads: Tensor) -> T:
        """As `run`, for what goes on with the results of the last work."""
        return work()

    def join(self) -> None:
        """From here on what was made may be used."""


class SecondStream(Later):
    """Does it on another stream of the GPU, after all that was issued to the stream of whoever asks.

    What the work reads is kept until the asking stream has waited for it: its memory may be given out again only then. To hold little, that
    happens when `run` is called the next time; `follow` holds nobody up.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._held: dict[torch.cuda.Stream, list[Tensor]] = {}  # by who asked
        # Recorded anew each time: what waits for an event waits for its last record before.
        self._asked, self._done = torch.cuda.Event(), torch.cuda.Event()

    def run(self, work: Callable[[], T], *reads: Tensor) -> T:
        self._let_go()
        return self.follow(work, *reads)

    def follow(self, work: Callable[[], T], *reads: Tensor) -> T:
        here = torch.cuda.current_stream(self._stream.device)
        self._asked.record(here)
        self._stream.wait_event(self._asked)
        self._held.setdefault(here, []).extend(reads)
        torch.cuda.set_stream(self._stream)
        try:
            return work()
        finally:
            torch.cuda.set_stream(here)

    def join(self) -> None:
        self._let_go()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _let_go(self) -> None:
        if self._held:
            self._done.record(self._stream)
            for asked in self._held:
                asked.wait_event(self._done)
            self._held.clear()


AT_ONCE = Later()
