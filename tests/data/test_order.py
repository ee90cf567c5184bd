from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_swift.data.order import Order, micro_batch_positions, num_micro_batches


def test_each_epoch_is_a_permutation_of_its_own():
    order = Order(50, seed=1, shuffle=True)
    epochs = [order.rows(range(start, start + 50)) for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_pure_function_of_seed_and_position():
    order, other = Order(50, seed=1, shuffle=True), Order(50, seed=2, shuffle=True)
    forward = order.rows(range(500))
    backward = [Order(50, seed=1, shuffle=True).row(position) for position in reversed(range(500))]
    assert forward == backward[::-1]
    assert forward != other.rows(range(500))
    assert pickle.loads(pickle.dumps(order)).rows(range(500)) == forward


def test_order_stays_the_same_for_ever():
    """A resumed run relies on it: these numbers may not change with numpy's version or ours."""
    assert Order(8, seed=42, shuffle=True).rows(range(10)) == [4, 1, 3, 6, 0, 7, 2, 5, 1, 2]


def test_without_shuffling():
    assert Order(3, seed=1, shuffle=False).rows(range(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_memory_is_bounded():
    order = Order(4, seed=0, shuffle=True)
    order.rows(range(400))
    assert len(order._epochs) == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
def test_a_global_batch_is_the_same_in_every_layout(dp_size, micro_batch_size, micros, step):
    size = dp_size * micro_batch_size * micros
    sizes = {"dp_size": dp_size, "micro_batch_size": micro_batch_size, "global_batch_size": size}
    assert num_micro_batches(**sizes) == micros
    positions = [
        position
        for micro in range(micros)
        for rank in range(dp_size)
        for position in micro_batch_positions(step, micro, rank, **sizes)
    ]
    assert positions == list(range(step * size, (step + 1) * size))


def test_sizes_must_divide():
    with pytest.raises(AssertionError):
        num_micro_batches(dp_size=2, micro_batch_size=2, global_batch_size=6)
