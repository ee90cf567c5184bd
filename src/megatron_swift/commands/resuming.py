"""Going on from a checkpoint: what differs from its run is shown as a table, and refused where training would go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_swift.args.resume_rules import changes, other_data, refusal, settings_of, table
from megatron_swift.checkpoint.publish import TRACKER
from megatron_swift.checkpoint.ranks import Group
from megatron_swift.commands.setup import RunSetup
from megatron_swift.train.state import TrainState, read_state
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError
from megatron_swift.utils.log import get_logger


class NothingLeft(Exception):
    """The run that --load auto has found is trained to its end; str() says so. No error: a scheduler may start a job once too often."""


class Refused(Exception):
    """This command may not go on with the checkpoint it has found, for the error that is its cause. Nothing has been trained."""


def run_settings(setup: RunSetup, *, ranks: int) -> dict[str, Any]:
    """What this run records in its checkpoints."""
    model = dataclasses.asdict(setup.model)
    model.pop("dtype")  # of the weights it once began with; the run's own is recorded
    return settings_of(
        setup.args,
        template=setup.template,
        dtype=setup.dtype,
        train_iters=setup.train_iters,
        ranks=ranks,
        model=model,
    )


def resumed_state(setup: RunSetup, folder: Path, *, ranks: int, speaks: bool) -> TrainState:
    """The state to go on from. Raises the SwiftError of what must not go on, or NothingLeft, the same on all ranks.

    speaks : whether this rank logs the table of what differs.
    """
    args = setup.args
    try:
        state = read_state(folder)
    except CheckpointError as error:
        # A converted checkpoint has no state: then both kinds of it must have been declined.
        if args.no_load_optim and args.no_load_rng and "weights only" in error.what:
            return TrainState()
        raise
    if not state.iteration:
        return state
    found = changes(state.settings, run_settings(setup, ranks=ranks), data=(state.data, setup.data.name))
    if found and speaks:
        get_logger().warning("resuming %s, this command differs from its run:\n%s", folder, table(found))
    refused = refusal(found, folder=folder, reset_data=args.reset_data)
    if refused is not None:
        raise refused
    if other_data(found):
        if speaks:
            get_logger().warning("--reset_data: going on with the first row of the new data")
        state.consumed_samples = 0
    _check_position(setup, state, folder)
    return state


def _check_position(setup: RunSetup, state: TrainState, folder: Path) -> None:
    size = setup.args.global_batch_size
    if setup.older is not None and state.iteration >= setup.train_iters:
        raise NothingLeft(
            f"nothing left to train: {folder} stands at iteration {state.iteration}, --train_iters is {setup.train_iters}"
        )
    if state.consumed_samples % size:
        raise UsageError(
            f"--global_batch_size {size} does not divide the {state.consumed_samples} samples consumed so far",
            do=f"resume with the checkpoint's --global_batch_size {state.settings.get('global_batch_size')}",
        )
    if state.iteration >= setup.train_iters:
        raise UsageError(
            f"the checkpoint stands at iteration {state.iteration} already, --train_iters is {setup.train_iters}",
            do="raise --train_iters, or give --finetune true to start anew from its weights",
        )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What is raised inside is Refused, if it means that this command may not go on. Every rank is refused the same."""
    try:
        yield
    except (UsageError, DataError) as error:
        raise Refused from error


def remove_unused(setup: RunSetup, run: Path, group: Group) -> None:
    """Take away the v<N> folder that this command has made, if it holds no checkpoint. Every rank calls it, once none uses it any more."""
    group.gather(None)
    made = setup.args.add_version  # else it is the user's own folder
    if made and group.leads and not (run / TRACKER).exists() and not any(run.glob("iter_*")):
        shutil.rmtree(run)
