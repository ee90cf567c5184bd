"""Work on a second stream: what it reads is kept until it is done, and what it makes is waited for before it is read."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from megatron_swift.kernels.beside import AT_ONCE, Beside


class Stream:
    """Notes what waits for what."""

    device = torch.device("cuda")

    def __init__(self, name: str, notes: list[tuple[str, ...]]):
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append((self.name, "waits for all of", other.name))

    def wait_event(self, event: str) -> None:
        self.notes.append((self.name, "waits for", event))

    def record_event(self) -> str:
        return f"work {sum(note[1] == 'works' for note in self.notes)}"


@pytest.fixture
def notes(monkeypatch) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("first", found))

    @contextlib.contextmanager
    def on(stream):
        found.append((stream.name, "works"))
        yield

    monkeypatch.setattr(torch.cuda, "stream", on)
    return found


def test_at_once_without_a_stream():
    assert AT_ONCE.run(lambda: 3, torch.ones(1)) == 3 and AT_ONCE.follow(lambda: 4) == 4
    AT_ONCE.join()
    assert not AT_ONCE._under_way


def test_who_waits_for_whom(notes):
    beside = Beside(Stream("second", notes))
    assert beside.run(lambda: 1) == 1
    work = [("second", "waits for all of", "first"), ("second", "works")]
    assert notes == work
    assert beside.follow(lambda: 2) == 2
    assert notes == work * 2  # what follows holds nobody up
    beside.run(lambda: 3)
    before = [("first", "waits for", "work 1"), ("first", "waits for", "work 2")]
    assert notes == [*work, *work, *before, *work]
    beside.join()
    assert notes[-2:] == [("first", "waits for", "work 3"), ("first", "waits for all of", "second")]


def test_what_is_read_is_kept_until_it_is_waited_for(notes):
    beside = Beside(Stream("second", notes))

    def ask(do, seed: int) -> weakref.ref:
        x = torch.full((3,), float(seed))
        do(x.sum, x)
        return weakref.ref(x)

    first, followed = ask(beside.run, 1), ask(beside.follow, 2)
    assert first() is not None and followed() is not None
    second = ask(beside.run, 3)
    assert first() is None and followed() is None and second() is not None
    beside.join()
    assert second() is None


def test_several_pieces_under_way(notes):
    """The asking stream waits for a piece only where as many others are."""
    beside = Beside(Stream("second", notes), pieces=2)
    for _ in range(3):
        beside.run(lambda: None)
        beside.follow(lambda: None)
    waits = [note for note in notes if note[:2] == ("first", "waits for")]
    assert waits == [("first", "waits for", "work 1"), ("first", "waits for", "work 2")]
    beside.join()
    waits = [note[2] for note in notes if note[:2] == ("first", "waits for")]
    assert waits == [f"work {number}" for number in range(1, 7)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need CUDA")
def test_memory_is_not_given_out_too_early():
    """The first stream drops and overwrites what the second still reads: wrong at once without what is held."""
    beside = Beside(torch.cuda.Stream())
    slow = torch.randn(4096, 4096, device="cuda")
    results = []
    for number in range(50):
        x = torch.full((1 << 22,), float(number), device="cuda")

        def work(x: torch.Tensor = x) -> torch.Tensor:
            (slow @ slow) @ slow
            return x.sum(dtype=torch.float64)

        results.append(beside.run(work, x))
        del x, work
        torch.full((1 << 22,), -1.0, device="cuda")
    beside.join()
    assert torch.stack(results).tolist() == [float(number * (1 << 22)) for number in range(50)]
