"""The values that flow from a data set to the model. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IGNORE = -100  # the label of a token that is not trained


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role  : system, user, assistant, tool_call or tool_response.
    train : None follows the run's loss_scale; True or False overrides it for this assistant turn.
    """

    role: str
    content: str
    train: bool | None = None


class Sample(NamedTuple):
    """One encoded conversation or text.

    ids    : int32 [n], the tokens.
    labels : int32 [n], labels[i] == ids[i] where token i is trained, IGNORE elsewhere. Not shifted.
    """

    ids: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """One micro-batch as one packed row of T tokens; attention never crosses a segment.

    tokens    : int64 [T]
    labels    : int64 [T], already shifted: labels[t] is the token that position t must predict, IGNORE where none is.
    positions : int64 [T], restarting at 0 in each segment.
    lengths   : segment lengths in order; they sum to T. Padding, if any, is a last segment of its own whose labels are IGNORE.
    rows      : the data set's row numbers that this batch holds (for messages about bad batches).
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE).sum())
