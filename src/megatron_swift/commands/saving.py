"""When and how a training run saves and what it starts from: in front of the training loop or beside it, on one disk or several."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.dump import to_json
from megatron_swift.checkpoint.background import Background
from megatron_swift.checkpoint.companions import FOLDER
from megatron_swift.checkpoint.huggingface import write_hugging_face
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.checkpoint.megatron_weights import MegatronWeights
from megatron_swift.checkpoint.publish import candidates, clean_leftovers, keep_last, publish, writing
from megatron_swift.checkpoint.ranks import Group, all_ranks, with_disks
from megatron_swift.checkpoint.snapshot import TORCH_DIST, Buffers, Snapshot
from megatron_swift.checkpoint.verify import first_whole
from megatron_swift.commands.setup import RunSetup
from megatron_swift.utils.errors import CheckpointError, SwiftError, UsageError
from megatron_swift.utils.files import write_json
from megatron_swift.utils.log import get_logger

HF_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class RunFolder:
    """The run's folder on this rank's disk, and the ranks that publish into it."""

    path: Path
    group: Group


@contextlib.contextmanager
def run_folder(setup: RunSetup) -> Iterator[RunFolder]:
    """The run's folder, found on every rank's disk and held against other runs while it is open. Every rank calls it."""
    args = setup.args
    group = all_ranks(timeout_minutes=args.distributed_timeout_minutes)
    first = next(d for d in group.gather(setup.run_dir) if d is not None)
    path = setup.run_dir or _on_this_node(args, first)
    group = with_disks(group, path)
    if not group.one_disk:
        disks = sorted(set(group.gather(group.peers)))
        if args.save_safetensors:
            raise UsageError(
                f"--save_safetensors needs a --save folder that all ranks see, but {path} lies on {len(disks)} disks",
                do="give a folder on a shared disk, or convert the merged checkpoint with `swift export --to_hf true`",
            )
        if args.ckpt_format != TORCH_DIST:
            raise UsageError(
                f"--ckpt_format {args.ckpt_format} makes one file, but --save {path} lies on {len(disks)} disks",
                do="give a folder on a shared disk, or use --ckpt_format torch_dist",
            )
        if group.rank == 0:
            get_logger().warning(
                "--save is no shared disk: ranks %s each write to one of their own. Before a checkpoint is loaded, its "
                "iter_* folders of all nodes must be copied into one (file names differ), on every node",
                " and ".join(str(list(disk)) for disk in disks),
            )
    with contextlib.ExitStack() as stack:
        group.together(path, lambda: stack.enter_context(writing(path)) if group.leads else None)
        yield RunFolder(path, group)


def _on_this_node(args: TrainArguments, first: Path) -> Path:
    """Where a node other than the first one writes: below its own --save, under the name that the first one chose."""
    if args.save is None:
        return first
    own = Path(args.save).expanduser().absolute()
    return own / first.name if args.add_version else own


def checkpoint_to_load(run: Path, folder: RunFolder, *, older: Sequence[Path] = ()) -> Path:
    """The checkpoint of a run to start from: the newest that is whole. Every rank calls it, and gets it on its own disk.

    older : runs to fall back to. What a killed run has left half-done in any of them is removed.
    """
    group, runs = folder.group, (run, *older)
    here = [os.path.relpath(found, run) for place in runs for found in candidates(place)] if group.rank == 0 else []
    names = group.gather(here)[0]
    if not names:
        raise CheckpointError(f"--load {run} holds no checkpoint", do="give a folder that holds iter_* folders")
    for place in runs if group.leads else ():
        if not (folder.path.exists() and place.exists() and place.samefile(folder.path)):
            clean_leftovers(place)
    return first_whole([Path(os.path.normpath(run / name)) for name in names], group)


@dataclass
class Saver:
    """Publishes the run's checkpoints; with --async_save beside the training, one at a time."""

    setup: RunSetup
    folder: RunFolder
    specs: dict[str, TensorSpec]
    _background: Background = field(default_factory=Background)
    _buffers: Buffers = field(default_factory=dict)

    def save(self, snapshot: Snapshot, iteration: int) -> None:
        """Publish, or begin to: the snapshot's tensors may change once this returns."""
        began = time.time()
        snapshot = replace(snapshot, file_format=self.setup.args.ckpt_format)
        failed = self._background.join()
        if not self.setup.args.async_save or failed is not None:
            # After a failure in the foreground, where a second one ends the run.
            self._publish(snapshot, iteration, began, stood=None)
            return
        waited = time.time() - began
        copy = snapshot.copied(self._buffers)
        stood = time.time() - began
        self._background.start(lambda: self._beside(copy, iteration, began, stood, waited))

    def wait(self) -> BaseException | None:
        """Wait for what is being written; what that raised, for it is the run's last checkpoint."""
        return self._background.join()

    def _beside(self, snapshot: Snapshot, iteration: int, began: float, stood: float, waited: float) -> None:
        said = f"training stood still for {stood:.2f} s" + (
            f", {waited:.2f} s of it for the checkpoint before" if waited > 0.01 else ""
        )
        try:
            self._publish(snapshot, iteration, began, stood=said)
        except BaseException as error:
            if self.folder.group.rank == 0:
                text = error.block() if isinstance(error, SwiftError) else repr(error)
                get_logger().error("SAVING ITERATION %d IN THE BACKGROUND FAILED, it is lost: %s", iteration, text)
            raise

    def _publish(self, snapshot: Snapshot, iteration: int, began: float, *, stood: str | None) -> None:
        args, group, run = self.setup.args, self.folder.group, self.folder.path
        done = publish(
            run, iteration, lambda staging: snapshot.write(staging, group), group=group, finish=self._hugging_face
        )
        if group.rank == 0:
            seconds = f"{time.time() - began:.1f} s"
            if done.kept:
                print(f"kept {done.folder}, which was saved before and is whole", flush=True)
            else:
                print(f"saved {done.folder} in {seconds}" + (f"; {stood}" if stood else ""), flush=True)
        limit = args.save_total_limit
        group.together(run, lambda: keep_last(run, limit) if group.leads and limit is not None else None)

    def _hugging_face(self, staging: Path) -> None:
        """With --save_safetensors, a Hugging Face folder in the checkpoint."""
        setup, args = self.setup, self.setup.args
        if not args.save_safetensors:
            return
        source = MegatronWeights(staging, self.specs, num_layers=setup.model.num_layers)
        out = staging / "hf"
        out.mkdir()
        write_hugging_face(
            source,
            setup.model,
            out,
            like=self.folder.path / FOLDER,
            dtype=setup.dtype,
            max_shard_size=HF_SHARD_BYTES,
        )
        write_json(out / "args.json", to_json(args) | {"template": setup.template, "torch_dtype": setup.dtype})


@contextlib.contextmanager
def saving(setup: RunSetup, folder: RunFolder, specs: dict[str, TensorSpec]) -> Iterator[Saver]:
    """A Saver; whatever happens inside, what it is still writing is written to the end, and the failure of that is raised."""
    saver = Saver(setup, folder, specs)
    try:
        yield saver
    except BaseException:
        saver.wait()  # a failure of its own has been logged
        raise
    failed = saver.wait()
    if failed is not None:
        raise failed
