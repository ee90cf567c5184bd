"""Where curves go besides logging.jsonl. A tracker that fails says so once and is dropped: training goes on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_swift.utils.log import get_logger


class Tracker(Protocol):
    """One place that scalars are sent to."""

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None:
        """Send named values of one step; `samples` were consumed so far."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class TensorBoard:
    """Event files in a folder, with Megatron's tags; those of `vs_samples` are also written against consumed samples."""

    def __init__(self, folder: Path, *, queue_size: int, vs_samples: frozenset[str]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.vs_samples = SummaryWriter(str(folder), max_queue=queue_size), vs_samples

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
            if name in self.vs_samples:
                self.writer.add_scalar(f"{name} vs samples", value, samples)

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb or swanlab: both have init, log and finish."""

    def __init__(self, module: str, *, project: str, name: str, config: Mapping[str, Any]):
        self.api = importlib.import_module(module)
        key = "name" if module == "wandb" else "experiment_name"
        self.api.init(project=project, config=dict(config), **{key: name})

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None:
        self.api.log({**values, "consumed samples": samples}, step=step)

    def close(self) -> None:
        self.api.finish()


@dataclass(frozen=True, kw_only=True)
class TrackerOptions:
    """kinds: of tensorboard, wandb, swanlab. config: all arguments, for the hosted ones. projects and names by kind."""

    kinds: tuple[str, ...]
    folder: Path
    queue_size: int = 50
    vs_samples: frozenset[str] = frozenset()
    projects: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Trackers:
    """All trackers of a run, opened at the first value (importing TensorBoard takes seconds)."""

    def __init__(self, options: TrackerOptions):
        self.options = options
        self.open: dict[str, Tracker] | None = None

    def scalars(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        """Send the values to each tracker."""
        if self.open is None:
            self.open = {}
            for kind in self.options.kinds:
                self._guard(kind, "cannot start", lambda kind=kind: self._start(kind))
        for kind, tracker in list(self.open.items()):
            self._guard(kind, "failed", lambda tracker=tracker: tracker.scalars(values, step, samples))

    def close(self) -> None:
        """End each tracker."""
        for kind, tracker in list((self.open or {}).items()):
            self._guard(kind, "failed to close", tracker.close)

    def _start(self, kind: str) -> None:
        options = self.options
        assert self.open is not None
        if kind == "tensorboard":
            self.open[kind] = TensorBoard(options.folder, queue_size=options.queue_size, vs_samples=options.vs_samples)
        else:
            project, name = options.projects[kind], options.names[kind]
            self.open[kind] = Hosted(kind, project=project, name=name, config=options.config)

    def _guard(self, kind: str, what: str, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a tracker is somebody else's code; whatever it raises must not end a training
            hint = f" (pip install 'megatron-swift[{kind}]')" if isinstance(error, ImportError) else ""
            get_logger().warning("--report_to %s %s: %s%s; going on without it", kind, what, error, hint)
            (self.open or {}).pop(kind, None)
