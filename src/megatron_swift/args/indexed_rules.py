"""Where a run's rows come from: files and hub names, or Megatron's indexed data."""

from __future__ import annotations

from megatron_swift.args.commands import PtArguments, TrainArguments
from megatron_swift.utils.errors import UsageError

# What says how rows are read and encoded has no meaning for rows that are tokens already.
NOT_WITH_INDEXED = ("val_dataset", "streaming", "lazy_tokenize", "interleave_prob")


def check_data_source(args: TrainArguments) -> None:
    """UsageError unless the arguments say where training rows come from, in one way."""
    path = args.data_path if isinstance(args, PtArguments) else []
    if not path and not args.dataset:
        other = ", or Megatron's indexed data as --data_path PREFIX" if isinstance(args, PtArguments) else ""
        raise UsageError("no training data is given", do=f"give files, folders or hub names as --dataset A B{other}")
    if not path:
        return
    if args.dataset:
        raise UsageError("--dataset and --data_path both say what to train on", do="give one of them")
    for name in NOT_WITH_INDEXED:
        if getattr(args, name):
            raise UsageError(f"--{name} does not go with --data_path", do=f"leave --{name} out")
    if args.max_length is None or args.max_length < 2:
        raise UsageError("--data_path needs --max_length", why="rows of so many tokens are cut through the documents")
