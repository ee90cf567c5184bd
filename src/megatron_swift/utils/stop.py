"""A request to stop: SIGTERM or SIGUSR1 to this process, or a note of its launcher's. Whoever asks gets a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NOTE = "MEGATRON_SWIFT_STOP"  # the file in which a launcher tells its ranks of a signal
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`asked` is the signal's name, "" while there was none."""

    def __init__(self, note: Path | None = None):
        self._note, self._signal = note, ""

    @property
    def asked(self) -> str:
        """Looked up anew each time: a microsecond."""
        if not self._signal and self._note is not None and os.path.exists(self._note):
            self._signal = self._note.read_text(encoding="utf-8")
        return self._signal

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """While it is open, the signals are noted instead of ending the process; a second one ends it as ever.

    Outside the main thread, where no handler can be set, the launcher's note alone counts.
    """
    note = os.environ.get(NOTE)
    request = StopRequest(Path(note) if note else None)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def first(number: int, frame: FrameType | None) -> None:
        request._noticed(number, frame)
        # torchrun sends SIGTERM to all ranks when one has failed: then they must be able to end.
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in SIGNALS:
            signal.signal(number, first)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
