"""Training state to and from checkpoints: weights, optimizer, loss scale, random numbers and the position in the data."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_swift.checkpoint.dcp import Piece, pieces_of
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.checkpoint.megatron_common import COMMON, common_file, common_values, extra_states
from megatron_swift.checkpoint.megatron_state import check_importable, megatron_state
from megatron_swift.checkpoint.megatron_weights import MASTER, MegatronWeights
from megatron_swift.checkpoint.snapshot import Snapshot
from megatron_swift.checkpoint.weights import WeightSource
from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.parallel.shards import Box, Shard, Shards
from megatron_swift.train.optim import Optimizer
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.log import get_logger

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """Where a run stands. skipped: steps whose update was left out. data: the fingerprint of the training rows."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    optimizer_steps: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def load_weights(shards: Shards, specs: dict[str, TensorSpec], source: WeightSource) -> None:
    """Fill every local shard from a folder of weights; each rank reads only its own part. Rows of padding are left alone."""
    with torch.no_grad():
        for shard in shards:
            for box in shard.boxes:
                values = source.read(specs[shard.name], *_rows(box), columns=box.columns)
                shard.master[box.local : box.local + box.rows].copy_(values)
    shards.push()


def _rows(box: Box) -> tuple[int, int]:
    return box.start, box.start + box.rows


def pieces(
    shards: Shards, specs: dict[str, TensorSpec], *, num_layers: int, dtype: torch.dtype, optimizer: Optimizer | None
) -> list[Piece]:
    """What this rank writes: weights in `dtype` and, with an optimizer, its state and the masters where they say more than the weights."""
    found = []
    for shard in shards:
        spec = specs[shard.name]
        kinds = [(shard.master.detach(), "", dtype)]
        if optimizer is not None:
            if shard.master.dtype != dtype:
                kinds.append((shard.master.detach(), MASTER, shard.master.dtype))
            kinds += [(optimizer.state(shard, n), f"optimizer.state.{n}.", shard.master.dtype) for n in optimizer.names]
        for box in shard.boxes:
            if box.owned:
                for tensor, prefix, stored in kinds:
                    rows = tensor[box.local : box.local + box.rows]
                    found += pieces_of(
                        spec, rows, box.start, num_layers=num_layers, columns=box.columns, dtype=stored, prefix=prefix
                    )
    return found


def take_snapshot(
    *,
    mesh: Mesh,
    shards: Shards,
    specs: dict[str, TensorSpec],
    cfg: ModelConfig,
    dtype: torch.dtype,
    state: TrainState,
    optimizer: Optimizer | None,
    save_rng: bool,
) -> Snapshot:
    """This rank's part of a checkpoint: tensors by reference, the rest as it is now. dtype: of the weights.

    optimizer None leaves its state out.
    """
    files: dict[str, bytes] = {}
    objects: dict[str, bytes] = {}
    content = None
    if save_rng:
        files[_rng_file(mesh.rank)] = json.dumps(_rng_state()).encode()
    if mesh.rank == 0:
        value = asdict(state) | {"optimizer": optimizer.options.kind if optimizer else None}
        files[STATE_FILE] = json.dumps(value, indent=1).encode()
        files[COMMON] = common_file(cfg, iteration=state.iteration, consumed_samples=state.consumed_samples)
        objects = extra_states(cfg)
        content = common_values(
            cfg, iteration=state.iteration, consumed_samples=state.consumed_samples, parallel_size=1
        )
    mine = pieces(shards, specs, num_layers=cfg.num_layers, dtype=dtype, optimizer=optimizer)
    return Snapshot(mine, files, objects, content)


def read_state(folder: Path) -> TrainState:
    """The position of a checkpoint, Megatron's own among them. Raises CheckpointError when there is none (a converted checkpoint)."""
    path = folder / STATE_FILE
    if not path.is_file():
        megatron = megatron_state(folder)
        if megatron is not None:
            return TrainState(megatron.iteration, megatron.consumed_samples, optimizer_steps=megatron.optimizer_steps)
        raise CheckpointError(
            f"{folder} holds weights only, no training state",
            why="it was converted, or written by another program",
            do="give --finetune true to start a new training from its weights",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kind = value.pop("optimizer")
        state = TrainState(**value)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", do="use another checkpoint") from None
    state.settings["optimizer"] = kind
    return state


def load_training_weights(shards: Shards, specs: dict[str, TensorSpec], source: MegatronWeights) -> None:
    """Like `load_weights`, from the float32 masters of a checkpoint where it has them."""
    prefix = MASTER if source.has(MASTER) else ""
    for shard in shards:
        _load(shard.master, shard, specs[shard.name], source, prefix)
    shards.push()


def _load(tensor: Tensor, shard: Shard, spec: TensorSpec, source: MegatronWeights, prefix: str) -> None:
    """Fill a tensor of a shard's shape from the checkpoint's tensor of the parameter's key behind `prefix`."""
    with torch.no_grad():
        for box in shard.boxes:
            rows = tensor[box.local : box.local + box.rows]
            source.read_into(rows, spec, box.start, columns=box.columns, prefix=prefix)


def load_optimizer(
    optimizer: Optimizer, specs: dict[str, TensorSpec], source: MegatronWeights, state: TrainState
) -> None:
    """Fill the optimizer's state. Raises CheckpointError when the checkpoint has none, or another optimizer's."""
    kind = state.settings.get("optimizer") or _megatrons(optimizer, source)
    if kind != optimizer.options.kind:
        found = f"the state of optimizer {kind}" if kind else "no optimizer state"
        raise CheckpointError(
            f"{source.files.folder} holds {found}, not of {optimizer.options.kind}",
            do="give --no_load_optim true to start with a new one, or --finetune true to start a new training",
        )
    _check_dtypes(optimizer, specs, source)
    for shard in optimizer.shards:
        for name in optimizer.names:
            _load(optimizer.state(shard, name), shard, specs[shard.name], source, f"optimizer.state.{name}.")
    optimizer.set_num_steps(state.optimizer_steps)


def _megatrons(optimizer: Optimizer, source: MegatronWeights) -> str | None:
    """This optimizer's kind, where the checkpoint is Megatron's own and holds the state for it."""
    folder = source.files.folder
    found = None if (folder / STATE_FILE).is_file() else megatron_state(folder)
    if found is None:
        return None
    check_importable(folder, found)
    whole = all(source.has(f"optimizer.state.{name}.") for name in optimizer.names)
    return optimizer.options.kind if whole else None


def _check_dtypes(optimizer: Optimizer, specs: dict[str, TensorSpec], source: MegatronWeights) -> None:
    """State of another precision would be cast in silence, and training would go on from other numbers."""
    stored = source.files.tensors
    weights = [source.key(spec) for spec in specs.values()]
    ((usual, _),) = Counter(stored[key].dtype for key in weights).most_common(1)
    odd = [key for key in weights if stored[key].dtype != usual]
    for shard in optimizer.shards:
        prefixes = [*(f"optimizer.state.{name}." for name in optimizer.names), MASTER]
        keys = [source.key(specs[shard.name], prefix) for prefix in prefixes]
        odd += [key for key in keys if key in stored and stored[key].dtype != shard.master.dtype]
    if odd:
        raise CheckpointError(
            f"{source.files.folder}: {odd[0]} is stored as {str(stored[odd[0]].dtype).removeprefix('torch.')}, unlike the rest",
            why=f"so are {len(odd) - 1} more" if len(odd) > 1 else "",
            do="use another checkpoint, or give --finetune true to start a new training from its weights",
        )


def _rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.json"


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, cached = state
    value = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        value["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return value


def load_rng(folder: Path, mesh: Mesh) -> None:
    """Restore this rank's random number generators. Raises CheckpointError where the checkpoint has none, unless it is Megatron's.

    A rank beyond those that wrote it takes the state of rank modulo their number, as all ranks begin from one seed.
    """
    saved = len(list(folder.glob("rng_*.json")))
    if not saved and not (folder / STATE_FILE).is_file():
        if mesh.rank == 0:
            get_logger().warning("%s is Megatron's own: its random states are not taken over", folder)
        return
    if not saved:
        raise CheckpointError(f"{folder} holds no random state", do="give --no_load_rng true")
    path = folder / _rng_file(mesh.rank % saved)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version, internal, gauss = value["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = value["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_tensor(value["torch"]))
        if torch.cuda.is_available() and "cuda" in value:
            torch.cuda.set_rng_state(_tensor(value["cuda"]))
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", do="use another checkpoint") from None


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
