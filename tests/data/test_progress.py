"""A bar on a terminal only; elsewhere a line every ten seconds; both with rows/s and the time left."""

from __future__ import annotations

import io
import logging

import pytest

from megatron_swift.data import progress
from megatron_swift.data.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(out, clock, seconds: float) -> None:
    bar = Progress("encoded", 1000, out=out)
    for done in range(100, 1001, 100):
        clock[0] += seconds / 10
        bar.update(done)
    bar.finish()


def test_a_terminal_gets_a_bar_that_goes_away(clock, caplog):
    caplog.set_level(logging.INFO)
    out = Terminal()
    run(out, clock, 5.0)
    drawn = out.getvalue().split("\r\x1b[K")
    assert drawn[1] == f"[{'###' + '.' * 27}] encoded 100 of 1000 rows, 200 rows/s, 4 s left"
    assert len(drawn) == 11
    assert drawn[-1] == ""
    assert caplog.messages == ["data: encoded 1000 rows in 5 s, 200 rows/s"]


def test_a_pipe_gets_a_line_every_ten_seconds(clock, caplog):
    caplog.set_level(logging.INFO)
    out = io.StringIO()
    run(out, clock, 25.0)
    assert out.getvalue() == ""
    assert caplog.messages == [
        "data: encoded 400 of 1000 rows, 40 rows/s, 15 s left",
        "data: encoded 800 of 1000 rows, 40 rows/s, 5 s left",
        "data: encoded 1000 rows in 25 s, 40 rows/s",
    ]


def test_quick_work_is_not_worth_a_word(clock, caplog):
    caplog.set_level(logging.INFO)
    run(io.StringIO(), clock, 0.5)
    assert not caplog.messages


def test_durations():
    assert [duration(s) for s in (7.4, 200, 7500)] == ["7 s", "3 min 20 s", "2 h 5 min"]
