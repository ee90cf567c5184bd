"""Encoded rows on disk: memory-mapped, checked when opened, built once, and never seen half written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_swift.data.stamps import tree_stamps
from megatron_swift.data.types import IGNORE, Sample
from megatron_swift.utils.errors import StorageError
from megatron_swift.utils.log import get_logger

FORMAT = 2
META = "meta.json"
DTYPES = {"ids": "<i4", "labels": "<i4", "offsets": "<i8", "trained": "<i4", "packs": "<i8", "members": "<i8"}
WEIGHTS, WEIGHTS_DTYPE = "weights", "<f4"  # one more array, where some sample has weights
BLOCK = 1 << 24


class Damaged(Exception):
    """A cache that is incomplete or altered: build it again."""


class PackedRows:
    """Rows of one or more samples each, read from disk when asked. May be sent to another process, which opens it anew.

    num_tokens, num_trained : over all rows, a sample counted as often as rows hold it.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `RowWriter` wrote. Damaged where a file is missing or has the wrong size."""
        self.folder = folder
        self.meta = read_checked(folder / META)
        if self.meta["format"] != FORMAT:
            raise Damaged(f"{folder} has another format")
        arrays = {name: self._map(name, dtype) for name, dtype in DTYPES.items()}
        self._ids, self._labels, self._offsets = arrays["ids"], arrays["labels"], arrays["offsets"]
        self._trained, self._packs, self._members = arrays["trained"], arrays["packs"], arrays["members"]
        weighted = WEIGHTS in self.meta["arrays"]
        self._weights = self._map(WEIGHTS, WEIGHTS_DTYPE) if weighted else None
        self.num_tokens: int = self.meta["num_tokens"]
        self.num_trained: int = self.meta["num_trained"]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        entry = self.meta["arrays"][name]
        path = self.folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise Damaged(f"{path} is missing or has the wrong size")
        # A plain view, because slicing np.memmap itself is ten times slower.
        return np.memmap(path, dtype, "r").view(np.ndarray) if entry["bytes"] else np.empty(0, dtype)

    def check(self) -> None:
        """Read everything and compare with the checksums; Damaged where they differ."""
        for name, entry in self.meta["arrays"].items():
            if file_checksum(self.folder / f"{name}.bin") != entry["crc32"]:
                raise Damaged(f"{self.folder / name}.bin has changed")

    def __reduce__(self) -> tuple:
        return (PackedRows, (self.folder,))

    def __len__(self) -> int:
        return len(self._packs) - 1

    def row(self, index: int) -> list[Sample]:
        """The samples of row `index` as read-only views."""
        samples = []
        for member in self._members[self._packs[index] : self._packs[index + 1]]:
            cut = slice(int(self._offsets[member]), int(self._offsets[member + 1]))
            weights = self._weights[cut] if self._weights is not None else None
            samples.append(Sample(self._ids[cut], self._labels[cut], weights))
        return samples

    @property
    def row_tokens(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.add.reduceat(np.diff(self._offsets)[self._members], self._packs[:-1])

    @property
    def sample_tokens(self) -> np.ndarray:
        """Tokens of each sample in the order of the rows, int64 [samples of all rows]."""
        return np.diff(self._offsets)[self._members]


class RowWriter:
    """Writes the files of a PackedRows: first the samples, chunk by chunk, then which row holds which."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, BinaryIO] = {name: self._open(name) for name in DTYPES}
        self._lengths: list[np.ndarray] = []  # int32: with a million rows and more it counts
        self._end = 0
        self._write("offsets", np.zeros(1))

    def _open(self, name: str) -> BinaryIO:
        return (self.folder / f"{name}.bin").open("wb")

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def add(
        self,
        *,
        ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        """Append samples.

        ids, labels, weights : [sum of lengths]; weights None is 1 where trained and 0 elsewhere.
        lengths, trained     : [samples], tokens and trained tokens of each.
        """
        if weights is not None and WEIGHTS not in self._files:
            self._files[WEIGHTS] = self._open(WEIGHTS)
            self._weigh_alike()
        self._write("ids", ids)
        self._write("labels", labels)
        if WEIGHTS in self._files:
            self._write(WEIGHTS, labels != IGNORE if weights is None else weights)
        self._write("offsets", self._end + np.cumsum(lengths))
        self._write("trained", trained)
        self._lengths.append(lengths.astype(np.int32))
        self._end += int(lengths.sum())

    def _weigh_alike(self) -> None:
        """Write the weights of the samples so far, which have none of their own."""
        self._files["labels"].flush()
        with (self.folder / "labels.bin").open("rb") as file:
            while block := file.read(BLOCK):
                self._write(WEIGHTS, np.frombuffer(block, DTYPES["labels"]) != IGNORE)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample so far, int32 [samples]."""
        if len(self._lengths) != 1:
            self._lengths = [np.concatenate([np.zeros(0, np.int32), *self._lengths])]
        return self._lengths[0]

    def count_trained(self, members: np.ndarray) -> int:
        """Trained tokens of these samples together."""
        if not len(members):
            return 0
        self._files["trained"].flush()
        trained = np.memmap(self.folder / "trained.bin", DTYPES["trained"], "r")
        return int(trained[members].sum(dtype=np.int64))

    def finish(self, *, members: np.ndarray, sizes: np.ndarray) -> None:
        """Write which samples each row holds, then the description, all flushed to disk.

        sizes : samples in each row. members : int [sum of sizes], the samples of all rows one after another.
        """
        num_trained = self.count_trained(members)
        self._write("packs", np.concatenate([[0], np.cumsum(sizes)]))
        self._write("members", members)
        arrays = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            arrays[name] = {"bytes": file.tell(), "crc32": file_checksum(self.folder / f"{name}.bin")}
        meta = {
            "format": FORMAT,
            "rows": len(sizes),
            "samples": len(self.lengths),
            "num_tokens": int(self.lengths[members].sum(dtype=np.int64)),
            "num_trained": num_trained,
            "arrays": arrays,
        }
        write_checked(self.folder / META, meta)

    def _write(self, name: str, values: np.ndarray) -> None:
        dtype = WEIGHTS_DTYPE if name == WEIGHTS else DTYPES[name]
        self._files[name].write(np.ascontiguousarray(values, dtype).data)


def write_checked(path: Path, value: Any) -> None:
    """Write `value` as JSON with a checksum, flushed to disk."""
    text = json.dumps(value)  # ASCII only: file names may hold bytes that are not UTF-8
    with path.open("w", encoding="ascii") as file:
        file.write(f"{_text_checksum(text)}\n{text}\n")
        file.flush()
        os.fsync(file.fileno())


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote; Damaged where it is missing or altered."""
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__})") from None
    if checksum != _text_checksum(text.removesuffix("\n")):
        raise Damaged(f"{path} has changed")
    return json.loads(text)


def _text_checksum(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total = zlib.crc32(block, total)
    return total


def default_cache_dir() -> Path:
    """MEGATRON_SWIFT_CACHE, else ~/.cache/megatron_swift."""
    return Path(os.environ.get("MEGATRON_SWIFT_CACHE") or Path.home() / ".cache" / "megatron_swift")


class Entry(NamedTuple):
    """A published cache entry and whether it was there before."""

    folder: Path
    hit: bool


def build_once(
    cache_dir: Path,
    key: str,
    *,
    build: Callable[[Path], None],
    check: Callable[[Path], None],
    use_cache: bool = True,
    why: Callable[[], str] = str,
) -> Entry:
    """The folder cache_dir/key, made by `build` unless `check` accepts the one that is there (it raises Damaged).

    Several processes may call this at once: one builds, the others wait and find it. `build` fills a staging folder
    that is renamed when it is complete, so an interrupted build leaves no entry. use_cache False builds in any case.
    An entry whose files are still those that were checked last, by size, times and inode, is not checked again.

    why : what to say about a miss, asked only then.
    """
    log = get_logger()
    final = cache_dir / key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{key}.lock"):
            if use_cache and _accepts(final, check):
                log.info("data cache: hit %s in %s", key, cache_dir)
                return Entry(final, True)
            reason = f": {text}" if use_cache and not final.is_dir() and (text := why()) else ""
            log.info("data cache: %s %s in %s%s", "miss" if use_cache else "not used, building", key, cache_dir, reason)
            for stale in cache_dir.glob(f".{key}.*"):  # left by a build that was killed: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            staging = cache_dir / f".{key}.{uuid.uuid4().hex[:8]}"
            staging.mkdir()
            try:
                build(staging)
                _publish(staging, final)
                _note_checked(final)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return Entry(final, False)
    except OSError as error:
        raise StorageError(
            f"the data cache {final} cannot be built",
            why=str(error),
            do="free space there, or choose another folder with the environment variable MEGATRON_SWIFT_CACHE",
        ) from error


def _accepts(final: Path, check: Callable[[Path], None]) -> bool:
    if not final.is_dir():
        return False
    if _checked_before(final):
        return True
    try:
        check(final)
    except Damaged as error:
        get_logger().warning("data cache: %s; building it again", error)
        return False
    _note_checked(final)
    return True


def _stamps_file(final: Path) -> Path:
    return final.with_name(f"{final.name}.checked")


def _checked_before(final: Path) -> bool:
    try:
        known = read_checked(_stamps_file(final))
    except Damaged:  # or absent
        return False
    return bool(known == tree_stamps(final))


def _note_checked(final: Path) -> None:
    draft = _stamps_file(final).with_suffix(f".{uuid.uuid4().hex[:8]}")
    write_checked(draft, tree_stamps(final))
    draft.replace(_stamps_file(final))


def _publish(staging: Path, final: Path) -> None:
    """Put `staging` in the place of `final`; a process that has the old files mapped keeps them."""
    _sync_folder(staging)
    if final.exists():
        trash = staging.with_name(f"{staging.name}.old")
        final.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    staging.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file, waiting for it if need be. The kernel frees it when the holder dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            get_logger().info("data cache: another process builds %s, waiting for it", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
