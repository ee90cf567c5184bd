"""Which of the data sets' rows are trained on and which are evaluated on, and in what order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_swift.data.interleave import Index, interleave, sample, split
from megatron_swift.data.options import DataOptions
from megatron_swift.data.sources import Source


def choose(
    options: DataOptions, sources: Sequence[Source], val_sources: Sequence[Source], usable: Sequence[Index]
) -> tuple[Index, Index]:
    """(train, validation) row numbers, in order. One random state goes through all sets in their order.

    usable : for each data set, then each validation data set, the numbers of its rows.
    """
    state = np.random.RandomState(options.data_seed)
    train, val = [], []
    ratio = 0.0 if val_sources else options.split_dataset_ratio
    for source, rows in zip(sources, usable, strict=False):
        chosen, held_out = split(
            rows, limit=source.request.limit, ratio=ratio, state=state, shuffle=options.dataset_shuffle
        )
        train.append(chosen)
        val.append(held_out)
    for source, rows in zip(val_sources, usable[len(sources) :], strict=True):
        val.append(sample(rows, source.request.limit, state=state, shuffle=options.val_dataset_shuffle))
    if options.interleave_prob is None:
        train_rows = np.concatenate(train)
    else:  # validation rows are not drawn: each counts once
        probabilities, strategy = options.interleave_prob, options.stopping_strategy
        train_rows = interleave(train, probabilities, stopping_strategy=strategy, state=state)
    val_rows = np.concatenate(val)
    shuffle_val = options.val_dataset_shuffle if val_sources else options.dataset_shuffle
    train_rows = state.permutation(train_rows) if options.dataset_shuffle else train_rows
    return train_rows, state.permutation(val_rows) if shuffle_val else val_rows
