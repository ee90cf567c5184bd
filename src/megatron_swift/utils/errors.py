"""Errors a user can act on: what happened, why, and what to do. Each class carries its process exit code."""

from __future__ import annotations

import re


class SwiftError(Exception):
    """A failure the user can understand and mend.

    what : one sentence that names the user's flag, file or line.
    why  : the reason, or "".
    do   : what to change, or "".
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        super().__init__(what, why, do)  # all three in args, so that the error survives pickling between processes
        self.what, self.why, self.do = what, why, do

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), self.what, self.why, self.do))

    def __str__(self) -> str:
        return self.what

    def block(self) -> str:
        """The block printed for a user: one to three lines."""
        lines = [f"error: {self.what}"]
        if self.why:
            lines.append(f"  why : {self.why}")
        if self.do:
            lines.append(f"  do  : {self.do}")
        return "\n".join(lines)


def _rebuild(kind: type[SwiftError], what: str, why: str, do: str) -> SwiftError:
    return kind(what, why=why, do=do)


class UsageError(SwiftError):
    """A flag, a value or a combination of them that cannot work. Raised before any rank starts."""

    exit_code = 2


class DataError(SwiftError):
    """A data set, a row or a template that cannot be used; names file and line."""

    exit_code = 3


class CheckpointError(SwiftError):
    """Weights or training state that are missing, damaged or do not fit."""

    exit_code = 4


class NonFiniteError(SwiftError):
    """Training stopped because the loss or the gradients are not finite."""

    exit_code = 5


class WorkerError(SwiftError):
    """A training process died."""

    exit_code = 7


class OutOfMemoryError(SwiftError):
    """The device ran out of memory."""

    exit_code = 8


def out_of_memory(error: BaseException, *, do: str) -> OutOfMemoryError | None:
    """What Python, torch or the system raised for want of memory, as the user should read it; None for anything else."""
    text = str(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not named and not re.search(r"not enough memory|(can't|cannot) allocate memory", text, re.IGNORECASE):
        return None
    return OutOfMemoryError(f"out of memory: {(text or type(error).__name__).split('. ')[0]}", do=do)


class StorageError(SwiftError):
    """A disk that is full, read-only or gone."""

    exit_code = 9


class Stopped(SwiftError):
    """Asked to stop from outside; what was trained so far is saved. EX_TEMPFAIL: a scheduler may start it again."""

    exit_code = 75

    def block(self) -> str:
        """No error."""
        return super().block().replace("error:", "stopped:", 1)
