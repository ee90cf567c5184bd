"""Errors that a user can act on."""

from __future__ import annotations

import pickle

import pytest

from megatron_swift.utils import errors
from megatron_swift.utils.errors import Stopped, SwiftError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SwiftError)]


@pytest.mark.parametrize("kind", KINDS)
def test_survives_the_way_between_processes(kind):
    error = kind("what", why="why", do="do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.block() == error.block()
    assert error.block() == f"{'stopped' if kind is Stopped else 'error'}: what\n  why : why\n  do  : do"
    assert str(again) == "what"


def test_exit_codes_are_the_documents():
    """users_and_reliability.md, section 3.3."""
    codes = {kind.__name__: kind.exit_code for kind in KINDS if kind is not SwiftError}
    assert codes == {
        "UsageError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "NonFiniteError": 5,
        "WorkerError": 7,
        "OutOfMemoryError": 8,
        "StorageError": 9,
        "Stopped": 75,
    }


def test_short_blocks():
    assert SwiftError("what").block() == "error: what"
    assert SwiftError("what", do="do").block() == "error: what\n  do  : do"
