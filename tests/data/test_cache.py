from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data.cache import (
    DTYPES,
    Damaged,
    PackedRows,
    RowWriter,
    build_once,
    default_cache_dir,
    read_checked,
    write_checked,
)
from megatron_swift.data.types import IGNORE
from megatron_swift.utils.errors import StorageError


def write_rows(folder: Path) -> None:
    """Three samples, [1, 2, 3], [4] and [5, 6], in rows (0, 2), (1), (0)."""
    with RowWriter(folder) as writer:
        ids = np.array([1, 2, 3, 4], np.int32)
        labels = np.array([IGNORE, 2, 3, 4], np.int32)
        writer.add(ids=ids, labels=labels, lengths=np.array([3, 1]), trained=np.array([2, 1]))
        ids = np.array([5, 6], np.int32)
        writer.add(ids=ids, labels=np.full(2, IGNORE, np.int32), lengths=np.array([2]), trained=np.array([0]))
        writer.finish(members=np.array([0, 2, 1, 0]), sizes=np.array([2, 1, 1]))


def check(folder: Path) -> None:
    PackedRows(folder / "rows").check()


def build(folder: Path) -> None:
    write_rows(folder / "rows")


def test_rows(tmp_path):
    write_rows(tmp_path / "rows")
    opened = PackedRows(tmp_path / "rows")
    opened.check()
    for rows in (opened, pickle.loads(pickle.dumps(opened))):
        assert len(rows) == 3
        assert [[sample.ids.tolist() for sample in rows.row(index)] for index in range(3)] == [
            [[1, 2, 3], [5, 6]],
            [[4]],
            [[1, 2, 3]],
        ]
        assert rows.row(0)[0].labels.tolist() == [IGNORE, 2, 3]
        assert rows.row(0)[0].ids.dtype == rows.row(0)[0].labels.dtype == np.int32
        assert (rows.num_tokens, rows.num_trained) == (9, 5)
        assert rows.row_tokens.tolist() == [5, 1, 3]
        assert rows.sample_tokens.tolist() == [3, 2, 1, 3]
    with pytest.raises(ValueError):
        opened.row(0)[0].ids[0] = 7


def test_hit_and_miss_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert not build_once(tmp_path, "k1", build=build, check=check).hit
    assert "miss k1" in caplog.text
    again = build_once(tmp_path, "k1", build=pytest.fail, check=check)
    assert again.hit
    assert again.folder == tmp_path / "k1"
    assert "hit k1" in caplog.text
    assert not build_once(tmp_path, "k1", build=build, check=check, use_cache=False).hit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k1", "k1.checked", "k1.lock"]


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in DTYPES), "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_mended(tmp_path, caplog, name, harm):
    build_once(tmp_path, "k", build=build, check=check)
    path = tmp_path / "k" / "rows" / name
    raw = bytearray(path.read_bytes())
    if harm == "flip":
        raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if harm == "cut" else raw)
    if harm == "remove":
        path.unlink()
    with pytest.raises(Damaged):
        check(tmp_path / "k")
    caplog.clear()
    assert not build_once(tmp_path, "k", build=build, check=check).hit
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    check(tmp_path / "k")


def test_entry_appears_by_renaming(tmp_path):
    """A copy would show half an entry to a reader that takes no lock."""
    inodes = []

    def build_and_note(folder: Path) -> None:
        inodes.append(folder.stat().st_ino)
        build(folder)

    entry = build_once(tmp_path, "k", build=build_and_note, check=check)
    assert entry.folder.stat().st_ino == inodes[0]


def test_failed_build_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "k", build=fail, check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]


def test_killed_build_is_cleared_away(tmp_path):
    def die(folder: Path) -> None:
        (folder / "half").write_text("x")
        os._exit(9)

    context = multiprocessing.get_context("fork")
    process = context.Process(target=build_once, args=(tmp_path, "k"), kwargs={"build": die, "check": check})
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "k").exists()
    assert len(list(tmp_path.iterdir())) == 2
    build_once(tmp_path, "k", build=build, check=check)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "k.checked", "k.lock"]


def test_of_two_processes_one_builds(tmp_path):
    def slow(folder: Path) -> None:
        with (tmp_path / "builds").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        build(folder)

    def run() -> None:
        build_once(tmp_path / "cache", "k", build=slow, check=check)
        check(tmp_path / "cache" / "k")

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "x"


def test_replacing_an_entry_leaves_open_rows_readable(tmp_path):
    folder = build_once(tmp_path, "k", build=build, check=check).folder
    rows = PackedRows(folder / "rows")
    build_once(tmp_path, "k", build=build, check=check, use_cache=False)
    assert rows.row(1)[0].ids.tolist() == [4]


def test_unwritable_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        build_once(tmp_path / "file" / "cache", "k", build=build, check=check)
    assert "MEGATRON_SWIFT_CACHE" in caught.value.do


def test_checked_json(tmp_path):
    value = {"a": ["é\n", 1, None]}
    write_checked(tmp_path / "v.json", value)
    assert read_checked(tmp_path / "v.json") == value
    (tmp_path / "v.json").write_bytes(b"\xff")
    with pytest.raises(Damaged):
        read_checked(tmp_path / "v.json")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_SWIFT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MEGATRON_SWIFT_CACHE")
    assert default_cache_dir().parts[-2:] == (".cache", "megatron_swift")


def write_weighted(folder: Path, weights: list[list[float] | None]) -> PackedRows:
    """One chunk, and one row, for each item: two tokens, the second trained."""
    with RowWriter(folder) as writer:
        for number, given in enumerate(weights):
            ids = np.array([2 * number, 2 * number + 1], np.int32)
            labels = np.array([IGNORE, ids[1]], np.int32)
            array = None if given is None else np.array(given, np.float32)
            writer.add(ids=ids, labels=labels, weights=array, lengths=np.array([2]), trained=np.array([1]))
        writer.finish(members=np.arange(len(weights)), sizes=np.ones(len(weights), np.int64))
    rows = PackedRows(folder)
    rows.check()
    return rows


@pytest.mark.parametrize(
    "weights",
    [
        [[0, 2.0], None, [0, 0.5]],
        [None, None, [0, 0.5], None],
        [None] * 5 + [[0, 3.0]],
    ],
)
def test_weights(tmp_path, weights):
    rows = write_weighted(tmp_path / "rows", weights)
    for opened in (rows, pickle.loads(pickle.dumps(rows))):
        found = [opened.row(index)[0].weights for index in range(len(weights))]
        assert [array.tolist() for array in found] == [[0, 1] if given is None else given for given in weights]
        assert found[0].dtype == np.float32


def test_no_weights_take_no_space(tmp_path):
    rows = write_weighted(tmp_path / "rows", [None, None])
    assert rows.row(0)[0].weights is None
    assert {path.stem for path in (tmp_path / "rows").glob("*.bin")} == set(DTYPES)


def test_damaged_weights(tmp_path):
    write_weighted(tmp_path / "rows", [[0, 2.0]])
    file = tmp_path / "rows" / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match="weights"):
        PackedRows(tmp_path / "rows").check()
    file.unlink()
    with pytest.raises(Damaged, match="weights"):
        PackedRows(tmp_path / "rows")
