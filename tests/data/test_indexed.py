"""Megatron's indexed data: our bytes are its bytes, both ways, and damage is said."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_swift.data.indexed import IndexedFile, IndexedWriter, files_of, token_dtype
from megatron_swift.utils.errors import DataError

MEGATRON = Path(os.environ.get("MEGATRON_PYTHON") or "/tmp/mcore/bin/python")
DOCUMENTS = [[1, 2, 3], [4], [500, 6]]
# Written by hand from the form that Megatron-Core's IndexedDatasetBuilder writes.
INDEX = (
    b"MMIDIDX\x00\x00" + b"\x01" + bytes(7) + b"\x08" + b"\x03" + bytes(7) + b"\x04" + bytes(7)
    + b"\x03\x00\x00\x00" + b"\x01\x00\x00\x00" + b"\x02\x00\x00\x00"
    + bytes(8) + b"\x06" + bytes(7) + b"\x08" + bytes(7)
    + bytes(8) + b"\x01" + bytes(7) + b"\x02" + bytes(7) + b"\x03" + bytes(7)
)  # fmt: skip
TOKENS = b"\x01\x00\x02\x00\x03\x00\x04\x00\xf4\x01\x06\x00"


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int = 1000) -> Path:
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for group in (documents[:2], documents[2:]):
            lengths = np.array([len(one) for one in group], np.int64)
            writer.add(np.array([token for one in group for token in one], np.int32), lengths)
        assert writer.finish() == len(documents)
    return prefix


def content(file: IndexedFile) -> list[list[int]]:
    return [file.read(number).tolist() for number in range(len(file))]


def test_bytes(tmp_path):
    index, tokens = files_of(write(tmp_path / "новый набор.v1", DOCUMENTS))
    assert index.name == "новый набор.v1.idx"
    assert index.read_bytes() == INDEX
    assert tokens.read_bytes() == TOKENS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([index.name, tokens.name])


def test_reading(tmp_path):
    file = IndexedFile(write(tmp_path / "a", DOCUMENTS))
    for one in (file, pickle.loads(pickle.dumps(file))):
        assert content(one) == DOCUMENTS
        assert one.read(0, 1).tolist() == [2, 3]
        assert one.read(0, 1, 2).tolist() == [2]
        assert one.read(0, 1, 99).tolist() == [2, 3]
        assert one.read(0).dtype == np.int32
        assert one.documents.tolist() == [0, 1, 2, 3]


def test_type_of_tokens(tmp_path):
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("<u2"), np.dtype("<i4"))
    file = IndexedFile(write(tmp_path / "a", [[1, 2], [70_000], [3]], vocab_size=100_000))
    assert file.dtype == np.dtype("<i4")
    assert content(file) == [[1, 2], [70_000], [3]]


def write_half(prefix: Path) -> None:
    with IndexedWriter(prefix, vocab_size=9) as writer:
        writer.add(np.array([1], np.int32), np.array([1]))
        raise KeyboardInterrupt


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def spoil(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("suffix", "at", "value", "said"),
    [
        ("idx", 0, b"PK", "is not an index of Megatron's"),
        ("idx", 9, b"\x02", "has version 2"),
        ("idx", 17, b"\x07", "values of kind 7"),
        ("idx", 17, b"\x63", "values of kind 99"),
        ("idx", 18, b"\x04", "bytes, not the"),
        ("idx", 34, b"\xff\xff\xff\xff", "a sequence has no place"),
        ("idx", 34 + 12 + 8, b"\x05", "a sequence has no place"),
        ("idx", 34 + 12 + 8, b"\x60", "but .* has a sequence that ends at"),
        ("idx", 34 + 12 + 24, b"\x01", "documents are not in order"),
    ],
)
def test_damage(tmp_path, suffix, at, value, said):
    prefix = write(tmp_path / "a", DOCUMENTS)
    spoil(Path(f"{prefix}.{suffix}"), at, value)
    with pytest.raises(DataError, match=said) as caught:
        IndexedFile(prefix)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("size", [0, 5, 20, 33, 34, 40, len(INDEX) - 1])
def test_a_short_index(tmp_path, size):
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(f"{prefix}.idx").write_bytes(INDEX[:size])
    with pytest.raises(DataError, match="is not an index" if size < 34 else "bytes, not the 102") as caught:
        IndexedFile(prefix)
    assert caught.value.why == ("it is shorter than its header" if size < 34 else "it was cut off or is still written")


def test_short_and_missing_tokens(tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(f"{prefix}.bin").write_bytes(TOKENS[:-2])
    with pytest.raises(DataError, match="has 10 bytes"):
        IndexedFile(prefix)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        IndexedFile(prefix)


def test_no_sequences(tmp_path):
    with pytest.raises(DataError, match="no sequences"):
        IndexedFile(write(tmp_path / "a", []))


READ = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset(sys.argv[1])
print(json.dumps([[token.item() for token in data[n]] for n in range(len(data))]))
print(json.dumps([data.document_indices.tolist(), str(data.index.dtype.__name__)]))
"""
WRITE = """
import sys, numpy, torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
builder = IndexedDatasetBuilder(sys.argv[1] + ".bin", dtype=DType.optimal_dtype(int(sys.argv[2])))
for document in [[1, 2, 3], [4], [500, 6]]:
    builder.add_document(torch.tensor(document), [len(document)])
builder.finalize(sys.argv[1] + ".idx")
"""


@pytest.mark.slow
@pytest.mark.skipif(not MEGATRON.is_file(), reason=f"Megatron-Core is not installed: no {MEGATRON} (MEGATRON_PYTHON)")
@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_megatron_reads_ours_and_writes_the_same(tmp_path, vocab_size):
    prefix = write(tmp_path / "ours", DOCUMENTS, vocab_size=vocab_size)
    said = subprocess.run([MEGATRON, "-c", READ, prefix], check=True, capture_output=True, text=True).stdout
    documents, facts = said.splitlines()[-2:]
    assert documents == str(DOCUMENTS)
    assert facts == f'[[0, 1, 2, 3], "{"uint16" if vocab_size == 1000 else "int32"}"]'
    theirs = tmp_path / "theirs"
    subprocess.run([MEGATRON, "-c", WRITE, theirs, str(vocab_size)], check=True, capture_output=True)
    for own, other in zip(files_of(prefix), files_of(theirs), strict=True):
        assert own.read_bytes() == other.read_bytes()
    assert content(IndexedFile(theirs)) == DOCUMENTS
