"""Signals to stop are noted once; the second one is as deadly as ever."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_swift.utils.stop import NOTE, SIGNALS, listening


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_next_one_ends(monkeypatch, number):
    monkeypatch.delenv(NOTE, raising=False)
    before = [signal.getsignal(s) for s in SIGNALS]
    with listening() as request:
        assert request.asked == ""
        os.kill(os.getpid(), number)
        assert request.asked == number.name
        assert signal.getsignal(number) == before[SIGNALS.index(number)]
        assert request.asked == number.name
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_a_second_signal_ends_the_process():
    pid = os.fork()
    if pid == 0:
        with listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_the_launchers_note(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTE, str(tmp_path / "stop"))
    with listening() as request:
        assert request.asked == ""
        (tmp_path / "stop").write_text("SIGUSR1")
        assert request.asked == "SIGUSR1"
        (tmp_path / "stop").unlink()
        assert request.asked == "SIGUSR1"


def test_outside_the_main_thread(tmp_path, monkeypatch):
    """No handler can be set there; the note is read all the same."""
    monkeypatch.setenv(NOTE, str(tmp_path / "stop"))
    (tmp_path / "stop").write_text("SIGTERM")
    found = []

    def look():
        with listening() as request:
            found.append(request.asked)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == ["SIGTERM"]
