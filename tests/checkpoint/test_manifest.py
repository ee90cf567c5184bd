"""Checksums: taken while files are written, checked by blocks, shared out over ranks; any damage is found."""

from __future__ import annotations

import json
import os
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import config, pieces_of_rank, random_weights

from megatron_swift.checkpoint import manifest as manifests
from megatron_swift.checkpoint.checksum import WordSum
from megatron_swift.checkpoint.dcp import Piece, save_pieces
from megatron_swift.checkpoint.layout import tensor_specs
from megatron_swift.checkpoint.manifest import MANIFEST, SummedFiles, Sums, sum_file, verify, write_file, write_manifest
from megatron_swift.checkpoint.publish import publish
from megatron_swift.checkpoint.ranks import single
from megatron_swift.utils.errors import CheckpointError
from megatron_swift.utils.files import digest


def word_sum(data: bytes) -> int:
    total = WordSum()
    total.update(memoryview(data))
    return total.value()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(manifests, "BLOCK", 1000)
    monkeypatch.setattr(manifests, "_READ", 300)


@given(st.lists(st.binary(max_size=2500), max_size=5))
@settings(max_examples=60, deadline=None)
def test_blocks_do_not_depend_on_how_the_bytes_come(tmp_path_factory, parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "BLOCK", 1000)
        patch.setattr(manifests, "_READ", 300)
        sums, data = Sums(), b"".join(parts)
        for part in parts:
            sums.update(part)
        entry = sums.entry()
        assert entry.bytes == len(data)
        assert entry.sums == tuple(word_sum(data[i : i + 1000]) for i in range(0, len(data), 1000))
        path = tmp_path_factory.mktemp("sums") / "file"
        assert write_file(path, data) == entry == sum_file(path)


def test_what_torchs_writer_writes_is_summed_on_the_way(tmp_path):
    cfg = config()
    specs = tensor_specs(cfg)
    pieces = pieces_of_rank(specs, random_weights(specs), 0, 1, num_layers=cfg.num_layers)
    entries = save_pieces(tmp_path, pieces, distributed=False, threads=2)
    assert set(entries) == {".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp"}
    assert entries == {path.name: sum_file(path) for path in tmp_path.iterdir()}


def test_a_file_that_could_not_be_written_has_no_checksum(tmp_path):
    files = SummedFiles()

    def write():
        with files.create_stream(tmp_path / "a", "wb") as stream:
            stream.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert not files.entries


@pytest.mark.parametrize("of", [1, 2, 3, 50])
def test_shares_are_all_of_it_and_even(tmp_path, small_blocks, of):
    sizes = {"big": 20_500, "middle": 3000, "empty": 0, "tiny": 10}
    write_manifest(tmp_path, {name: write_file(tmp_path / name, os.urandom(size)) for name, size in sizes.items()})
    checks = manifests._checks(tmp_path)
    shares = [list(manifests._share(checks, part, of)) for part in range(of)]
    assert sorted(check.size for share in shares for check in share) == sorted([*[1000] * 20, 500, *[1000] * 3, 10])
    loads = [sum(check.size for check in share) for share in shares]
    assert max(loads) - min(loads) <= 1000


def test_a_damaged_block_is_found_by_the_rank_that_has_it(tmp_path, small_blocks):
    data = bytearray(os.urandom(9000))
    write_manifest(tmp_path, {"file": write_file(tmp_path / "file", bytes(data))})
    data[4321] ^= 1
    (tmp_path / "file").write_bytes(data)
    found = 0
    for part in range(4):
        try:
            verify(tmp_path, part=part, of=4)
        except CheckpointError as error:
            found += "file is damaged" in str(error)
    assert found == 1


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "sub/../../secret"])
def test_a_manifest_that_names_files_elsewhere(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    entry = write_file(tmp_path / "secret", b"here")
    write_manifest(folder, {name: entry})
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: .*outside the folder"):
        verify(folder)


def test_manifests_of_the_first_format(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    entry = {"bytes": 10, "blake2b": digest(tmp_path / "file")}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": {"file": entry}}))
    verify(tmp_path)
    (tmp_path / "file").write_bytes(b"Some bytes")
    with pytest.raises(CheckpointError, match="file is damaged"):
        verify(tmp_path)


# Damage


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    run = tmp_path_factory.mktemp("good")
    cfg = config()
    specs = tensor_specs(cfg)
    pieces = pieces_of_rank(specs, random_weights(specs), 0, 1, num_layers=cfg.num_layers)
    return publish(run, 7, lambda staging: save_pieces(staging, pieces, distributed=False), group=single()).folder


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(good, data):
    names = sorted(str(p.relative_to(good)) for p in good.rglob("*") if p.is_file() and p.name != MANIFEST)
    path = good / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    for damaged in (bytes(changed), content[: at // 8], content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged") as error:
            verify(good)
        assert error.value.exit_code == 4
    path.write_bytes(content)
    verify(good)


def test_missing_file(good):
    path = good / "metadata.json"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing"):
        verify(good)
    path.write_bytes(content)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_flipped_bits_of_the_manifest(good, data):
    """Found, unless it turns one white space into another; never another exception."""
    path = good / MANIFEST
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    path.write_bytes(changed)
    try:
        verify(good)
    except CheckpointError as error:
        found = str(error)
    else:
        found = ""
    path.write_bytes(content)
    meaningless = content[at // 8 : at // 8 + 1] in b" \n"
    assert found or meaningless
    assert not found or "use another checkpoint" in found or str(good) in found


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"1", b"{}", b'{"format": 2, "files": []}', b'{"format": 2, "files": {"a": 1}}', b"\xff"]
)
def test_manifest_that_is_none(good, content):
    path = good / MANIFEST
    before = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(good)
    path.write_bytes(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_what_fails_in_a_writer_thread_is_raised(tmp_path, threads, broken):
    """Torch's writer would go on without that thread's file, and publish a folder that lacks tensors."""

    def piece(number):
        def read():
            if number == broken:
                raise MemoryError("no room")
            return torch.ones(4)

        return Piece(f"decoder.{number}.weight", read, torch.float32, (4,), (0,), (4,))

    with pytest.raises(MemoryError, match="no room"):
        save_pieces(tmp_path, [piece(number) for number in range(4)], distributed=False, threads=threads)


def test_manifests_of_the_version_before(tmp_path, small_blocks):
    data = os.urandom(2500)
    (tmp_path / "a").write_bytes(data)
    sums = [zlib.crc32(data[i : i + 1000]) for i in range(0, 2500, 1000)]
    listed = {"format": 2, "files": {"a": {"bytes": 2500, "crc32": sums}}}
    (tmp_path / MANIFEST).write_text(json.dumps(listed))
    verify(tmp_path)
    (tmp_path / "a").write_bytes(data[:2000] + b"!" + data[2001:])
    with pytest.raises(CheckpointError, match="damaged"):
        verify(tmp_path)
