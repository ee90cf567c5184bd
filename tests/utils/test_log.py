"""Rank 0 speaks, the others only warn."""

from __future__ import annotations

import logging

import pytest

from megatron_swift.utils.log import get_logger, set_up_logging


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    logger = get_logger()
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("rank", "level", "said"),
    [
        (None, None, "[INFO] i\n[WARNING] w\n"),
        ("0", logging.DEBUG, "[DEBUG] d\n[INFO] i\n[WARNING] w\n"),
        ("0", logging.ERROR, ""),
        ("3", None, "[WARNING rank 3] w\n"),
        ("3", logging.DEBUG, "[WARNING rank 3] w\n"),
        ("3", logging.ERROR, ""),
    ],
)
def test_levels(monkeypatch, capsys, rank, level, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    for _ in range(2):  # setting up twice does not double the lines
        set_up_logging(level)
    for name, text in (("debug", "d"), ("info", "i"), ("warning", "w")):
        getattr(get_logger(), name)(text)
    assert capsys.readouterr().err == said
