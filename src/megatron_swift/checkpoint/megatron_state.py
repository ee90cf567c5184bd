"""Where a training run of Megatron's own stood, and whether its optimizer's state can be gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_swift.checkpoint.archive import attributes, read_archive
from megatron_swift.checkpoint.megatron_common import COMMON
from megatron_swift.utils.errors import CheckpointError

_OPTIMIZER = "optimizer"
_LAYOUT = "param_state_sharding_type"
# Tensors in the shapes of the parameters, or cut along them. The others are flat buffers of one parallel layout.
_IMPORTED = ("fully_sharded_model_space", "fully_reshardable", None)


@dataclass(frozen=True)
class MegatronState:
    """optimizer_steps: updates made. layout: Megatron's name for how the optimizer's state is stored, None for the plain one."""

    iteration: int
    consumed_samples: int
    optimizer_steps: int
    layout: str | None


def megatron_state(folder: Path) -> MegatronState | None:
    """What `common.pt` says of a checkpoint with an optimizer; None where there is no such file or no optimizer.

    Raises CheckpointError where it is damaged.
    """
    path = folder / COMMON
    if not path.is_file():
        return None
    common = read_archive(path)
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} is no common.pt of Megatron's", do="use another checkpoint")
    if not common.get(_OPTIMIZER):
        return None
    found = dict(_entries(common[_OPTIMIZER]))
    return MegatronState(
        iteration=_number(common.get("iteration")),
        consumed_samples=_number(attributes(common.get("args")).get("consumed_train_samples")),
        optimizer_steps=_number(found.get("step", found.get("common_step"))),
        layout=found.get(_LAYOUT),
    )


def check_importable(folder: Path, state: MegatronState) -> None:
    """Raise CheckpointError where the optimizer's state lies in a layout that belongs to one parallel layout."""
    if state.layout not in _IMPORTED:
        raise CheckpointError(
            f"{folder} holds an optimizer state in Megatron's layout {state.layout}, which cannot be imported",
            why="it consists of flat buffers that fit the parallel layout of the run that wrote them",
            do="give --no_load_optim true to go on with a new optimizer, or save it in Megatron with "
            "--dist-ckpt-optim-fully-reshardable",
        )
    if not state.optimizer_steps:
        raise CheckpointError(
            f"{folder / COMMON} does not say how many updates the optimizer has made",
            do="give --no_load_optim true to go on with a new optimizer",
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All entries of nested dicts and lists, by their own names: the optimizers of a chain and their groups agree on them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, (dict, list)):
            yield from _entries(item)
        else:
            yield str(key), item


def _number(value: Any) -> int:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return int(value) if isinstance(value, (int, float)) else 0
