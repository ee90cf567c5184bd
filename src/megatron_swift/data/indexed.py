"""Megatron's indexed data sets: tokens of documents in PREFIX.bin, where each of them lies in PREFIX.idx.

The form, as Megatron-Core 0.16.1 reads and writes it (all little-endian): the magic, uint64 version 1, uint8 code of the tokens' type,
uint64 number of sequences, uint64 number of document marks, int32 length of each sequence in tokens, int64 place of each in bytes, and
int64 marks: the number of the first sequence of each document, then the number of sequences. One byte a sequence may follow (modes).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_swift.data.stamps import Stamp
from megatron_swift.utils.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
WHOLE = {1, 2, 3, 4, 5, 8}  # those that are token numbers
SMALL = 65500  # Megatron's bound: vocabularies below it fit into uint16
AGAIN = "make the data set again, or copy both files anew"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron's own tools choose for tokens of a vocabulary."""
    return np.dtype("<u2" if vocab_size < SMALL else "<i4")


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """PREFIX.idx and PREFIX.bin; a prefix may have dots in it."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


class IndexedFile:
    """The sequences of one indexed data set, memory-mapped. May be sent to another process, which opens it anew.

    lengths   : int32 [sequences], tokens of each.
    documents : int64 [documents + 1], the number of each one's first sequence.
    """

    def __init__(self, prefix: str | Path) -> None:
        """DataError where a file is missing, is no such file, or does not hold what its header says."""
        self.prefix = str(prefix)
        index, tokens = files_of(prefix)
        self.stamps = Stamp.of(index), Stamp.of(tokens)
        self.dtype, sequences, marks = _read_header(index)
        begin = HEADER.size
        expected = begin + sequences * 12 + marks * 8
        if self.stamps[0].size not in (expected, expected + sequences):
            raise DataError(
                f"{index} has {self.stamps[0].size} bytes, not the {expected} that its {sequences} sequences need",
                why="it was cut off or is still written",
                do=AGAIN,
            )
        raw = np.memmap(index, np.uint8, "r").view(np.ndarray)
        self.lengths = raw[begin : begin + 4 * sequences].view("<i4")
        self._places = raw[begin + 4 * sequences : begin + 12 * sequences].view("<i8")
        self.documents = raw[begin + 12 * sequences : expected].view("<i8")
        self._check(index, tokens)
        empty = not self.stamps[1].size
        self._tokens = np.zeros(0, self.dtype) if empty else np.memmap(tokens, self.dtype, "r").view(np.ndarray)

    def _check(self, index: Path, tokens: Path) -> None:
        size, width = self.stamps[1].size, self.dtype.itemsize
        if not len(self.lengths):
            raise DataError(f"{index} has no sequences", do=AGAIN)
        ends = self._places + self.lengths.astype(np.int64) * width
        if (self.lengths < 0).any() or (self._places < 0).any() or (self._places % width).any() or size % width:
            raise DataError(f"{index} is damaged: a sequence has no place in {tokens}", do=AGAIN)
        if int(ends.max()) > size:
            raise DataError(
                f"{tokens} has {size} bytes, but {index} has a sequence that ends at {int(ends.max())}",
                why="it was cut off, is still written, or belongs to another index",
                do=AGAIN,
            )
        marks = self.documents
        if not len(marks) or marks[0] != 0 or marks[-1] != len(self.lengths) or (np.diff(marks) < 0).any():
            raise DataError(f"{index} is damaged: its documents are not in order", do=AGAIN)

    def __reduce__(self) -> tuple:
        return (IndexedFile, (self.prefix,))

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens [begin, end) of a sequence, int32; end None is its end."""
        length = int(self.lengths[index])
        end = length if end is None else min(end, length)
        start = int(self._places[index]) // self.dtype.itemsize
        return self._tokens[start + begin : start + end].astype(np.int32)


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    with index.open("rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise DataError(
            f"{index} is not an index of Megatron's",
            why="it is shorter than its header"
            if MAGIC.startswith(raw[: len(MAGIC)])
            else "its first bytes are others",
            do="give the path without .idx and .bin, of a data set that Megatron's preprocess_data or we wrote",
        )
    _, version, code, sequences, marks = HEADER.unpack(raw)
    if version != 1:
        raise DataError(f"{index} has version {version}", why="version 1 is known", do=AGAIN)
    if code not in WHOLE:
        raise DataError(f"{index} holds values of kind {code}, which are no tokens", do=AGAIN)
    return np.dtype(CODES[code]), sequences, marks


class IndexedWriter:
    """Writes an indexed data set, byte for byte as Megatron's IndexedDatasetBuilder does where each document is one sequence.

    Both files appear under their names when all is written, the index last.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.index, self.tokens = files_of(prefix)
        self.dtype = token_dtype(vocab_size)
        self.tokens.parent.mkdir(parents=True, exist_ok=True)
        self._draft = self.tokens.with_name(f".{self.tokens.name}.{os.getpid()}")
        self._file: BinaryIO = self._draft.open("wb")
        self._lengths: list[np.ndarray] = []

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self._file.close()
        if kind is not None:
            self._draft.unlink(missing_ok=True)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after another, and how many each has."""
        assert len(ids) == lengths.sum(), (len(ids), lengths.sum())
        self._file.write(np.ascontiguousarray(ids, self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))

    def finish(self) -> int:
        """Write the index and give both files their names; the number of documents."""
        lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths]).astype("<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        draft = self.index.with_name(f".{self.index.name}.{os.getpid()}")
        with draft.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(np.concatenate([np.zeros(1, "<i8"), ends])[:-1].astype("<i8").data)
            file.write(np.arange(len(lengths) + 1, dtype="<i8").data)
            file.flush()
            os.fsync(file.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.index.unlink(missing_ok=True)  # an old index must not stand beside new tokens
        self._draft.replace(self.tokens)
        draft.replace(self.index)
        return len(lengths)
