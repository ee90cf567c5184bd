"""Work on a second stream: what it reads is kept until it is done, and what it makes is waited for before it is read."""

from __future__ import annotations

import weakref

import pytest
import torch

from megatron_swift.kernels.later import AT_ONCE, SecondStream


class Stream:
    """Notes what waits for what."""

    device = torch.device("cuda")

    def __init__(self, name: str, notes: list[tuple[str, ...]]):
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append((self.name, "waits for all of", other.name))

    def wait_event(self, event: Event) -> None:
        self.notes.append((self.name, "waits for", event.recorded))


class Event:
    recorded = ""

    def record(self, stream: Stream) -> None:
        works = sum(note == (stream.name, "works") for note in stream.notes)
        self.recorded = f"{stream.name} {works}"


@pytest.fixture
def notes(monkeypatch) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    first = Stream("first", found)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: found.append((stream.name, "works")))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("second", found))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return found


def test_at_once_without_a_stream():
    assert AT_ONCE.run(lambda: 3, torch.ones(1)) == 3 and AT_ONCE.follow(lambda: 4) == 4
    AT_ONCE.join()


def test_who_waits_for_whom(notes):
    later = SecondStream(torch.device("cuda"))
    x = torch.ones(1)
    turns = [("second", "works"), ("first", "works")]
    assert later.run(lambda: 1, x) == 1
    assert notes == [("second", "waits for", "first 0"), *turns]
    notes.clear()
    assert later.follow(lambda: 2, x) == 2
    assert notes == [("second", "waits for", "first 0"), *turns]  # what follows holds nobody up
    later.run(lambda: 3, x)
    assert notes[3:] == [("first", "waits for", "second 1"), ("second", "waits for", "first 1"), *turns]
    notes.clear()
    later.join()
    assert notes == [("first", "waits for", "second 0"), ("first", "waits for all of", "second")]


def test_the_stream_is_the_asking_ones_again_after_an_error(notes):
    later = SecondStream(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        later.run(lambda: 1 // 0)
    assert notes[-2:] == [("second", "works"), ("first", "works")]


def test_what_is_read_is_kept_until_it_is_waited_for(notes):
    later = SecondStream(torch.device("cuda"))

    def ask(do, seed: int) -> weakref.ref:
        x = torch.full((3,), float(seed))
        do(x.sum, x)
        return weakref.ref(x)

    first, followed = ask(later.run, 1), ask(later.follow, 2)
    assert first() is not None and followed() is not None
    second = ask(later.run, 3)
    assert first() is None and followed() is None and second() is not None
    later.join()
    assert second() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need CUDA")
def test_memory_is_not_given_out_too_early():
    """The first stream drops and overwrites what the second still reads: wrong at once without what is held."""
    later = SecondStream(torch.device("cuda"))
    slow = torch.randn(4096, 4096, device="cuda")
    results = []
    for number in range(50):
        x = torch.full((1 << 22,), float(number), device="cuda")

        def work(x: torch.Tensor = x) -> torch.Tensor:
            (slow @ slow) @ slow
            return x.sum(dtype=torch.float64)

        results.append(later.run(work, x))
        del x, work
        torch.full((1 << 22,), -1.0, device="cuda")
    later.join()
    assert torch.stack(results).tolist() == [float(number * (1 << 22)) for number in range(50)]
