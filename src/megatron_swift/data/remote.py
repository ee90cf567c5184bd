"""A file at a hub, read by ranges of its bytes, so that none of it has to be on disk and little of it in memory."""

from __future__ import annotations

import http.client
import io
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_swift.data.stamps import Stamp, ends_hash
from megatron_swift.data.web import Refused, Unreachable, open_url, patiently
from megatron_swift.utils.errors import DataError

PIECE = 1 << 20  # bytes fetched at once where a block is read through, and held by its reader
TAIL = 1 << 14  # bytes fetched behind a block's end for the row that reaches over it; doubled until that ends
PAGE = 1 << 17  # bytes: blocks smaller than that are read by pages, which all readers of a process share
PAGES = 128  # of them are held, 16 MiB
CHUNK = 1 << 16
LARGEST_WHOLE = 1 << 26  # bytes of a file that may come whole when a part of it was asked for
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a hub as it was when the hub listed it. May be sent to another process, and compared.

    shown    : its name for people, as in hf::owner/name/train.jsonl.
    size     : bytes.
    identity : the hub's hash of its content, or whatever else the hub has that changes with it.
    headers  : who asks. Never shown.
    """

    shown: str
    url: str
    size: int
    identity: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return self.shown

    @property
    def suffix(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.shown).suffix

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Where the connection breaks it goes on at that byte. DataError where they cannot be had."""
        got = bytearray()
        try:
            patiently(lambda: self._fetch_into(got, start, stop), what=self.shown)
        except Refused as refused:
            if refused.status == 416:
                raise self._changed("it has become shorter") from None
            raise DataError(f"{self} cannot be read", why=str(refused), do=_what_to_do(refused.status)) from None
        except Unreachable as failed:
            raise DataError(
                f"{self} cannot be read",
                why=str(failed),
                do="check the network and start again with --load auto, which goes on at the last checkpoint",
            ) from None
        return bytes(got)

    def _fetch_into(self, got: bytearray, start: int, stop: int) -> None:
        begin = start + len(got)
        if begin >= stop:
            return
        with open_url(self.url, {**dict(self.headers), "Range": f"bytes={begin}-{stop - 1}"}) as answer:
            skip = self._check(answer, begin)
            while skip:
                skip -= len(_some(answer, skip))
            while len(got) < stop - start:
                got += _some(answer, stop - start - len(got))

    def _check(self, answer: http.client.HTTPResponse, begin: int) -> int:
        """How many bytes of the answer come before byte `begin`. DataError where the file is no longer what was listed."""
        said = answer.headers
        if said.get("Content-Encoding", "identity") != "identity":
            raise DataError(f"{self} cannot be read by ranges", why="the server compresses it", do=FETCH)
        tag = said.get("ETag", "").removeprefix("W/").strip('"')
        if len(tag) == len(self.identity) and re.fullmatch("[0-9a-f]{40,}", tag) and tag != self.identity:
            raise self._changed("its content is another one")
        if answer.status == 206:
            place = RANGE.match(said.get("Content-Range", ""))
            if place is None or int(place[1]) != begin:
                raise ConnectionError("the server sent another part than the one asked for")
            size = place[3]
        else:
            size = said.get("Content-Length", "*")
        if size != "*" and int(size) != self.size:
            raise self._changed(f"it has {size} bytes, not {self.size}")
        if answer.status == 206:
            return 0
        if self.size > LARGEST_WHOLE:
            raise DataError(f"{self} cannot be read by ranges", why="the server sends nothing but the whole", do=FETCH)
        return begin

    def _changed(self, why: str) -> DataError:
        return DataError(
            f"{self} has changed since it was listed", why=why, do="start again, with the files as they are now"
        )

    def open(self, start: int = 0, stop: int | None = None) -> io.BufferedReader:
        """A reader for [start, stop) and the rest of the line that reaches over it; other bytes can be read, too.

        It fetches and holds no more than PIECE bytes at once.
        """
        end = self.size if stop is None else stop
        tail = min(TAIL, (end - start) // 8 + 1)
        reader = _Ranges(self, by_pages=end - start < PAGE, stop=min(end + tail, self.size))
        reader.seek(start)
        return io.BufferedReader(reader, max(min(end - start + tail + 1, PIECE), io.DEFAULT_BUFFER_SIZE))

    def random_access(self) -> io.RawIOBase:
        """A reader that fetches exactly what it is asked for, but pages of a small file."""
        return _Ranges(self, by_pages=self.size <= PAGE * PAGES, stop=self.size)


AnyFile = Path | RemoteFile
FETCH = "download the data set and give its folder"


def _what_to_do(status: int) -> str:
    if status in (401, 403):
        return "give a token that may read it: --hub_token"
    return "start again: the data set may have changed since its files were listed"


def _some(answer: http.client.HTTPResponse, most: int) -> bytes:
    found = answer.read(min(most, CHUNK))
    if not found:
        raise ConnectionError("the connection broke off")
    return found


class _Ranges(io.RawIOBase):
    """Reads past `stop`, to which it does not fetch ahead, are small at first."""

    def __init__(self, file: RemoteFile, *, by_pages: bool, stop: int) -> None:
        self.file, self.by_pages, self.stop = file, by_pages, stop
        self.at, self.step = 0, TAIL

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fewer bytes than there is room for only at `stop` and at the file's end."""
        view = memoryview(buffer).cast("B")
        if self.at < self.stop:
            limit = self.stop
        else:
            limit, self.step = min(self.at + self.step, self.file.size), self.step * 2
        stop = min(self.at + len(view), limit)
        count = max(stop - self.at, 0)
        if self.by_pages:
            first, last = self.at // PAGE, -(-stop // PAGE)
            found = b"".join(_page(self.file, number) for number in range(first, last)) if count else b""
            found = found[self.at - first * PAGE :][:count]
        else:
            found = self.file.fetch(self.at, stop) if count else b""
        view[:count] = found
        self.at += count
        return count


@lru_cache(maxsize=PAGES)
def _page(file: RemoteFile, number: int) -> bytes:
    return file.fetch(number * PAGE, min((number + 1) * PAGE, file.size))


def stamp_of(file: AnyFile) -> Stamp:
    """What tells that a file on disk is still the same. One at a hub is looked at whenever some of it is fetched."""
    return Stamp(file.size, 0, 0) if isinstance(file, RemoteFile) else Stamp.of(file)


def content_of(file: AnyFile) -> tuple[int, str]:
    """Bytes of a file, and what is another value for another content, without reading it all."""
    return (file.size, file.identity) if isinstance(file, RemoteFile) else ends_hash(file)
