"""The loop: what it calls, when and in which order, and when it gives up."""

from __future__ import annotations

import gc
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_swift.parallel.engine import Counts
from megatron_swift.testing import make_tiny_model
from megatron_swift.train import loop
from megatron_swift.train.loop import Actions, LoopOptions
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.precision import LossScale
from megatron_swift.train.schedule import Schedule
from megatron_swift.train.state import TrainState
from megatron_swift.train.step import StepReport
from megatron_swift.utils.errors import NonFiniteError
from megatron_swift.utils.log import get_logger
from tiny_models import SMALL, as_batch, make_engine, random_samples

SCHEDULE = Schedule(lr=10.0, min_lr=0.0, style="linear", warmup_iters=0, decay_iters=10)


class Run:
    """A loop over scripted steps: "." a good one, "x" an infinite gradient norm, "n" a loss that is nan. Keeps what happened."""

    def __init__(self, monkeypatch, outcomes: str, *, precision: str = "bfloat16", state: TrainState | None = None):
        self.events: list[tuple] = []
        self.outcomes, self.state = outcomes, state or TrainState()
        self.scale = LossScale.for_dtype(precision)
        monkeypatch.setattr(loop, "train_step", self._step)

    def _step(self, engine, optimizer, batches, *, lr, clip_grad, loss_scale, iteration):
        assert iteration == self.state.iteration  # from which dropout draws: of the steps before this one
        outcome = self.outcomes[batches[0].rows[0]]
        loss_scale.update(overflow=outcome != ".")
        self.events.append(("step", lr))
        norm, loss = (math.inf if outcome == "x" else 1.0), (math.nan if outcome == "n" else 2.0)
        return StepReport(loss, norm, Counts(1, 1, 1), loss_scale.scale, skipped=outcome != ".")

    def _log(self, iteration, samples, report, *, lr, params_norm):
        self.events.append(("log", iteration, samples, lr, params_norm))

    def _save(self, state):
        self.events.append(("save", state.iteration, state.skipped, state.optimizer_steps, dict(state.loss_scale)))

    def __call__(self, *, evaluates: bool = True, rank: int = 0, stops_at: int | None = None, **options):
        start, end = self.state.iteration, len(self.outcomes)
        values = {"train_iters": end, "global_batch_size": 4, "save_interval": 100, "eval_interval": 100} | options
        outputs = SimpleNamespace(
            step=self._log,
            evaluation=lambda it, samples, loss, *, where: self.events.append(("shown", it, samples, loss, where)),
            skip_time=lambda: self.events.append(("pause",)),
        )
        batch = as_batch(random_samples(np.random.default_rng(0), (4,), trained=1.0))
        self.stopped = loop.train(
            SimpleNamespace(shards=SimpleNamespace(params_norm=lambda: 7.0)),
            SimpleNamespace(num_steps=42),
            schedule=SCHEDULE,
            loss_scale=self.scale,
            state=self.state,
            steps=[[batch._replace(rows=(n,))] for n in range(start, end)],
            actions=Actions(
                evaluate=(lambda: self.seen("eval") or 0.5) if evaluates else None,
                save=self._save,
                stop=lambda: "SIGTERM" if self.state.iteration == stops_at else "",
            ),
            outputs=outputs if rank == 0 else None,
            options=LoopOptions(clip_grad=1.0, **values),
        )
        return self

    def seen(self, *event) -> None:
        self.events.append(event)

    def iterations_of(self, kind: str) -> list[int]:
        """After which iterations an event of this kind came."""
        found, iteration = [], self.state.iteration - sum(e[0] == "step" for e in self.events)
        for event in self.events:
            iteration += event[0] == "step"
            if event[0] == kind:
                found.append(iteration)
        return found

    @property
    def rates(self) -> list[float]:
        return [event[1] for event in self.events if event[0] == "step"]


@pytest.fixture
def log(caplog, monkeypatch):
    """The package's log, whatever other tests have done to it."""
    logger = get_logger()
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.INFO, logger=logger.name):
        logger.addHandler(caplog.handler)
        yield caplog
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("options", "evaluations", "saves"),
    [
        ({"save_interval": 100, "eval_interval": 100}, [7], [7]),
        ({"save_interval": 3, "eval_interval": 2}, [2, 4, 6, 7], [3, 6, 7]),
        ({"save_interval": 7, "eval_interval": 7}, [7], [7]),
        ({"save_interval": 1, "eval_interval": 0}, [7], [1, 2, 3, 4, 5, 6, 7]),
        ({"save_interval": 4, "eval_interval": 2, "evaluates": False}, [], [4, 7]),
    ],
)
def test_intervals_and_the_end(monkeypatch, options, evaluations, saves):
    run = Run(monkeypatch, "." * 7)(**options)
    assert run.iterations_of("eval") == evaluations and run.iterations_of("save") == saves
    assert run.iterations_of("log") == [*range(1, 8)]


def test_order_and_what_is_passed_on(monkeypatch):
    run = Run(monkeypatch, "..")(save_interval=1, eval_interval=1, log_params_norm=True)
    kept = {"scale": 1.0, "clean_steps": 0, "overflows_left": 2}
    first = [("step", 10.0), ("log", 1, 4, 9.0, 7.0), ("save", 1, 0, 42, kept)]
    assert run.events[:6] == [*first, ("eval",), ("shown", 1, 4, 0.5, "iteration 1"), ("pause",)]
    assert run.events[10] == ("shown", 2, 8, 0.5, "iteration 2 on validation set")
    assert Run(monkeypatch, ".")().events[1] == ("log", 1, 4, 9.0, None)


def test_another_rank_does_the_same_without_a_word(monkeypatch):
    run = Run(monkeypatch, "....")(rank=1, save_interval=2, eval_interval=3)
    assert run.iterations_of("eval") == [3, 4] and run.iterations_of("save") == [2, 4]
    assert {event[0] for event in run.events} == {"step", "eval", "save"}


def test_a_resumed_run_goes_on_where_it_stood(monkeypatch):
    run = Run(monkeypatch, "." * 6, state=TrainState(iteration=4, consumed_samples=16, skipped=1))(save_interval=5)
    assert run.rates == [7.0, 6.0] and run.iterations_of("save") == [5, 6]
    assert (run.state.iteration, run.state.consumed_samples, run.state.skipped) == (6, 24, 1)


def test_the_schedule_waits_for_skipped_steps(monkeypatch):
    run = Run(monkeypatch, ".xx.x.", precision="float16")(save_interval=100)
    assert run.rates == [10.0, 9.0, 9.0, 9.0, 8.0, 8.0]
    assert [e[3] for e in run.events if e[0] == "log"] == [9.0, 9.0, 9.0, 8.0, 8.0, 7.0]
    assert (run.state.skipped, run.state.consumed_samples) == (3, 24)
    kept = {"scale": 2.0**30, "clean_steps": 1, "overflows_left": -1}
    assert run.events[-4] == ("save", 6, 3, 42, kept)


@pytest.mark.parametrize(("outcome", "word"), [("x", "gradient norm"), ("n", "loss")])
def test_more_than_three_bad_steps_in_a_row_end_the_run(monkeypatch, log, outcome, word):
    run = Run(monkeypatch, "." + 3 * outcome + "." + 4 * outcome + "..")
    with pytest.raises(NonFiniteError, match=f"iteration 9: the {word} is not finite for 4 steps in a row"):
        run(save_interval=1)
    assert run.state.iteration == 9 and run.iterations_of("save") == [*range(1, 9)]
    warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert [f"rows [{n}]" in text and word in text for n, text in zip((1, 2, 3, 5, 6, 7, 8), warnings, strict=True)]


def test_fp16_overflows_are_no_failure_until_the_scale_is_one(monkeypatch, log):
    """2^32 is halved by each overflow but the first: 1 after 33 of them; only then steps count as bad."""
    run = Run(monkeypatch, "x" * 50, precision="float16")
    with pytest.raises(NonFiniteError, match="iteration 36"):
        run()
    assert [r.levelno for r in log.records] == [logging.INFO] * 32 + [logging.WARNING] * 4


@pytest.mark.parametrize("outcomes", ["nnnn", "xxnxnxxnxnx"])
def test_a_loss_that_is_not_finite_is_no_fp16_overflow(monkeypatch, log, outcomes):
    """No smaller scale mends it: the fourth such step ends the run, whatever overflows lie between."""
    run = Run(monkeypatch, outcomes + "....", precision="float16")
    with pytest.raises(
        NonFiniteError, match=f"iteration {outcomes.rindex('n') + 1}: the loss is not finite for 4 steps"
    ):
        run()
    assert sum(r.levelno == logging.WARNING for r in log.records) == 4


def test_stopped_from_outside(monkeypatch):
    """The iteration is saved, not evaluated, and nothing comes after it; at the end of training nobody is asked."""
    run = Run(monkeypatch, "." * 9)(stops_at=4, save_interval=3, eval_interval=4)
    assert run.stopped == "SIGTERM" and run.iterations_of("save") == [3, 4] and run.iterations_of("eval") == []
    assert run.state.iteration == 4
    run = Run(monkeypatch, "." * 9)(stops_at=3, save_interval=3)
    assert run.iterations_of("save") == [3]
    run = Run(monkeypatch, "." * 9)(stops_at=9)
    assert run.stopped == "" and run.iterations_of("save") == [9] and run.iterations_of("eval") == [9]


def test_manual_garbage_collection(monkeypatch):
    collected: list[int | None] = []
    monkeypatch.setattr(gc, "collect", lambda generation=None: collected.append(generation))
    Run(monkeypatch, "." * 6)(manual_gc=True, manual_gc_interval=2, evaluates=False)
    assert collected == [None] * 4 and gc.isenabled()


def test_what_is_made_until_the_first_step_is_not_looked_through_again(monkeypatch):
    """From the second step on, until the loop ends; not in short runs, nor where the program has set something apart itself, as tests' ranks."""
    for steps, there, ours in ((3, 0, True), (3, 5, False), (2, 0, False)):
        run = Run(monkeypatch, "." * steps)
        monkeypatch.setattr(loop, "WORTH_SETTING_APART", 2)
        monkeypatch.setattr(gc, "get_freeze_count", lambda there=there: there)
        for name in ("freeze", "unfreeze"):
            monkeypatch.setattr(gc, name, lambda name=name, run=run: run.events.append((name,)))
        run(evaluates=False)
        names = [event[0] for event in run.events if event[0] in ("step", "freeze", "unfreeze")]
        assert names == (["step", "freeze", "step", "step", "unfreeze"] if ours else ["step"] * steps)


def test_a_real_model_whose_weights_are_not_finite(tmp_path, log):
    """Nothing is saved, nothing is changed, and every row of the bad steps is named."""
    engine = make_engine(make_tiny_model(tmp_path, **SMALL), torch.float32)
    bad = engine.shards.by_name["decoder.final_layernorm.weight"].master
    with torch.no_grad():
        bad[0] = math.nan
    before = [shard.master.detach().clone() for shard in engine.shards]
    rng, saved = np.random.default_rng(0), []
    with pytest.raises(NonFiniteError, match="iteration 4"):
        loop.train(
            engine,
            Optimizer(engine.shards, OptimizerOptions(kind="adam", weight_decay=0.1)),
            schedule=SCHEDULE,
            loss_scale=LossScale.for_dtype("float32"),
            state=TrainState(),
            steps=[[as_batch(random_samples(rng, (9,), trained=0.5), rows=(n, 90 + n))] for n in range(9)],
            actions=Actions(evaluate=None, save=saved.append),
            outputs=None,
            options=LoopOptions(train_iters=9, global_batch_size=1, save_interval=5, eval_interval=0, clip_grad=1.0),
        )
    assert not saved and "rows [3, 93]" in log.records[-1].getMessage()
    for shard, value in zip(engine.shards, before, strict=True):
        assert torch.equal(shard.master.nan_to_num(9.0), value.nan_to_num(9.0))
