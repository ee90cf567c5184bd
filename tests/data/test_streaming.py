from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data.blocks import cut
from megatron_swift.data.loader import Layout, StreamLoader
from megatron_swift.data.options import DataOptions
from megatron_swift.data.sources import find_source
from megatron_swift.data.streaming import Lane, Place, open_stream
from megatron_swift.data.templates import get_template
from megatron_swift.utils.errors import DataError

OPTIONS = DataOptions(
    ("rows",),
    template=get_template("chatml"),
    system="",
    max_length=60,
    packing=True,
    strict=True,
    data_seed=7,
)


def write_rows(path: Path, count: int, *, first: int = 0) -> Path:
    rows = [{"query": "q", "response": f"{n:03}" + "x" * (n * 7 % 23)} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream_of(tokenizer, *paths, lanes=4, window=20, **values):
    options = replace(OPTIONS, dataset=tuple(map(str, paths)), **values)
    return open_stream([find_source(path) for path in options.dataset], tokenizer, options, window=window, lanes=lanes)


def number(sample, tokenizer) -> int:
    text = tokenizer.decode(sample.ids[sample.labels >= 0].tolist())
    return int(text[:3])


def numbers(lane, tokenizer, rows: int) -> list[int]:
    return [number(sample, tokenizer) for _ in range(rows) for sample in next(lane)]


def as_list(step) -> list:
    return [
        (batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), batch.lengths, batch.rows)
        for batch in step
    ]


def load(stream, *, dp_size=1, mbs=1, workers=0, steps=9, places=None) -> tuple[list, dict[int, Place]]:
    """For each step all micro-batches by their lanes, over all ranks; and where the lanes stand then."""
    loaders = [
        StreamLoader(
            stream,
            Layout(rank, dp_size, mbs, stream.lanes, 8, 0),
            places=places or {},
            num_steps=steps,
            num_workers=workers,
            prefetch_factor=2,
        )
        for rank in range(dp_size)
    ]
    found = [
        sorted((item for part in parts for item in as_list(part)), key=lambda item: item[-1])
        for parts in zip(*loaders, strict=True)
    ]
    return found, {lane: place for loader in loaders for lane, place in loader.places.items()}


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_least", [1, 3, 50])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".json"])
def test_every_row_is_in_one_block(tmp_path, suffix, at_least):
    count = 300
    path = tmp_path / f"ä b{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"line {n}{'é' * (n % 9)}\n" + "\n" * (n % 3) for n in range(count)).rstrip("\n"))
    elif suffix == ".csv":
        path.write_text("query,response\n" + "".join(f'q,"r{n}\nnext"\n' for n in range(count)))
    elif suffix == ".json":
        path.write_text(json.dumps([{"query": "q", "response": str(n)} for n in range(count)]))
    else:
        write_rows(path, count)
    source = find_source(str(path))
    blocks = cut([source], at_least=at_least)
    found = [item for number in range(len(blocks)) for item, _ in blocks.read(number)]
    rows = [json.dumps(item.make(), ensure_ascii=False) for item in found]
    assert len(blocks) >= min(at_least, 3)
    assert len(rows) == count
    assert len(set(rows)) == count
    if suffix == ".txt":
        assert found[4].where() == f"{path}:{1 + 4 + 0 + 1 + 2 + 0}"


def test_limit_leaves_the_first_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 200)
    source = find_source(f"{path}#70")
    blocks = cut([source], at_least=5)
    rows = [item.make()["response"][:3] for number in range(len(blocks)) for item, _ in blocks.read(number)]
    assert rows == [f"{n:03}" for n in range(70)]


def test_a_row_longer_than_a_block(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a" * size} for size in (10, 60_000, 5, 200_000, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = cut([find_source(str(path))], at_least=100)
    found = [len(item.make()["text"]) for number in range(len(blocks)) for item, _ in blocks.read(number)]
    assert found == [10, 60_000, 5, 200_000, 1]


def test_a_file_that_changes(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 20)
    blocks = cut([find_source(str(path))], at_least=1)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="changed while it was read"):
        list(blocks.read(0))


# --- lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_lanes_share_the_rows_of_a_pass(tmp_path, tokenizer, shuffle):
    count = 600
    stream = stream_of(
        tokenizer, write_rows(tmp_path / "a.jsonl", count), packing=False, dataset_shuffle=shuffle, window=7
    )
    blocks = len(stream.sets[0])
    assert blocks >= 8 * 4 - 8
    seen: Counter = Counter()
    for lane_number in range(4):
        lane = Lane(stream, lane_number)
        mine = [
            number(sample, tokenizer)
            for sample in itertools.chain.from_iterable(
                iter(lambda lane=lane: next(lane) if lane.place.at[0][0] * 4 + lane.number < blocks else None, None)
            )
        ]
        seen.update(mine)
    assert set(seen) == set(range(count))  # windows may reach into the next pass
    assert sum(seen.values()) < 1.2 * count


def test_packs_are_full_and_whole(tmp_path, tokenizer):
    stream = stream_of(tokenizer, write_rows(tmp_path / "a.jsonl", 600), window=100, max_length=300)
    lane = Lane(stream, 1)
    rows = [next(lane) for _ in range(40)]
    assert all(sum(len(sample.ids) for sample in row) <= 300 for row in rows)
    assert sum(len(sample.ids) for row in rows for sample in row) > 0.97 * 300 * 40


def test_split_documents_are_kept_over_and_found_again(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n:03} " + "abc " * (n % 40) + "\n" for n in range(300)))
    stream = stream_of(tokenizer, path, lanes=1, truncation="split", loss_scale="all", window=5)
    straight = Lane(stream, 0)
    rows = [[sample.ids.tolist() for sample in next(straight)] for _ in range(60)]
    assert any(sum(len(ids) for ids in row) == 60 for row in rows)
    lane = Lane(stream, 0)
    for row in rows:
        place = Place.from_json(json.loads(json.dumps(lane.place.as_json())))
        lane = Lane(stream, 0, place)  # found again before every row
        assert [sample.ids.tolist() for sample in next(lane)] == row
    assert any(ref.piece for ref in lane.place.held) or any(lane.place.held)


def test_what_is_kept_over_keeps_no_window_in_memory(tmp_path, tokenizer):
    lane = Lane(stream_of(tokenizer, write_rows(tmp_path / "a.jsonl", 600), lanes=1), 0)
    for _ in range(30):
        next(lane)
    assert lane._over
    assert all(kept.sample.ids.base is None and kept.sample.labels.base is None for kept in lane._over)


def test_probabilities(tmp_path, tokenizer):
    a, b = write_rows(tmp_path / "a.jsonl", 300), write_rows(tmp_path / "b.jsonl", 300, first=500)
    stream = stream_of(tokenizer, a, b, lanes=2, packing=False, interleave_prob=(0.8, 0.2))
    drawn = numbers(Lane(stream, 0), tokenizer, 400)
    assert 0.72 < np.mean([n < 500 for n in drawn]) < 0.88
    assert len({n for n in drawn if n >= 500}) > 40
    assert drawn == numbers(Lane(stream, 0), tokenizer, 400)


def test_one_row_for_many_lanes(tmp_path, tokenizer):
    stream = stream_of(tokenizer, write_rows(tmp_path / "a.jsonl", 1), lanes=8, packing=False)
    assert [numbers(Lane(stream, lane), tokenizer, 2) for lane in range(8)] == [[0, 0]] * 8


def test_bad_rows(tmp_path, tokenizer, caplog):
    path = write_rows(tmp_path / "a.jsonl", 30)
    lines = path.read_text().splitlines()
    lines[17] = '{"query": "q"'
    path.write_text("\n".join(lines))
    stream = stream_of(tokenizer, path, lanes=1, packing=False, dataset_shuffle=False, window=30)
    with pytest.raises(DataError) as caught:
        next(Lane(stream, 0))
    assert f"{path}:18: bad JSON" in caught.value.what
    loose = stream_of(tokenizer, path, lanes=1, packing=False, dataset_shuffle=False, window=30, strict=False)
    lane = Lane(loose, 0)
    assert numbers(lane, tokenizer, 29) == [n for n in range(30) if n != 17]
    assert lane.left_out == 1
    assert f"left out {path}:18: bad JSON" in caplog.text


def test_no_usable_row(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": 1}\n' * 50)
    stream = stream_of(tokenizer, path, strict=False)
    with pytest.raises(DataError, match="no row of the data set is left"):
        next(Lane(stream, 0))
    path.write_text("\n\n")
    with pytest.raises(DataError, match="has no row"):
        next(Lane(stream_of(tokenizer, path), 0))
    path.write_text("")
    with pytest.raises(DataError, match="has no usable row"):
        stream_of(tokenizer, path)


def test_the_fingerprint_sees_what_matters(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", 30)
    same = stream_of(tokenizer, path).fingerprint
    assert stream_of(tokenizer, path).fingerprint == same
    assert stream_of(tokenizer, path, lanes=8).fingerprint != same
    assert stream_of(tokenizer, path, window=21).fingerprint != same
    assert stream_of(tokenizer, path, template=get_template("llama3")).fingerprint != same
    write_rows(path, 30, first=1)
    assert stream_of(tokenizer, path).fingerprint != same


# --- the loader ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(tmp_path_factory, tokenizer):
    return stream_of(tokenizer, write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", 400), lanes=8)


@pytest.fixture(scope="module")
def golden(stream):
    return load(stream, mbs=1)


@pytest.mark.parametrize(("dp_size", "workers"), [(1, 4), (2, 0), (4, 2), (2, 3), (8, 4)])
def test_any_ranks_and_workers_give_the_same(stream, golden, dp_size, workers):
    found, places = load(stream, dp_size=dp_size, workers=workers)
    assert found == golden[0]
    assert places == golden[1]


def test_micro_batches_of_several_rows(stream, golden):
    found, places = load(stream, dp_size=2, mbs=2, workers=2)
    lanes = [[batch[-1] for batch in step] for step in found]
    assert lanes == [[(0, 1), (2, 3), (4, 5), (6, 7)]] * 9
    assert places == golden[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_the_same_error_from_a_worker(tmp_path, tokenizer, workers):
    path = write_rows(tmp_path / "a.jsonl", 30)
    path.write_text(path.read_text() + "{")
    with pytest.raises(DataError) as caught:
        load(stream_of(tokenizer, path, lanes=2), workers=workers, steps=40)
    assert caught.value.what.startswith(f"{path}:31: bad JSON")
    assert "--strict false" in caught.value.do


@pytest.mark.parametrize(("at", "dp_size", "workers"), [(1, 1, 0), (4, 2, 2), (8, 4, 0), (5, 1, 4)])
def test_resume_with_other_ranks_and_workers(stream, golden, at, dp_size, workers):
    _, places = load(stream, dp_size=2, workers=1, steps=at)
    stored = {lane: Place.from_json(json.loads(json.dumps(place.as_json()))) for lane, place in places.items()}
    found, _ = load(stream, dp_size=dp_size, workers=workers, steps=9 - at, places=stored)
    assert found == golden[0][at:]


def test_a_rank_reads_only_its_blocks(tmp_path, tokenizer, monkeypatch):
    stream = stream_of(tokenizer, write_rows(tmp_path / "a.jsonl", 2000), lanes=8, window=10)
    read: dict[int, set[int]] = {}

    class Counting(type(stream.sets[0])):
        def read(self, number):
            read.setdefault(lane.number, set()).add(number)
            return super().read(number)

    counted = replace(stream, sets=(Counting(**stream.sets[0].__dict__),))
    for lane_number in range(8):
        lane = Lane(counted, lane_number)
        for _ in range(3):
            next(lane)
    assert all(not read[a] & read[b] for a, b in itertools.combinations(range(8), 2))
