"""Learning rates: the golden values of spec section 12.1, the styles and their ends."""

from __future__ import annotations

import pytest

from megatron_swift.train.schedule import Schedule

QUICK_START = Schedule(lr=1e-5, min_lr=1e-6, style="cosine", warmup_iters=10, decay_iters=100)


@pytest.mark.parametrize(
    ("iteration", "applied"),
    [
        (1, 0.0),
        (2, 1.000000e-06),
        (5, 4e-06),
        (10, 9e-06),
        (11, 1e-05),
        (12, 9.997259e-06),
        (50, 6.435603e-06),
        (51, 6.281417e-06),
        (100, 1.002741e-06),
    ],
)
def test_golden_applied(iteration, applied):
    """Iteration k is made after k - 1 completed ones."""
    assert QUICK_START.at(iteration - 1) == pytest.approx(applied, rel=5e-7, abs=0)


@pytest.mark.parametrize(
    ("iteration", "printed"), [(5, 5e-06), (10, 1e-05), (50, 6.281417e-06), (95, 1.068365e-06), (100, 1e-06)]
)
def test_golden_printed(iteration, printed):
    assert QUICK_START.at(iteration) == pytest.approx(printed, rel=5e-7, abs=0)


@pytest.mark.parametrize(
    ("style", "halfway", "end", "beyond"), [("linear", 0.6, 0.2, 0.2), ("cosine", 0.6, 0.2, 0.2), ("constant", 1, 1, 1)]
)
def test_styles_when_decay_ends_before_training(style, halfway, end, beyond):
    schedule = Schedule(lr=1.0, min_lr=0.2, style=style, warmup_iters=4, decay_iters=12)
    assert [schedule.at(n) for n in (0, 1, 4)] == [0, 0.25, 1]
    assert [schedule.at(n) for n in (8, 12, 13, 500)] == pytest.approx([halfway, end, beyond, beyond], rel=1e-12)


def test_linear_quarter_and_cosine_quarter():
    linear, cosine = (Schedule(1.0, 0.0, style, 0, 8) for style in ("linear", "cosine"))
    assert linear.at(2) == pytest.approx(0.75) and cosine.at(2) == pytest.approx(0.8535533906, rel=1e-9)


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_no_warm_up_starts_at_the_full_rate(style):
    assert Schedule(3e-4, 0.0, style, 0, 10).at(0) == 3e-4
