"""`megatron sft` and `megatron pt` on one rank: from a RunSetup to a trained, published model."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.dump import to_json
from megatron_swift.args.transformer_engine import attention_flag
from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
from megatron_swift.checkpoint.initial import InitialWeights
from megatron_swift.checkpoint.layout import TensorSpec, tensor_specs
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.checkpoint.snapshot import Snapshot
from megatron_swift.checkpoint.weights import TORCH_DTYPES, WeightSource
from megatron_swift.commands.engine_options import engine_options, sizes
from megatron_swift.commands.resuming import (
    NothingLeft,
    Refused,
    refusing,
    remove_unused,
    resumed_state,
    run_settings,
)
from megatron_swift.commands.run_data import open_rows
from megatron_swift.commands.saving import RunFolder, checkpoint_to_load, run_folder, saving
from megatron_swift.commands.setup import RunSetup
from megatron_swift.commands.stream_places import load_places, places_file
from megatron_swift.data.loader import Layout, Rows, StreamLoader, TrainLoader, eval_batches
from megatron_swift.data.order import Order
from megatron_swift.data.streaming import Place
from megatron_swift.parallel import mesh as meshes
from megatron_swift.parallel.engine import Engine, build_engine
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.train.loop import Actions, LoopOptions, train
from megatron_swift.train.optim import Optimizer, OptimizerOptions
from megatron_swift.train.outputs import VS_SAMPLES, OutputOptions, Outputs
from megatron_swift.train.precision import LossScale
from megatron_swift.train.schedule import Schedule
from megatron_swift.train.state import (
    TrainState,
    load_optimizer,
    load_rng,
    load_training_weights,
    load_weights,
    take_snapshot,
)
from megatron_swift.train.trackers import TrackerOptions
from megatron_swift.utils.errors import CheckpointError, Stopped, UsageError
from megatron_swift.utils.stop import SIGNALS, StopRequest, listening


@dataclasses.dataclass
class _Run:
    """The parts of a training run on this rank. places: where the lanes of streamed rows go on."""

    setup: RunSetup
    folder: RunFolder
    mesh: Mesh
    engine: Engine
    optimizer: Optimizer
    specs: dict[str, TensorSpec]
    loss_scale: LossScale
    state: TrainState
    places: dict[int, Place]


def run(setup: RunSetup, *, started: float | None = None) -> None:
    """Train. started: when the user's command began (time.time), to say how long the start took."""
    args = setup.args
    mesh = meshes.start(
        backend=args.distributed_backend, timeout_minutes=args.distributed_timeout_minutes, sizes=sizes(setup)
    )
    try:
        _seed(args)
        with run_folder(setup) as folder, listening() as request:
            _train(setup, folder, mesh, request, started)
    except (NothingLeft, Refused) as reason:
        remove_unused(setup, folder.path, folder.group)  # not before it is closed
        if reason.__cause__ is not None:
            raise reason.__cause__ from None
        if mesh.rank == 0:
            print(reason, flush=True)
    finally:
        meshes.stop()


def _train(setup: RunSetup, folder: RunFolder, mesh: Mesh, request: StopRequest, started: float | None) -> None:
    marks = [("processes", time.time())]
    parts = _build(setup, folder, mesh)
    marks.append(("model and weights", time.time()))
    rows, val_rows = open_rows(setup.data, setup.stream, setup.lazy, setup.val_data)
    steps = _train_batches(parts, rows)
    outputs = _outputs(setup, folder.path, mesh) if mesh.rank == 0 else None
    if mesh.rank == 0:
        _say_start(parts, started, marks)
    with saving(setup, folder, parts.specs) as saver:
        stop = train(
            parts.engine,
            parts.optimizer,
            schedule=_schedule(setup),
            loss_scale=parts.loss_scale,
            state=parts.state,
            steps=steps,
            actions=Actions(
                evaluate=_evaluation(setup, parts, val_rows),
                save=lambda state: saver.save(_snapshot(parts, state, steps), state.iteration),
                stop=lambda: _agreed(request, mesh),
            ),
            outputs=outputs,
            options=_loop_options(setup),
        )
    if outputs is not None:
        outputs.close()
        print(f"{'stopped' if stop else 'done'}: {folder.path}", flush=True)
    if stop:
        folder.group.gather(None)  # torchrun ends all ranks once one has gone
        raise Stopped(
            f"{stop} at iteration {parts.state.iteration}, which is saved in {folder.path}",
            do=f"go on with the same command and --load {folder.path} (or --load auto, which stays right)",
        )


def _agreed(request: StopRequest, mesh: Mesh) -> str:
    """Which signal any rank was sent; "" none."""
    asked = mesh.sum([float(request.asked == number.name) for number in SIGNALS])
    return next((number.name for number, count in zip(SIGNALS, asked, strict=True) if count), "")


def _seed(args: TrainArguments) -> None:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)


def _build(setup: RunSetup, folder: RunFolder, mesh: Mesh) -> _Run:
    """Model, weights, optimizer and, when resuming, all of the state."""
    args, cfg = setup.args, setup.model
    options = engine_options(setup)
    try:
        engine = build_engine(cfg, mesh, options)
    except ValueError as error:
        raise UsageError(
            f"{attention_flag(args)} cannot be used here: {error}",
            do="leave it out: the fastest kernel that fits is taken",
        ) from None
    specs = tensor_specs(cfg)
    decay = OptimizerOptions(
        kind=args.optimizer,
        weight_decay=args.weight_decay,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        eps=args.adam_eps,
        momentum=args.sgd_momentum,
    )
    loss_scale, state = LossScale.for_dtype(setup.dtype), TrainState()
    places: dict[int, Place] = {}
    _agree_on_start(setup, folder)
    if setup.load is None:
        load_weights(engine.shards, specs, _first_weights(setup))
        optimizer = Optimizer(engine.shards, decay)
    else:
        checkpoint = checkpoint_to_load(setup.load, folder, older=setup.older or ())
        if not args.finetune:  # before the tensors are looked at: it says more than that their shapes differ
            with refusing():
                state = resumed_state(setup, checkpoint, ranks=mesh.world_size, speaks=mesh.rank == 0)
            if setup.stream is not None and state.data == setup.data.name:
                places = load_places(checkpoint, lanes=setup.stream.lanes)
        source = MegatronWeights(checkpoint, specs, num_layers=cfg.num_layers)
        load_training_weights(engine.shards, specs, source)
        optimizer = Optimizer(engine.shards, decay)
        if not args.finetune:
            if not args.no_load_optim:
                load_optimizer(optimizer, specs, source, state)
                loss_scale.restore(state.loss_scale)
            if not args.no_load_rng:
                folder.group.together(checkpoint, lambda: load_rng(checkpoint, mesh))
    state.data, state.settings = setup.data.name, run_settings(setup, ranks=mesh.world_size)
    return _Run(setup, folder, mesh, engine, optimizer, specs, loss_scale, state, places)


def _first_weights(setup: RunSetup) -> WeightSource:
    """What a run without a checkpoint starts from."""
    args, cfg = setup.args, setup.model
    if setup.scratch:
        return InitialWeights(num_layers=cfg.num_layers, seed=args.seed, std=args.init_method_std)
    return HuggingFaceWeights(setup.model_dir, cfg)


def _agree_on_start(setup: RunSetup, folder: RunFolder) -> None:
    """--load auto looks on each machine's own disk; all must have found a checkpoint, or none."""
    found = [load is not None for load in folder.group.gather(setup.load)]
    if any(found) and not all(found):
        raise CheckpointError(
            f"ranks {[rank for rank, here in enumerate(found) if not here]} see no checkpoint to start from, the others do",
            why="--save lies on several disks",
            do="copy the checkpoints to every machine, as docs/checkpoints.md says",
        )


def _train_batches(parts: _Run, rows: Rows | None) -> TrainLoader | StreamLoader:
    setup, mesh, state = parts.setup, parts.mesh, parts.state
    args = setup.args
    if rows is None:
        assert setup.stream is not None
        layout = Layout(
            mesh.dp_rank,
            mesh.dp_size,
            args.micro_batch_size,
            args.global_batch_size,
            parts.engine.row_multiple,
            setup.pad_id,
            parts.engine.segment_multiple,
        )
        return StreamLoader(
            setup.stream,
            layout,
            places=parts.places,
            num_steps=setup.train_iters - state.iteration,
            num_workers=args.num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    order = Order(len(rows), seed=args.seed, shuffle=args.dataloader_type == "cyclic")
    return TrainLoader(
        rows,
        order,
        first_step=state.consumed_samples // args.global_batch_size,
        num_steps=setup.train_iters - state.iteration,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        num_workers=args.num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        pad_to_multiple=parts.engine.row_multiple,
        segment_multiple=parts.engine.segment_multiple,
        pad_id=setup.pad_id,
    )


def _evaluation(setup: RunSetup, parts: _Run, rows: Rows | None) -> Callable[[], float] | None:
    args, mesh = setup.args, parts.mesh
    if rows is None or args.eval_iters == 0:
        return None

    def evaluate() -> float:
        loss = tokens = 0.0
        batches = eval_batches(
            rows,
            num_batches=args.eval_iters,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            pad_to_multiple=parts.engine.row_multiple,
            segment_multiple=parts.engine.segment_multiple,
            pad_id=setup.pad_id,
        )
        for batch in batches:
            part, count = parts.engine.evaluate(batch)
            loss, tokens = loss + part, tokens + count
        return loss / max(tokens, 1)

    return evaluate


def _schedule(setup: RunSetup) -> Schedule:
    args = setup.args
    return Schedule(
        args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters, args.lr_decay_iters or setup.train_iters
    )


def _loop_options(setup: RunSetup) -> LoopOptions:
    args = setup.args
    return LoopOptions(
        train_iters=setup.train_iters,
        global_batch_size=args.global_batch_size,
        save_interval=args.save_interval,
        eval_interval=args.eval_interval or args.save_interval,
        clip_grad=args.clip_grad,
        log_params_norm=args.log_params_norm,
        manual_gc=args.manual_gc,
        manual_gc_interval=args.manual_gc_interval,
    )


def _outputs(setup: RunSetup, run_dir: Path, mesh: Mesh) -> Outputs:
    args = setup.args
    kinds = tuple(k for k in args.report_to if k != "none")
    name = str(run_dir)
    trackers = TrackerOptions(
        kinds=kinds,
        folder=Path(args.tensorboard_dir).absolute() if args.tensorboard_dir else run_dir / "runs",
        queue_size=args.tensorboard_queue_size,
        vs_samples=VS_SAMPLES,
        projects={"wandb": args.wandb_project or "megatron-swift", "swanlab": args.swanlab_project or "megatron-swift"},
        names={"wandb": args.wandb_exp_name or name, "swanlab": args.swanlab_exp_name or name},
        config=to_json(args),
    )
    options = OutputOptions(
        run_dir=run_dir,
        train_iters=setup.train_iters,
        global_batch_size=args.global_batch_size,
        world_size=mesh.world_size,
        trackers=trackers,
        log_interval=args.log_interval,
        tracker_interval=args.tensorboard_log_interval,
        throughput=args.log_throughput,
        learning_rate=not args.no_log_learning_rate_to_tensorboard,
        validation_ppl=args.log_validation_ppl_to_tensorboard,
        memory=args.log_memory_to_tensorboard,
        timers=args.log_timers_to_tensorboard,
    )
    return Outputs(options, setup.model)


def _say_start(parts: _Run, started: float | None, marks: list[tuple[str, float]]) -> None:
    mesh, kernels = parts.mesh, parts.engine.kernels
    print(
        f"{'device':14s} {mesh.device.type} x {mesh.world_size}, backend {mesh.backend if mesh.world_size > 1 else 'none'}"
    )
    for name, reason in kernels.items():
        print(f"{name:14s} {reason}")
    print(f"{'optimizer':14s} {parts.optimizer.kernel}")
    if parts.state.iteration:
        print(f"{'resumed':14s} at iteration {parts.state.iteration}, {parts.state.consumed_samples} samples consumed")
    if started is not None:
        times, before = [], started
        for step, at in [*marks, ("data loader", time.time())]:
            times.append(f"{step} {at - before:.1f} s")
            before = at
        print(f"{'start':14s} {before - started:.1f} s since the command: {', '.join(times)}", flush=True)


def _snapshot(parts: _Run, state: TrainState, steps: TrainLoader | StreamLoader) -> Snapshot:
    setup, args = parts.setup, parts.setup.args
    snapshot = take_snapshot(
        mesh=parts.mesh,
        shards=parts.engine.shards,
        specs=parts.specs,
        cfg=setup.model,
        dtype=TORCH_DTYPES[setup.dtype],
        state=state,
        optimizer=None if args.no_save_optim else parts.optimizer,
        save_rng=not args.no_save_rng,
    )
    if isinstance(steps, StreamLoader) and parts.mesh.speaks_for_batch:
        name, content = places_file(parts.mesh.dp_rank, steps.places)
        snapshot = dataclasses.replace(snapshot, files={**snapshot.files, name: content})
    return snapshot
