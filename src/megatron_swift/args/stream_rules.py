"""Rules for data that is read while training."""

from __future__ import annotations

from megatron_swift.args.commands import TrainArguments
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger

# Parameters that streaming leaves nothing to do for, and why.
UNUSED = {
    "stopping_strategy": "a stream has no end: each data set begins again when it is through",
    "dataset_num_proc": "rows are encoded by --num_workers processes of each rank",
    "load_from_cache_file": "nothing is encoded beforehand",
    "dataloader_persistent_workers": "there is one pass, without end",
}


def check_streaming(args: TrainArguments) -> None:
    """UsageError for what cannot go with --streaming or --lazy_tokenize, or without; warn about what has no effect."""
    if args.lazy_tokenize:
        _check_lazy(args)
    if not args.streaming:
        if args.dataloader_type == "external":
            raise UsageError(
                "--dataloader_type external: the data must feed itself",
                do="add --streaming true, or use cyclic or single",
            )
        if "shuffle_buffer_size" in args.given:
            get_logger().warning("--shuffle_buffer_size has no effect without --streaming: all rows are shuffled")
        return
    if args.train_iters is None:
        raise UsageError("--streaming needs --train_iters", why="nobody has counted the rows of a stream")
    if "split_dataset_ratio" in args.given and args.split_dataset_ratio > 0:
        raise UsageError(
            f"--split_dataset_ratio {args.split_dataset_ratio:g} with --streaming: nothing can be split off",
            why="nobody has counted the rows of a stream",
            do="give --val_dataset, or --split_dataset_ratio 0",
        )
    if "dataloader_type" in args.given and args.dataloader_type != "external":
        raise UsageError(
            f"--dataloader_type {args.dataloader_type} with --streaming: a stream feeds itself",
            do="leave --dataloader_type out",
        )
    for name, why in UNUSED.items():
        if name in args.given:
            get_logger().warning("--%s has no effect with --streaming: %s", name, why)


def _check_lazy(args: TrainArguments) -> None:
    if args.streaming:
        get_logger().warning(
            "--lazy_tokenize has no effect with --streaming, which tokenises rows when they are needed"
        )
    elif args.packing:
        get_logger().warning("--lazy_tokenize has no effect with --packing: all lengths must be known before")
    elif args.truncation_strategy == "split":
        raise UsageError(
            "--truncation_strategy split with --lazy_tokenize: how many rows there are is not known before they are tokenised",
            do="choose delete, left or right, or leave --lazy_tokenize out",
        )
