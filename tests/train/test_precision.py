"""The dynamic loss scale of fp16."""

from __future__ import annotations

import json

import pytest

from megatron_swift.train.precision import LossScale


def after(outcomes: str, scale: LossScale | None = None) -> LossScale:
    """The scale after steps, "x" an overflow and "." a clean step."""
    scale = scale or LossScale.for_dtype("float16")
    for outcome in outcomes:
        scale.update(overflow=outcome == "x")
    return scale


@pytest.mark.parametrize(
    ("outcomes", "exponent"),
    [
        ("", 32),
        ("x", 32),  # the first overflow is forgiven
        ("xx", 31),
        ("xxx", 30),
        ("x" + "." * 999 + "x", 31),  # 999 clean steps do not forgive another
        ("." * 1000, 33),
        ("x" + "." * 1000, 33),
        ("x" + "." * 1000 + "x", 33),  # forgiven again after growth
        ("x" + "." * 1000 + "xx", 32),
        ("." * 999 + "x" + "." * 999, 32),  # an overflow restarts the count
        ("." * 999 + "x" + "." * 1000, 33),
        ("." * 2000, 34),
    ],
)
def test_machine(outcomes, exponent):
    assert after(outcomes).scale == 2.0**exponent


def test_never_below_one():
    assert after("x" * 100).scale == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_precisions_keep_one(dtype):
    assert after("x" * 5 + "." * 2000, LossScale.for_dtype(dtype)).scale == 1.0


@pytest.mark.parametrize("before", ["x", "xxx....", "." * 998, "x" + "." * 999])
def test_saved_and_restored_it_goes_on_alike(before):
    saved = json.loads(json.dumps(after(before).as_json()))
    restored = LossScale.for_dtype("float16")
    restored.restore(saved)
    for outcomes in ("..x.x", "xx"):
        assert after(outcomes, restored) == after(before + ("..x.x" if outcomes == "..x.x" else "..x.xxx"))


def test_a_run_of_another_precision_keeps_its_own():
    other = LossScale.for_dtype("bfloat16")
    other.restore(after("xxx").as_json())
    assert other == LossScale.for_dtype("bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_from_a_run_without_a_loss_scale(dtype):
    """fp16 begins with its own first scale, not with the constant 1; one that has really fallen to 1 is restored."""
    scale = LossScale.for_dtype("float16")
    scale.restore(after("...", LossScale.for_dtype(dtype)).as_json())
    assert scale == LossScale.for_dtype("float16")
    fallen = after("x" * 40)
    assert fallen.scale == 1.0
    scale.restore(fallen.as_json())
    assert scale == fallen
