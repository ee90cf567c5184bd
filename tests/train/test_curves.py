"""Curves as pictures."""

from __future__ import annotations

import builtins
import logging
import math

import pytest

from megatron_swift.train.curves import _smoothed, draw_curves

LINE = [(i, 1.0 / (i + 1)) for i in range(60)]


def test_one_picture_for_each_scalar(tmp_path):
    pytest.importorskip("matplotlib")
    history = {
        "lm loss": LINE,
        "lm loss validation ppl": LINE[:2],
        "grad-norm": [(1, math.nan), (2, math.inf), (3, 1.0)],
    }
    files = draw_curves(tmp_path / "images", history | {"once": LINE[:1]})
    assert sorted(p.name for p in files) == ["grad_norm.png", "lm_loss.png", "lm_loss_validation_ppl.png"]
    assert sorted((tmp_path / "images").iterdir()) == sorted(files)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_nothing_to_draw(tmp_path):
    assert draw_curves(tmp_path / "images", {"lm loss": LINE[:1]}) == [] and not (tmp_path / "images").exists()


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    inner = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return inner(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    assert draw_curves(tmp_path / "images", {"lm loss": LINE}) == [] and not (tmp_path / "images").exists()
    assert "matplotlib is not installed (pip install 'megatron-swift[plots]')" in caplog.text


def test_smoothing():
    assert _smoothed([1.0] * 49) == []
    assert _smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    step = _smoothed([0.0] * 25 + [1.0] * 25)
    assert step[24] == 0 and step[25] == pytest.approx(0.2, rel=0.01) and 0.99 < step[-1] < 1


def test_a_picture_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """The training is over and saved by then: say so, and go on."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    (tmp_path / "images").write_text("a file")
    assert draw_curves(tmp_path / "images", {"lm loss": LINE}) == []
    assert "no curves are drawn" in caplog.text and "images" in caplog.text
