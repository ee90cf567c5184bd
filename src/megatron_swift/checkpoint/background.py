"""One job at a time in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs a job beside the caller; `join` waits for it and hands over what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin. The one before must have been joined."""
        assert self._thread is None
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as failure:  # handed to whoever joins
            self._failure = failure

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> BaseException | None:
        """Wait for the job, if there is one; what it raised, once."""
        if self._thread is None:
            return None
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        return failure
