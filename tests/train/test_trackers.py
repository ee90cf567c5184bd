"""Scalars to TensorBoard and to hosted trackers; what happens when one of them fails."""

from __future__ import annotations

import logging
import math
import sys
import types

import pytest

from megatron_swift.train.outputs import VS_SAMPLES
from megatron_swift.train.trackers import TrackerOptions, Trackers


@pytest.fixture
def log(monkeypatch):
    """The messages logged, each once whatever handlers other tests have left."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "handlers", [handler])
    return messages


def options(tmp_path, *kinds):
    hosted = {"wandb": "project", "swanlab": "project"}
    names = {"wandb": "run", "swanlab": "run"}
    return TrackerOptions(
        kinds=kinds, folder=tmp_path / "runs", vs_samples=VS_SAMPLES, projects=hosted, names=names, config={"lr": 1.0}
    )


def test_tensorboard_tags(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(options(tmp_path, "tensorboard"))
    for step in (1, 2):
        trackers.scalars({"lm loss": 3.0 / step, "iteration-time": math.nan}, step=step, samples=16 * step)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["iteration-time", "lm loss", "lm loss vs samples"]
    assert [(e.step, e.value) for e in events.Scalars("lm loss")] == [(1, 3.0), (2, 1.5)]
    assert [e.step for e in events.Scalars("lm loss vs samples")] == [16, 32]


class Api(types.ModuleType):
    """A hosted tracker's package."""

    def __init__(self, name, broken=""):
        super().__init__(name)
        self.calls, self.broken = [], broken

    def _note(self, name, kwargs):
        self.calls.append((name, kwargs))
        if name == self.broken:
            raise ConnectionError("no network")

    def init(self, **kwargs):
        self._note("init", kwargs)

    def log(self, values, step):
        self._note("log", {"values": values, "step": step})

    def finish(self):
        self._note("finish", {})


@pytest.mark.parametrize(("kind", "key"), [("wandb", "name"), ("swanlab", "experiment_name")])
def test_hosted(tmp_path, monkeypatch, kind, key):
    api = Api(kind)
    monkeypatch.setitem(sys.modules, kind, api)
    trackers = Trackers(options(tmp_path, kind))
    assert not api.calls  # nothing before the first value
    trackers.scalars({"lm loss": 2.0}, step=1, samples=16)
    trackers.close()
    assert api.calls == [
        ("init", {"project": "project", key: "run", "config": {"lr": 1.0}}),
        ("log", {"values": {"lm loss": 2.0, "consumed samples": 16}, "step": 1}),
        ("finish", {}),
    ]


@pytest.mark.parametrize(
    ("broken", "words", "calls"),
    [("init", "cannot start: no network", 1), ("log", "failed: no network", 2), ("finish", "failed to close", 5)],
)
def test_one_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch, log, broken, words, calls):
    bad, good = Api("wandb", broken), Api("swanlab")
    monkeypatch.setitem(sys.modules, "wandb", bad)
    monkeypatch.setitem(sys.modules, "swanlab", good)
    trackers = Trackers(options(tmp_path, "wandb", "swanlab"))
    for step in (1, 2, 3):
        trackers.scalars({"lm loss": 2.0}, step=step, samples=step)
    trackers.close()
    (message,) = log
    assert message.startswith(f"WARNING --report_to wandb {words}") and message.endswith("going on without it")
    assert len(bad.calls) == calls and [name for name, _ in good.calls] == ["init", "log", "log", "log", "finish"]


def test_package_that_is_not_installed(tmp_path, monkeypatch, log):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = Trackers(options(tmp_path, "wandb"))
    for step in (1, 2):
        trackers.scalars({"lm loss": 2.0}, step=step, samples=step)
    trackers.close()
    assert len(log) == 1 and "pip install 'megatron-swift[wandb]'" in log[0]


def test_nothing_to_track(tmp_path):
    trackers = Trackers(options(tmp_path))
    trackers.scalars({"lm loss": 2.0}, step=1, samples=1)
    trackers.close()
    Trackers(options(tmp_path, "tensorboard")).close()  # of a run that ended before its first step
    assert list(tmp_path.iterdir()) == []
