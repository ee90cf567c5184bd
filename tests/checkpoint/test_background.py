"""One job at a time beside the caller."""

from __future__ import annotations

import threading

import pytest

from megatron_swift.checkpoint.background import Background


def test_runs_beside_and_is_waited_for():
    gate, done, background = threading.Event(), [], Background()
    background.start(lambda: gate.wait(20) and done.append(threading.current_thread().name))
    assert background.busy and not done
    gate.set()
    assert background.join() is None and done == ["checkpoint"] and not background.busy


def test_one_in_flight():
    background = Background()
    background.start(lambda: None)
    with pytest.raises(AssertionError):
        background.start(lambda: None)
    background.join()
    background.start(lambda: None)
    assert background.join() is None


def test_a_failure_is_handed_over_once():
    background, error = Background(), OSError("full")

    def fail():
        raise error

    background.start(fail)
    assert background.join() is error and background.join() is None
