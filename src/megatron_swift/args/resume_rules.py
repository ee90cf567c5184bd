"""Resuming: which run `--load auto` means, and what differs between a checkpoint's run and the present command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.rules import has_checkpoint
from megatron_swift.utils.errors import CheckpointError, DataError, SwiftError, UsageError
from megatron_swift.utils.log import get_logger

AUTO = "auto"
A = TypeVar("A", bound=TrainArguments)

_ROWS = "makes other training rows"
_ORDER = "rows come in another order: of this pass some come twice, others not at all"
_RATE = "the learning rate goes on by the present settings"
_STEP = "updates go on by the present settings"
_SUMS = "same rows and state; sums in another order, so last bits differ"
CONSEQUENCES = {
    "global_batch_size": "steps of another size; the samples consumed so far keep their place",
    "micro_batch_size": _SUMS,
    "seed": _ORDER,
    "dataloader_type": _ORDER,
    **dict.fromkeys(("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters"), _RATE),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"), _STEP),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), _STEP),
    **dict.fromkeys(("template", "max_length", "truncation_strategy", "packing", "loss_scale", "data_seed"), _ROWS),
    "split_dataset_ratio": _ROWS,
    "dtype": "weights and matrix products in another precision",
    **dict.fromkeys(("fp8_format", "fp8_recipe"), "matrix products in another precision"),
    "ranks": _SUMS,
    **dict.fromkeys(
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
            *("data_parallel_sharding_strategy", "use_distributed_optimizer"),
        ),
        _SUMS,
    ),
}
_MODEL = "another model"
_DATA = "the position in the data means other rows"
# What a model's configuration says besides the shapes and the function of its weights.
_NO_MODEL = {
    "max_position_embeddings": "longer or shorter rows are let in",
    "moe.aux_loss_coeff": _STEP + ", unless --moe_aux_loss_coeff is given",
    **dict.fromkeys(("moe.names.module", "moe.names.gate", "moe.names.up", "moe.names.down"), "names on the disk only"),
}


def runs_below(save: Path, *, add_version: bool) -> list[Path]:
    """Folders with a checkpoint: `save` itself and its v<N>-… ones, the latest start first.

    add_version : how the present run is called: its kind of folder comes before the other one.
    """
    if not save.is_dir():
        return []
    numbered = [(int(m[1]), path) for path in save.iterdir() if (m := re.match(r"^v(\d+)", path.name))]
    versions = [path for _, path in sorted(numbered, reverse=True)]
    ordered = [*versions, save] if add_version else [save, *versions]
    return [path for path in ordered if has_checkpoint(path)]


def find_auto(args: A) -> tuple[A, tuple[Path, ...] | None]:
    """`--load auto` as the newest run below --save, or as no --load where there is none yet; and the runs before that one.

    Other arguments come back as they are, with None. UsageError where auto cannot mean anything.
    """
    if args.load != AUTO:
        return args, None
    if args.save is None:
        raise UsageError("--load auto looks below --save, which is not given", do="give --save")
    if args.finetune:
        raise UsageError(
            "--load auto with --finetune true",
            why="every restart would begin at step 0 again",
            do="leave --finetune out, and give the weights to start with as --model",
        )
    save = Path(args.save).expanduser().absolute()
    found = runs_below(save, add_version=args.add_version)
    if not found:
        get_logger().warning("--load auto: there is no checkpoint below %s yet; starting anew", save)
        return dataclasses.replace(args, load=None), ()
    get_logger().info("--load auto: going on from %s", found[0])
    return dataclasses.replace(args, load=str(found[0])), tuple(found[1:])


def settings_of(
    args: TrainArguments, *, template: str, dtype: str, train_iters: int, ranks: int, model: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint records of its run, to be compared with the command that resumes it. JSON values only.

    model : the architecture, flat or nested.
    """
    settled = {
        "template": template,
        "dtype": dtype,
        "ranks": ranks,
        "lr_decay_iters": args.lr_decay_iters or train_iters,
        "data_seed": args.data_seed if args.data_seed is not None else args.seed,
    }
    plain = {name: settled[name] if name in settled else getattr(args, name) for name in CONSEQUENCES}
    return plain | {"model": _flat(model)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots; sequences as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return flat


@dataclass(frozen=True)
class Change:
    """One row of the table."""

    name: str
    before: Any
    now: Any
    consequence: str


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, data: tuple[str, str]) -> list[Change]:
    """What differs, model and data first. Settings that one of the two does not know are left out: an older version wrote it.

    data : the fingerprints of the training rows; "" where the checkpoint has none.
    """
    found = []
    old, new = before.get("model") or {}, now["model"]
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            found.append(Change(f"model {name}", old[name], new[name], _of_model(name, new)))
    if data[0] and data[0] != data[1]:
        found.append(Change("training data", data[0], data[1], _DATA))
    for name, consequence in CONSEQUENCES.items():
        if name in before and before[name] != now[name]:
            found.append(Change(name, before[name], now[name], consequence))
    return found


def _of_model(name: str, model: Mapping[str, Any]) -> str:
    """What it means that a model's setting has changed."""
    if name == "max_position_embeddings" and model.get("rope_scaling.rope_type") == "yarn":
        stretched = ("rope_scaling.factor", "rope_scaling.original_max_position_embeddings")
        if not all(model.get(key) for key in stretched):  # then the rotation is computed from it
            return _MODEL
    return _NO_MODEL.get(name, _MODEL)


def table(found: Sequence[Change]) -> str:
    """name | checkpoint | now | consequence, in columns."""
    rows = [("", "checkpoint", "now", "consequence")]
    rows += [(c.name, _short(c.before), _short(c.now), c.consequence) for c in found]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 28 else text[:25] + "..."


def refusal(found: Sequence[Change], *, folder: Path, reset_data: bool) -> SwiftError | None:
    """Why the run must not go on from the checkpoint; None where it may."""
    others = [c.name.removeprefix("model ") for c in found if c.consequence == _MODEL]
    if others:
        return CheckpointError(
            f"{folder} was made with another model: it differs in {', '.join(others)}",
            do="give the checkpoint's model, or --finetune true to start a new training from such weights as fit",
        )
    if not reset_data and any(c.consequence == _DATA for c in found):
        causes = [c.name for c in found if c.consequence == _ROWS]
        return DataError(
            f"the training data are not those of {folder}",
            why=f"{', '.join(causes)} changed" if causes else "a file, or a parameter that makes rows, has changed",
            do="give the data and settings of the checkpoint's run, --reset_data true to go on with the first row of the "
            "new data, or --finetune true to start a new training",
        )
    return None


def other_data(found: Sequence[Change]) -> bool:
    """Whether the training rows are others."""
    return any(c.consequence == _DATA for c in found)
