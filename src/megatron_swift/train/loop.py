"""The loop: train -> log -> evaluate -> save, in that order, iteration by iteration."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_swift.data.types import Batch
from megatron_swift.parallel.engine import Engine
from megatron_swift.train.optim import Optimizer
from megatron_swift.train.outputs import Outputs
from megatron_swift.train.precision import LossScale
from megatron_swift.train.schedule import Schedule
from megatron_swift.train.state import TrainState
from megatron_swift.train.step import StepReport, train_step
from megatron_swift.utils.errors import NonFiniteError
from megatron_swift.utils.log import get_logger

WORTH_SETTING_APART = 20  # steps to come: fewer are over before Python looks through all its objects
MAX_BAD_STEPS = 3  # steps in a row whose gradient may be non-finite before the run stops


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Counts are iterations. eval_interval 0: no evaluation during training."""

    train_iters: int
    global_batch_size: int
    save_interval: int
    eval_interval: int
    clip_grad: float
    log_params_norm: bool = False
    manual_gc: bool = False
    manual_gc_interval: int = 0


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What the loop calls at its intervals. evaluate: the validation loss, None without validation data. save: publish a checkpoint.

    stop : after each iteration, who asks for an end of training, on all ranks alike; "" nobody.
    """

    evaluate: Callable[[], float] | None
    save: Callable[[TrainState], None]
    stop: Callable[[], str] = str


def train(
    engine: Engine,
    optimizer: Optimizer,
    *,
    schedule: Schedule,
    loss_scale: LossScale,
    state: TrainState,
    steps: Iterable[Sequence[Batch]],
    actions: Actions,
    outputs: Outputs | None,
    options: LoopOptions,
) -> str:
    """Train until options.train_iters, from where `state` stands, which is kept up to date. Returns who stopped it before, else "".

    steps   : this rank's micro-batches, one list per iteration.
    outputs : on rank 0, None elsewhere.
    Raises NonFiniteError when the gradient is not finite for more than MAX_BAD_STEPS steps in a row.
    """
    bad, stop = 0, ""
    many = options.train_iters - state.iteration > WORTH_SETTING_APART
    with _garbage(manual=options.manual_gc, set_apart=many) as after_step:
        for batches in steps:
            lr = schedule.at(state.iteration - state.skipped)
            report = train_step(
                engine,
                optimizer,
                batches,
                lr=lr,
                clip_grad=options.clip_grad,
                loss_scale=loss_scale,
                iteration=state.iteration,
            )
            after_step()
            state.iteration += 1
            state.consumed_samples += options.global_batch_size
            state.skipped += report.skipped
            bad = _check(report, bad, state.iteration, batches, loss_scale)
            params_norm = engine.shards.params_norm() if options.log_params_norm else None
            if outputs is not None:
                after = schedule.at(state.iteration - state.skipped)
                outputs.step(state.iteration, state.consumed_samples, report, lr=after, params_norm=params_norm)
            last = state.iteration == options.train_iters
            stop = "" if last else actions.stop()
            _at_intervals(optimizer, loss_scale, state, actions, outputs, options, stop=bool(stop))
            if stop:
                break
    return stop


@contextmanager
def _garbage(*, manual: bool, set_apart: bool) -> Iterator[Callable[[], None]]:
    """How Python collects garbage meanwhile. What it gives is to be called after each step.

    set_apart : all that is there after the first step stays to the end, and to look through it takes tenths of a second, in which nothing is
    launched. So the collector is told to leave it alone, unless the program has done that with something already.
    """
    if manual:
        gc.disable()
        gc.collect()
    ours = waiting = set_apart and not gc.get_freeze_count()

    def after_step() -> None:
        nonlocal waiting
        if waiting:
            gc.collect()
            gc.freeze()
        waiting = False

    try:
        yield after_step
    finally:
        if ours:
            gc.unfreeze()
        if manual:
            gc.enable()


def _check(report: StepReport, bad: int, iteration: int, batches: Sequence[Batch], loss_scale: LossScale) -> int:
    """Count steps in a row that were left out; say which rows they held, and stop when there are too many."""
    if not report.skipped:
        return 0
    # Only gradients overflow by the scale: a loss that is not finite is none of its doing, and no smaller scale would mend it.
    if loss_scale.dynamic and loss_scale.scale > 1 and math.isfinite(report.loss):
        get_logger().info("iteration %d: fp16 overflow, step left out, loss scale now %g", iteration, loss_scale.scale)
        return bad
    rows = [row for batch in batches for row in batch.rows]
    reason = "loss" if not math.isfinite(report.loss) else "gradient norm"
    get_logger().warning(
        "iteration %d: the %s is not finite; the step is left out (rows %s of the training data)",
        iteration,
        reason,
        rows[:20],
    )
    if bad + 1 > MAX_BAD_STEPS:
        raise NonFiniteError(
            f"iteration {iteration}: the {reason} is not finite for {bad + 1} steps in a row",
            why="the parameters were not changed by these steps; the last checkpoint is good",
            do="lower --lr, add --lr_warmup_iters, or look at the rows named above",
        )
    return bad + 1


def _at_intervals(
    optimizer: Optimizer,
    loss_scale: LossScale,
    state: TrainState,
    actions: Actions,
    outputs: Outputs | None,
    options: LoopOptions,
    *,
    stop: bool,
) -> None:
    iteration = state.iteration
    last = iteration == options.train_iters
    if options.manual_gc and options.manual_gc_interval and iteration % options.manual_gc_interval == 0:
        gc.collect()
    if last or stop or iteration % options.save_interval == 0:
        state.optimizer_steps = optimizer.num_steps
        state.loss_scale = loss_scale.as_json()
        actions.save(state)  # before the evaluation, which may fail
    evaluate = actions.evaluate
    due = options.eval_interval > 0 and iteration % options.eval_interval == 0
    if evaluate is not None and (due or last) and not stop:  # whoever stops us may not have the patience
        if options.manual_gc:
            gc.collect()
        loss = evaluate()
        if outputs is not None:
            where = f"iteration {iteration}" if not last else f"iteration {iteration} on validation set"
            outputs.evaluation(iteration, state.consumed_samples, loss, where=where)
        if options.manual_gc:
            gc.collect(generation=0)
    if outputs is not None:
        outputs.skip_time()
