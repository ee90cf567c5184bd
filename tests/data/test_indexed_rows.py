"""Rows cut through documents: every token once in a pass, attention within documents, blends by weight."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data.indexed import IndexedFile, IndexedWriter
from megatron_swift.data.indexed_rows import Blend, IndexedRows, Plan, blend_order, open_indexed, parse_data_path
from megatron_swift.utils.errors import DataError, UsageError

LENGTHS = (5, 1, 17, 0, 8, 3, 30, 2)


def write(prefix: Path, *, lengths: tuple[int, ...] = LENGTHS, start: int = 0) -> str:
    """Documents of these lengths; all tokens of the data set differ."""
    with IndexedWriter(prefix, vocab_size=65_000) as writer:
        total = sum(lengths)
        writer.add(np.arange(start, start + total, dtype=np.int32), np.array(lengths))
        writer.finish()
    return str(prefix)


def rows_of(*prefixes: str, weights: tuple[float, ...] = (), **values: object) -> IndexedRows:
    plan = Plan(Blend(prefixes, weights or ((1.0,) if len(prefixes) == 1 else ())), 10, (0.0, 1.0), 3, True, 65_000)
    return IndexedRows(plan._replace(**values))


def flat(rows: IndexedRows, index: int) -> list[int]:
    return [token for sample in rows.row(index) for token in sample.ids.tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_rows_are_the_stream_of_documents(tmp_path, shuffle):
    rows = rows_of(write(tmp_path / "a"), shuffle=shuffle)
    file, cut = IndexedFile(tmp_path / "a"), rows.cuts[0]
    documents = [file.read(number).tolist() for number in cut.order]
    stream = [token for document in documents for token in document]
    assert sorted(cut.order.tolist()) == list(range(8))
    assert (cut.order.tolist() == list(range(8))) is not shuffle
    assert len(rows) == (sum(LENGTHS) - 1) // 9
    for index in range(len(rows)):
        assert flat(rows, index) == stream[index * 9 : index * 9 + 10]
        for sample in rows.row(index):  # no sample reaches over two documents
            assert any(set(sample.ids.tolist()) <= set(document) for document in documents)
            assert (sample.labels == sample.ids).all()


def test_every_follower_is_predicted_once(tmp_path):
    rows = rows_of(write(tmp_path / "a"))
    predicted = [
        token for index in range(len(rows)) for sample in rows.row(index) for token in sample.labels[1:].tolist()
    ]
    assert len(predicted) == len(set(predicted))
    file = IndexedFile(tmp_path / "a")
    last = flat(rows, len(rows) - 1)[-1]
    stream = [token for number in rows.cuts[0].order for token in file.read(number).tolist()]
    firsts = {int(file.read(number)[0]) for number in range(len(file)) if file.lengths[number]}
    assert set(predicted) == set(stream[: stream.index(last) + 1]) - firsts


def test_another_process_has_the_same_rows(tmp_path):
    rows = rows_of(write(tmp_path / "a"), write(tmp_path / "b", start=1000), weights=(0.7, 0.3))
    again = pickle.loads(pickle.dumps(rows))
    assert [flat(again, index) for index in range(len(again))] == [flat(rows, index) for index in range(len(rows))]
    assert len(pickle.dumps(rows)) < 2000
    other = rows_of(*rows.plan.blend.prefixes, weights=(0.7, 0.3), seed=4)
    assert [flat(other, index) for index in range(len(other))] != [flat(rows, index) for index in range(len(rows))]


def test_a_small_set_is_gone_over_again_in_another_order(tmp_path):
    rows = rows_of(write(tmp_path / "a"), write(tmp_path / "b", start=1000), weights=(0.9, 0.1))
    total = 2 * ((sum(LENGTHS) - 1) // 9)
    assert len(rows) == total
    counts = np.bincount(rows.which).tolist()
    assert counts == [12, 2]
    order = rows.cuts[0].order
    assert len(order) == 16
    assert sorted(order[:8].tolist()) == sorted(order[8:].tolist()) == list(range(8))
    assert order[:8].tolist() != order[8:].tolist()


def test_without_weights_all_rows_come_once(tmp_path):
    rows = rows_of(write(tmp_path / "a"), write(tmp_path / "b", lengths=LENGTHS * 3, start=1000))
    assert np.bincount(rows.which).tolist() == [7, 21]


def test_blend_order_is_the_one_furthest_behind():
    """By hand from Megatron's rule: the largest weight * max(row, 1) - drawn, the first of equal ones."""
    assert blend_order((0.5, 0.5), 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert blend_order((0.3, 0.7), 10).tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert blend_order((1.0,), 3).tolist() == [0, 0, 0]


def test_data_path(tmp_path):
    assert parse_data_path(["a b"]) == Blend(("a b",), (1.0,))
    assert parse_data_path(["0.3", "a", "0.7", "b"]) == Blend(("a", "b"), (0.3, 0.7))
    assert parse_data_path(["3", "a", "1", "b"]).weights == (0.75, 0.25)
    assert parse_data_path(["a", "b"]) == Blend(("a", "b"), ())
    for wrong in (["0.3", "a", "b"], ["a", "0.3", "b", "0.7"], ["0.3", "0.7", "a", "b"], ["0", "a", "1", "b"]):
        with pytest.raises(UsageError, match="--data_path"):
            parse_data_path(wrong)
    write(tmp_path / "7")
    assert parse_data_path([str(tmp_path / "7"), "b"]).weights == ()


def test_validation_is_the_last_documents(tmp_path):
    prefix = write(tmp_path / "a", lengths=(20,) * 10)
    found = open_indexed(Blend((prefix,), (1.0,)), length=10, val_ratio=0.2, seed=1, shuffle=True, vocab_size=65_000)
    assert found.val is not None
    assert {token for index in range(len(found.val)) for token in flat(found.val, index)} <= set(range(160, 200))
    assert {token for index in range(len(found.train)) for token in flat(found.train, index)} <= set(range(160))
    assert found.documents == ((prefix, 10),)
    assert found.drawn == [len(found.train)] == [17]


def test_too_few_documents_to_evaluate_on(tmp_path, caplog):
    prefix = write(tmp_path / "a")
    found = open_indexed(Blend((prefix,), (1.0,)), length=10, val_ratio=0.01, seed=1, shuffle=True, vocab_size=65_000)
    assert found.val is None
    assert len(found.train) == 7
    assert "nothing is evaluated" in caplog.text


def test_the_fingerprint_follows_data_and_options(tmp_path):
    prefix = write(tmp_path / "a")

    def fingerprint(**values: object) -> str:
        base = {"length": 10, "val_ratio": 0.0, "seed": 1, "shuffle": True, "vocab_size": 65_000}
        return open_indexed(Blend((prefix,), (1.0,)), **{**base, **values}).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert len({first, fingerprint(seed=2), fingerprint(length=11), fingerprint(shuffle=False)}) == 4
    write(tmp_path / "a", start=1)
    assert fingerprint() != first


def test_errors(tmp_path):
    prefix = write(tmp_path / "a")
    with pytest.raises(DataError, match="66 tokens are less than one row of 100"):
        rows_of(prefix, length=100)
    rows = rows_of(prefix, vocab_size=20)
    with pytest.raises(DataError, match="the tokenizer has 20"):
        [rows.row(index) for index in range(len(rows))]
    with pytest.raises(DataError, match="cannot be read"):
        rows_of(str(tmp_path / "none"))
