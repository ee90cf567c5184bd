"""What to prepare and how: the data part of a run's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_swift.data.encode import LossScale, Truncation
from megatron_swift.data.interleave import StoppingStrategy, check_probabilities
from megatron_swift.data.template import Template
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger


@dataclass(frozen=True)
class DataOptions:
    """What to prepare and how. The user's names; see the parameter list for their meaning.

    columns      : the data's column name -> the name we know.
    template     : a name for `get_template`, or the template.
    system       : the run's system prompt; None is the template's default, "" is none.
    truncation   : what happens to a row longer than max_length.
    strict       : True: the first malformed row is an error; False: such rows are left out and counted.
    packing      : rows are packs of up to max_length tokens; otherwise a row is one sample.
    cache_dir    : None is `default_cache_dir()`.
    start_method : how worker processes start ("fork", "spawn"), None is Python's default. Never changes the result.
    """

    dataset: tuple[str, ...]
    val_dataset: tuple[str, ...] = ()
    split_dataset_ratio: float = 0.01
    data_seed: int = 42
    dataset_shuffle: bool = True
    val_dataset_shuffle: bool = False
    interleave_prob: tuple[float, ...] | None = None
    stopping_strategy: StoppingStrategy = "first_exhausted"
    use_hf: bool = False
    hub_token: str | None = field(default=None, repr=False)
    download_mode: str = "reuse_dataset_if_exists"
    custom_dataset_info: tuple[str, ...] = ()
    custom_register_path: tuple[str, ...] = ()
    strict: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    template: str | Template = "chatml"
    system: str | None = None
    max_length: int | None = None
    truncation: Truncation = "delete"
    loss_scale: LossScale = "default"
    packing: bool = False
    dataset_num_proc: int = 1
    cache_dir: Path | None = None
    use_cache: bool = True
    start_method: Literal["fork", "spawn", "forkserver"] | None = None


def check_options(options: DataOptions) -> None:
    """UsageError for options that cannot work."""
    if not options.dataset:
        raise UsageError("--dataset is missing", do="give at least one file, folder or data set name")
    if not 0 <= options.split_dataset_ratio < 1:
        raise UsageError(f"--split_dataset_ratio {options.split_dataset_ratio} must be at least 0 and below 1")
    for source, target in options.columns.items():
        if not isinstance(target, str):
            raise UsageError(
                f"--columns: {source!r} must become a name, not {target!r}", do='for example {"q": "query"}'
            )
    if options.packing and options.max_length is None:
        raise UsageError("--packing needs --max_length", why="it is the length of a pack")
    if options.dataset_num_proc < 1:
        raise UsageError(f"--dataset_num_proc {options.dataset_num_proc} must be at least 1")
    if options.interleave_prob is not None:
        check_probabilities(options.interleave_prob, len(options.dataset))
    elif options.stopping_strategy != "first_exhausted":
        get_logger().warning("--stopping_strategy is not used: --interleave_prob is not given")
