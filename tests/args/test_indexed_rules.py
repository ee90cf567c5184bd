"""Where rows come from is said once, and what has no meaning for indexed data is refused."""

from __future__ import annotations

import pytest

from megatron_swift.args.commands import PtArguments, SftArguments, parse
from megatron_swift.args.indexed_rules import check_data_source
from megatron_swift.utils.errors import UsageError

GOOD = ["--data_path", "a", "--max_length", "64"]


@pytest.mark.parametrize("flags", [GOOD, ["--dataset", "a"], [*GOOD, "--split_dataset_ratio", "0"]])
def test_good(flags):
    check_data_source(parse(PtArguments, flags))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "no training data"),
        ([*GOOD, "--dataset", "a"], "both say what to train on"),
        (["--data_path", "a"], "needs --max_length"),
        ([*GOOD, "--val_dataset", "b"], "--val_dataset does not go with --data_path"),
        ([*GOOD, "--streaming", "true"], "--streaming does not go with --data_path"),
        ([*GOOD, "--lazy_tokenize", "true"], "--lazy_tokenize does not go with --data_path"),
    ],
)
def test_refused(flags, what):
    with pytest.raises(UsageError, match=what):
        check_data_source(parse(PtArguments, flags))


def test_fine_tuning_has_no_indexed_data():
    with pytest.raises(UsageError, match="no training data") as caught:
        check_data_source(parse(SftArguments, []))
    assert "data_path" not in caught.value.do
