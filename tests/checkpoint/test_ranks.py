"""Steps that succeed or fail on all ranks alike, and ranks that find out who shares their disk."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_swift.checkpoint.manifest import write_file
from megatron_swift.checkpoint.publish import TRACKER, publish
from megatron_swift.checkpoint.ranks import all_ranks, single, with_disks
from megatron_swift.checkpoint.verify import failure_of
from megatron_swift.testing import run_ranks
from megatron_swift.utils.errors import CheckpointError, StorageError


def _step(rank, place, failing, error):
    dist.init_process_group("gloo")
    group = all_ranks()

    def action():
        if rank in failing:
            raise error
        return rank * 10

    try:
        return group.together(place, action)
    except Exception as raised:
        return type(raised).__name__, str(raised)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), "StorageError", "place: No space left on device"),
        (CheckpointError("its own"), "CheckpointError", "its own"),
        (ValueError("odd"), "StorageError", "failed: ValueError('odd')"),
        (MemoryError(), "OutOfMemoryError", "out of memory: MemoryError"),
        (OSError(12, "Cannot allocate memory"), "OutOfMemoryError", "Cannot allocate memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "OutOfMemoryError", "DefaultCPUAllocator"),
    ],
)
@pytest.mark.parametrize("failing", [(0,), (2,), (1, 2)])
def test_one_fails_all_raise(tmp_path, failing, error, kind, words):
    found = run_ranks(_step, 3, tmp_path / "place", failing, error)
    assert len(set(found)) == 1 and found[0][0] == kind and words in found[0][1]


def test_all_succeed(tmp_path):
    assert run_ranks(_step, 3, tmp_path, (), None) == [[0, 10, 20]] * 3


def _look(rank, folders):
    dist.init_process_group("gloo")
    group = with_disks(all_ranks(), folders[rank])
    return group.peers, group.one_disk, group.leads


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        ("aaa", [((0, 1, 2), True, True), ((0, 1, 2), True, False), ((0, 1, 2), True, False)]),
        ("aab", [((0, 1), False, True), ((0, 1), False, False), ((2,), False, True)]),
        ("aba", [((0, 2), False, True), ((1,), False, True), ((0, 2), False, False)]),
    ],
)
def test_who_shares_my_disk(tmp_path, disks, expected):
    assert run_ranks(_look, 3, [tmp_path / disk / "run" for disk in disks]) == expected
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "b").write_text("a file")
    with pytest.raises(AssertionError, match="StorageError: cannot write to"):
        run_ranks(_look, 2, [tmp_path / "a" / "run", tmp_path / "b" / "run"])


def test_one_process(tmp_path):
    group = with_disks(single(), tmp_path)
    assert group.leads and group.one_disk and group.gather(3) == [3] and group.together(tmp_path, lambda: 4) == [4]


def _publish_apart(rank, folders, damage):
    dist.init_process_group("gloo")
    group = with_disks(all_ranks(), folders[rank])

    def write(staging):
        name = f"part{rank}"
        return {name: write_file(staging / name, b"some bytes")}

    def finish(staging):
        (staging / "sub").mkdir()

    done = publish(folders[rank], 4, write, group=group, finish=finish)
    group.gather(None)
    if rank == damage:
        (done.folder / "part0").write_text("damaged")
    group.gather(None)
    failure = failure_of(done.folder, group)
    return sorted(path.name for path in done.folder.iterdir()), str(failure)


def test_disks_that_are_not_shared(tmp_path):
    """Rank 0's small files are on every disk; nobody has all of the others', which is said of all."""
    folders = [tmp_path / "a", tmp_path / "a"]
    found = run_ranks(_publish_apart, 2, folders, None)
    assert found == [(["manifest.json", "part0", "part1", "sub"], "None")] * 2
    found = run_ranks(_publish_apart, 2, [tmp_path / "b", tmp_path / "c"], None)
    assert {(path / TRACKER).read_text() for path in (tmp_path / "b", tmp_path / "c")} == {"4"}
    assert found[0][1] == found[1][1] and "part1 is missing" in found[0][1]
    assert [[name for name in names if name.startswith("part")] for names, _ in found] == [
        ["part0"],
        ["part0", "part1"],
    ]


def test_damage_on_one_of_two_disks_is_known_to_all(tmp_path):
    found = run_ranks(_publish_apart, 2, [tmp_path / "a", tmp_path / "a"], 1)
    assert all("part0 is damaged" in failure for _, failure in found)


def test_the_error_survives_the_way_between_ranks():
    error = StorageError("what", why="why", do="do")
    with pytest.raises(StorageError) as raised:
        single().together(None, lambda: (_ for _ in ()).throw(error))
    assert raised.value.block() == error.block()
