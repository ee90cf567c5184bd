"""The values that flow from a data set to the model. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IGNORE = -100  # the label of a token that is not trained


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role       : system, user, assistant, tool_call or tool_response.
    content    : of a tool_call, the call as JSON text {"name": ..., "arguments": {...}}; of a tool_response, what came back.
    train      : None follows the run's loss_scale; True or False overrides it for this assistant or tool_call turn.
    loss_scale : the weight of this turn's tokens in the loss, 0 for not trained; None: as the run's loss_scale weighs
                 them. Where `train` is False it has no say.
    """

    role: str
    content: str
    train: bool | None = None
    loss_scale: float | None = None


@dataclass(frozen=True)
class Conversation:
    """A row with what belongs to the row as a whole. `encode`, `encode_many` and `encode_prompt` take one of these or,
    where there is nothing but messages, the messages alone.

    tools : the tools that the model may call, each a JSON schema as text, in order. The agent template writes them.
    """

    messages: Sequence[Message]
    tools: tuple[str, ...] = ()


class Sample(NamedTuple):
    """One encoded conversation or text.

    ids     : int32 [n], the tokens.
    labels  : int32 [n], labels[i] == ids[i] where token i is trained, IGNORE elsewhere. Not shifted.
    weights : float32 [n], the weight of token i's loss, above 0 where it is trained and 0 elsewhere; not shifted either.
              None: every trained token weighs 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


class Batch(NamedTuple):
    """One micro-batch as one packed row of T tokens; attention never crosses a segment.

    tokens    : int64 [T]
    labels    : int64 [T], already shifted: labels[t] is the token that position t must predict, IGNORE where none is.
    positions : int64 [T], restarting at 0 in each segment.
    lengths   : segment lengths in order; they sum to T. Padding, if any, is a last segment of its own whose labels are IGNORE.
    rows      : the data set's row numbers that this batch holds (for messages about bad batches).
    weights   : float32 [T], the weight of the loss at each position, shifted as the labels are; 0 where the label is IGNORE.
                None: every label weighs 1.
    padding   : how many of the tokens are padding, in segments' ends and in the last segment.
    real      : for each segment how many of its tokens are not padding, the first ones. None: all are.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()
    weights: np.ndarray | None = None
    padding: int = 0
    real: tuple[int, ...] | None = None

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE).sum())
