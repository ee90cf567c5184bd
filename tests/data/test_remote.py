"""Rows of files at a hub, beside the same files on disk. The hub is on this machine."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from mini_hub import MiniHub, git_id, sha256

from megatron_swift.data import remote, web
from megatron_swift.data.blocks import cut
from megatron_swift.data.loader import Layout, StreamLoader
from megatron_swift.data.options import DataOptions
from megatron_swift.data.registry import Registered, Subset
from megatron_swift.data.remote import PAGE, PIECE, RemoteFile
from megatron_swift.data.sources import Source, find_source, parse_dataset
from megatron_swift.data.streaming import Lane, Place, open_stream
from megatron_swift.data.templates import get_template
from megatron_swift.utils.errors import DataError

NAME = "org/name"
OPTIONS = DataOptions(("rows",), template=get_template("chatml"), system="", max_length=60, packing=True, strict=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote._page.cache_clear()


@pytest.fixture
def hub():
    with MiniHub({NAME: {}}).serve() as hub:
        yield hub


def offer(hub: MiniHub, path: str, content: bytes) -> RemoteFile:
    hub.files[NAME][path] = content
    identity = sha256(content) if path.endswith(".parquet") else git_id(content)
    return RemoteFile(f"hf::{NAME}/{path}", f"{hub.url}/stored/{NAME}/{path}", len(content), identity)


def lines(count: int, width: int = 20) -> bytes:
    rows = [{"query": "q", "response": f"{n:05}" + "x" * (n * 7 % width)} for n in range(count)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def source_of(*files: RemoteFile | Path, limit: str = "") -> Source:
    parts = tuple((file, Subset("default")) for file in files)
    return Source(parse_dataset(f"{NAME}{limit}"), (), Registered(ms=NAME), parts)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_seek_and_read(hub):
    content = bytes(range(256)) * 4096  # 1 MiB
    with offer(hub, "a.txt", content).open() as file:
        assert file.read(5) == content[:5]
        file.seek(-7, io.SEEK_END)
        assert (file.tell(), file.read(), file.read()) == (len(content) - 7, content[-7:], b"")
        file.seek(300_000)
        assert file.readline() == content[300_000:].split(b"\n")[0] + b"\n"
    raw = offer(hub, "a.txt", content).random_access()
    raw.seek(1000)
    assert raw.read(600_000) == content[1000:601_000]


def test_no_more_is_fetched_than_is_read(hub):
    content = lines(300_000)
    file, start, stop = offer(hub, "a.jsonl", content), 3_000_000, 3_000_000 + 4 * PIECE
    with file.open(start, stop) as opened:
        opened.seek(start)
        opened.readline()
        assert (hub.requests(), hub.sent()) == (1, PIECE)  # and is held at once
        while opened.tell() < stop:
            opened.readline()
    assert hub.requests() == 5
    assert stop - start < hub.sent() <= stop - start + remote.TAIL


def test_small_blocks_share_pages(hub):
    content = lines(2000)
    blocks = cut([source_of(offer(hub, "a.jsonl", content))], at_least=64)
    for _ in range(2):
        for number in range(len(blocks)):
            list(blocks.read(number))
    assert hub.requests() == -(-len(content) // PAGE) < len(blocks)
    assert hub.sent() == len(content)


def test_a_broken_connection_is_taken_up_where_it_broke(hub):
    content = lines(20_000)
    file = offer(hub, "a.jsonl", content)
    hub.breaking, hub.after = 3, 70_000
    assert file.fetch(10, 400_010) == content[10:400_010]
    assert [one.range for one in hub.seen] == [f"bytes={10 + 70_000 * n}-400009" for n in range(4)]
    assert hub.sent() == 400_000


def test_a_server_without_ranges(hub, monkeypatch):
    content = lines(20_000)
    hub.ranges = False
    hub.breaking, hub.after = 2, 200_000
    file = offer(hub, "a.jsonl", content)
    assert file.fetch(100_000, 500_000) == content[100_000:500_000]
    monkeypatch.setattr(remote, "LARGEST_WHOLE", 1000)
    with pytest.raises(DataError) as caught:
        file.fetch(5, 10)
    assert caught.value.block().splitlines() == [
        f"error: hf::{NAME}/a.jsonl cannot be read by ranges",
        "  why : the server sends nothing but the whole",
        "  do  : download the data set and give its folder",
    ]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy(hub, status):
    file = offer(hub, "a.jsonl", lines(10))
    file = replace(file, url=f"{hub.url}/datasets/{NAME}/resolve/{hub.revision(NAME)}/a.jsonl")
    hub.failing, hub.status = web.ATTEMPTS - 1, status
    assert file.fetch(0, 10) == lines(10)[:10]
    hub.failing = web.ATTEMPTS
    with pytest.raises(DataError) as caught:
        file.fetch(0, 10)
    assert f"HTTP {status}" in caught.value.why and f"tried {web.ATTEMPTS} times" in caught.value.why
    assert caught.value.what == f"hf::{NAME}/a.jsonl cannot be read"
    assert "--load auto" in caught.value.do


def test_refusals(hub):
    file = offer(hub, "a.jsonl", lines(10))
    hub.token = "right"
    secret = replace(file, headers=(("Authorization", "Bearer wrong"),))
    with pytest.raises(DataError) as caught:
        secret.fetch(0, 10)
    assert (caught.value.why, caught.value.do) == (
        "HTTP 401 Unauthorized",
        "give a token that may read it: --hub_token",
    )
    assert "wrong" not in repr(secret) + str(secret) + caught.value.block()
    assert pickle.loads(pickle.dumps(secret)).headers == secret.headers
    assert len(hub.seen) == 1
    hub.token = ""
    hub.files[NAME] = {}
    with pytest.raises(DataError, match="cannot be read") as caught:
        file.fetch(0, 10)
    assert caught.value.why == "HTTP 404 Not Found"
    assert len(hub.seen) == 2


@pytest.mark.parametrize(("tags", "ranges"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("other", [lines(11), lines(9), b"", lines(10).replace(b"q", b"p", 1)])
def test_a_file_that_changes(hub, other, tags, ranges):
    hub.tags, hub.ranges = tags, ranges
    file = offer(hub, "a.jsonl", lines(10))
    offer(hub, "a.jsonl", other)
    if len(other) == file.size and not tags:
        assert file.fetch(0, 10) == other[:10]  # nothing tells
        return
    with pytest.raises(DataError, match=f"hf::{NAME}/a.jsonl has changed since it was listed") as caught:
        file.fetch(0, 10)
    assert "start again" in caught.value.do


# --- blocks ----------------------------------------------------------------------------------------------------------


def rows_of(blocks) -> list[list]:
    return [[item.make() for item, _ in blocks.read(number)] for number in range(len(blocks))]


@pytest.mark.parametrize("at_least", [3, 100])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet"])
def test_the_blocks_of_a_file_on_disk(hub, tmp_path, suffix, at_least):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(lines(3000) + b"\n\n" + lines(2)[:-1])
    if suffix == ".parquet":
        write_parquet(path, rows=3000, group=200)
    here, there = (
        cut([source_of(file)], at_least=at_least) for file in (path, offer(hub, path.name, path.read_bytes()))
    )
    assert (len(here), here.starts) == (len(there), there.starts)
    assert len(here) > 2
    rows = rows_of(there)
    assert rows == rows_of(here)
    assert sum(map(len, rows)) == (3000 if suffix == ".parquet" else 3002)


def test_a_limit_fetches_what_it_needs(hub):
    content = lines(100_000)
    blocks = cut([source_of(offer(hub, "a.jsonl", content), limit="#70")], at_least=5)
    assert [row["response"][:5] for rows in rows_of(blocks) for row in rows] == [f"{n:05}" for n in range(70)]
    assert hub.sent() <= 2 * PIECE < len(content)


def test_a_bad_row_is_known_by_its_byte(hub, tokenizer):
    content = lines(30) + b"{\n"
    stream = open_stream([source_of(offer(hub, "a.jsonl", content))], tokenizer, OPTIONS, window=40, lanes=1)
    lane = Lane(stream, 0)
    with pytest.raises(DataError) as caught:
        list(itertools.islice(iter(lambda: next(lane), None), 40))
    assert caught.value.what.startswith(f"hf::{NAME}/a.jsonl at byte {len(lines(30))}: bad JSON")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, *, rows: int, group: int, width: int = 20) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    found = [
        {"query": "q", "response": f"{n:05}" + "".join(chr(97 + n * k % 26) for k in range(n % width))}
        for n in range(rows)
    ]
    parquet.write_table(arrow.Table.from_pylist(found), path, row_group_size=group, compression="none")
    return path


def test_parquet_is_fetched_by_row_groups(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAGES", 1)  # nothing is small
    content = write_parquet(tmp_path / "a.parquet", rows=40_000, group=5000, width=300).read_bytes()
    assert len(content) > 2 << 20
    blocks = cut([source_of(offer(hub, "a.parquet", content))], at_least=64)
    assert len(blocks) == 8
    opening = hub.sent()
    assert opening < 100_000
    assert len(list(blocks.read(3))) == 5000
    assert hub.sent() - opening < len(content) / 8 * 1.2
    first = hub.sent()
    rows = blocks.read(6)
    next(rows)
    assert hub.sent() - first <= len(content) / 8 * 1.2


def test_an_error_in_the_middle_of_parquet(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAGES", 1)
    content = write_parquet(tmp_path / "a.parquet", rows=3000, group=1000, width=300).read_bytes()
    blocks = cut([source_of(offer(hub, "a.parquet", content))], at_least=8)
    hub.files[NAME] = {}
    with pytest.raises(DataError) as caught:
        list(blocks.read(1))
    assert (caught.value.what, caught.value.why) == (f"hf::{NAME}/a.parquet cannot be read", "HTTP 404 Not Found")


# --- streams ---------------------------------------------------------------------------------------------------------


def load(stream, *, dp_size=1, workers=0, steps=6, places=None, only=None) -> tuple[list, dict[int, Place]]:
    """For each step all rows by their lanes, over all ranks (or of one), and where the lanes stand then."""
    loaders = [
        StreamLoader(
            stream,
            Layout(rank, dp_size, 1, stream.lanes, 8, 0),
            places=places or {},
            num_steps=steps,
            num_workers=workers,
            prefetch_factor=2,
        )
        for rank in (range(dp_size) if only is None else [only])
    ]
    found = [
        sorted(
            [(batch.rows, batch.tokens.tolist(), batch.labels.tolist()) for part in parts for batch in part],
            key=lambda item: item[0],
        )
        for parts in zip(*loaders, strict=True)
    ]
    return found, {lane: place for loader in loaders for lane, place in loader.places.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_stream_is_that_of_the_files_on_disk(hub, tmp_path, tokenizer, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(lines(2000))
    if suffix == ".parquet":
        write_parquet(path, rows=2000, group=100)
    here, there = (
        open_stream([source_of(file)], tokenizer, OPTIONS, window=20, lanes=8)
        for file in (path, offer(hub, path.name, path.read_bytes()))
    )
    golden, places = load(here)
    assert load(there) == (golden, places)
    assert load(there, dp_size=2, workers=2) == (golden, places)
    _, places = load(there, steps=2, dp_size=2)
    stored = {lane: Place.from_json(json.loads(json.dumps(place.as_json()))) for lane, place in places.items()}
    assert load(there, steps=4, dp_size=4, workers=1, places=stored)[0] == golden[2:]


def test_a_rank_fetches_its_share(hub, tokenizer, monkeypatch):
    monkeypatch.setattr(remote, "PAGE", 1 << 13)  # or this small file were a few pages
    content = lines(24_000)
    stream = open_stream([source_of(offer(hub, "a.jsonl", content))], tokenizer, OPTIONS, window=200, lanes=8)
    blocks = stream.sets[0]
    for number in (0, 5):
        before = hub.sent()
        lane = Lane(stream, number)
        while lane.place.at[0][0] < len(blocks) // 8 - 2:
            next(lane)
        begun = lane._after.at[0][0] + 1
        assert 7 <= begun <= 9
        assert (begun - 1) * blocks.size < hub.sent() - before < 1.15 * begun * blocks.size < 0.25 * len(content)


def test_the_fingerprint_sees_another_revision(hub, tokenizer):
    def fingerprint(file: RemoteFile) -> str:
        return open_stream([source_of(file)], tokenizer, OPTIONS, window=20, lanes=4).fingerprint

    file = offer(hub, "a.jsonl", lines(50))
    moved = replace(file, url=f"{hub.url}/elsewhere", headers=(("Cookie", "x"),))
    assert fingerprint(file) == fingerprint(moved)
    assert fingerprint(file) != fingerprint(replace(file, identity="another"))


def test_a_local_source_stays_local(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(3))
    source = find_source(str(tmp_path), streaming=True)
    assert source.at_hub == ()
    assert source.paths == (tmp_path / "a.jsonl",)
