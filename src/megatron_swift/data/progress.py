"""How far a long piece of work is: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megatron_swift.utils.log import get_logger

LINE_EVERY = 10.0  # seconds
BAR_EVERY = 0.2
WIDTH = 30  # characters of the bar


class Progress:
    """Says how many of `total` rows are done, how many a second, and how long the rest will take.

    what : the word for what is done to them, such as "encoded".
    """

    def __init__(self, what: str, total: int, *, out: TextIO | None = None) -> None:
        self.what, self.total = what, total
        self.out = sys.stderr if out is None else out
        self.bar = self.out.isatty()
        self.begin = self.last = time.monotonic()
        self.drawn = False

    def update(self, done: int) -> None:
        """`done` rows are done by now. Of the last ones `finish` tells."""
        now = time.monotonic()
        if done >= self.total or now - self.last < (BAR_EVERY if self.bar else LINE_EVERY):
            return
        self.last = now
        text = self._text(done, now - self.begin)
        if self.bar:
            full = WIDTH * done // max(self.total, 1)
            self.out.write(f"\r\x1b[K[{'#' * full}{'.' * (WIDTH - full)}] {text}")
            self.out.flush()
            self.drawn = True
        else:
            get_logger().info("data: %s", text)

    def close(self) -> None:
        """Take the bar away."""
        if self.drawn:
            self.out.write("\r\x1b[K")
            self.out.flush()
            self.drawn = False

    def finish(self) -> None:
        """All rows are done. Work that took a second or more is summed up in one line."""
        self.close()
        seconds = time.monotonic() - self.begin
        if seconds >= 1:
            rate = self.total / seconds
            get_logger().info("data: %s %d rows in %s, %d rows/s", self.what, self.total, duration(seconds), rate)

    def _text(self, done: int, seconds: float) -> str:
        rate = done / seconds
        left = duration((self.total - done) / rate) if rate else "?"
        return f"{self.what} {done} of {self.total} rows, {rate:.0f} rows/s, {left} left"


def duration(seconds: float) -> str:
    """Such as 7 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
