"""One logger for the package. Rank 0 speaks; the other ranks only warn."""

from __future__ import annotations

import logging
import os
import sys

LOGGER_NAME = "megatron_swift"


def get_logger() -> logging.Logger:
    """The package's logger. Until `set_up_logging` ran, it behaves like any library logger."""
    return logging.getLogger(LOGGER_NAME)


def set_up_logging(level: int | None = None) -> None:
    """Send messages to stderr as `[LEVEL] text`; `level` is Python's number (10 debug .. 40 error), default 20.

    Ranks other than 0 (environment variable RANK) start at WARNING and name themselves, so that nothing is said twice.
    """
    logger = get_logger()
    rank = int(os.environ.get("RANK", "0"))
    logger.setLevel((level if level is not None else logging.INFO) if rank == 0 else max(level or 0, logging.WARNING))
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("[%(levelname)s] %(message)s" if rank == 0 else f"[%(levelname)s rank {rank}] %(message)s")
    )
    logger.handlers[:] = [handler]
