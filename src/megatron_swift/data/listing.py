"""What files a data set at a hub has, and those of them that can be read where they are."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus, urlsplit

from megatron_swift.data.hub import CARD, LARGEST_CARD, NOT_DATA, TITLES, Hub, HubName, ask_the_other, card_configs
from megatron_swift.data.readers import GLANCE, READERS, holds_lines
from megatron_swift.data.remote import AnyFile, RemoteFile
from megatron_swift.data.web import Refused, Unreachable, get
from megatron_swift.utils.errors import DataError, UsageError
from megatron_swift.utils.log import get_logger

ENDPOINTS = {
    "hf": ("HF_ENDPOINT", "https://huggingface.co"),
    "ms": ("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn"),
}
LARGEST_LIST = 1 << 28  # bytes of one answer
PAGE_SIZE = 200  # files of a page at ModelScope
DESCRIPTIONS = 16  # of a folder's files that may be ModelScope's description of it, so many are looked into


class Listing(NamedTuple):
    """A data set's files at a hub, by their paths in it: those that may hold rows, and README.md. revision: "" if it has none."""

    name: str
    hub: HubName
    revision: str
    files: Mapping[str, RemoteFile]

    @contextmanager
    def skeleton(self) -> Iterator[Path]:
        """A folder with all files, empty but for those that describe the others, as long as it is needed."""
        with tempfile.TemporaryDirectory(prefix="megatron_swift_") as parent:
            folder = Path(parent) / self.name.replace("/", "--")
            for path in self.files:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
            self._fill(folder, [CARD])
            if self.files and not card_configs(folder):
                self._fill(folder, self._descriptions())
            yield folder

    def _fill(self, folder: Path, paths: Sequence[str]) -> None:
        for path in paths:
            file = self.files.get(path)
            if file is not None and 0 < file.size <= LARGEST_CARD:
                (folder / path).write_bytes(file.fetch(0, file.size))

    def _descriptions(self) -> list[str]:
        found = [path for path in self.files if "/" not in path and path.lower().endswith(".json")]
        found = [path for path in found if path not in NOT_DATA and self.files[path].size <= LARGEST_CARD]
        if len(found) <= DESCRIPTIONS:
            return found
        return [path for path in found if path == f"{self.name.rpartition('/')[2]}.json"]

    def take(self, paths: Sequence[str], hub: Hub, *, flag: str) -> dict[str, AnyFile]:
        """Files to read from, by their paths: at the hub, or those fetched whole that need an index of all their rows."""
        whole = [path for path in dict.fromkeys(paths) if not _by_ranges(self.files[path])]
        taken: dict[str, AnyFile] = {path: self.files[path] for path in paths}
        if whole:
            get_logger().info(
                "%s: %d of %d files are fetched whole, for .csv and arrays in .json cannot be read in parts: %s%s",
                flag, len(whole), len(taken), ", ".join(whole[:3]), ", …" if len(whole) > 3 else "",
            )  # fmt: skip
            folder = hub.fetch(self.name, self.hub, flag=flag, only=whole, revision=self.revision or None)
            taken.update({path: folder / path for path in whole})
        rest = [file.size for path, file in self.files.items() if path in taken and path not in whole]
        if rest:
            size = f"{sum(rest) / 1e6:.1f} MB"
            get_logger().info("%s: %d files, %s, are read over the network while training", flag, len(rest), size)
        return taken


def _by_ranges(file: RemoteFile) -> bool:
    suffix = file.suffix.lower()
    return suffix != ".csv" and (suffix != ".json" or holds_lines(file.fetch(0, min(file.size, GLANCE))))


def list_files(name: str, which: HubName, hub: Hub, *, flag: str) -> Listing:
    """The files of data set `name` as they are now. DataError where the hub does not tell; `flag` is what the user typed."""
    endpoint, headers = _endpoint(which), hub.headers(which)
    get_logger().info("%s: asking %s what files it has", flag, TITLES[which])
    try:
        return (_list_hugging_face if which == "hf" else _list_modelscope)(name, endpoint, headers)
    except Refused as error:
        why, secret = str(error), error.status in (401, 403)
    except Unreachable as error:
        why, secret = str(error), False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why, secret = f"its answer is not understood: {error!r}", False
    other = ask_the_other(which)
    do = f"check the name and the network, or {other}"
    if secret:
        do = f"check the name; for a private or gated data set give --hub_token; or {other}"
    raise DataError(f"{flag}: {name} cannot be listed at {TITLES[which]}", why=why, do=do) from None


def _endpoint(which: HubName) -> str:
    variable, usual = ENDPOINTS[which]
    endpoint = (os.environ.get(variable) or usual).strip().rstrip("/")
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise UsageError(f"{variable}={endpoint} is not a web address", do=f"set it to something like {usual}")
    return endpoint


def _list_hugging_face(name: str, endpoint: str, headers: Mapping[str, str]) -> Listing:
    """Addresses name the revision, so that what is read stays what was listed."""
    url = f"{endpoint}/api/datasets/{name}/revision/main?blobs=true"
    answer = json.loads(get(url, headers, what=f"hf::{name}", most=LARGEST_LIST))
    revision = str(answer["sha"])
    files: dict[str, RemoteFile] = {}
    for entry in answer["siblings"]:
        path, lfs = str(entry["rfilename"]), entry.get("lfs") or {}
        if _wanted(path):
            where = f"{endpoint}/datasets/{name}/resolve/{quote(revision, safe='')}/{quote(path)}"
            size, identity = int(lfs.get("size", entry.get("size"))), str(lfs.get("sha256") or entry["blobId"])
            files[path] = RemoteFile(f"hf::{name}/{path}", where, size, identity, tuple(headers.items()))
    return Listing(name, "hf", revision, files)


def _list_modelscope(name: str, endpoint: str, headers: Mapping[str, str]) -> Listing:
    """Of the branch master: the hub's own library does not know how to name a revision there, either."""
    files: dict[str, RemoteFile] = {}
    seen: set[str] = set()
    number = 1
    while True:
        place = f"Revision=master&Recursive=True&PageNumber={number}&PageSize={PAGE_SIZE}"
        url = f"{endpoint}/api/v1/datasets/{name}/repo/tree?{place}"
        answer: Any = json.loads(get(url, headers, what=f"ms::{name}", most=LARGEST_LIST))
        if answer.get("Success") is False or answer.get("Code", 200) not in (200, "200", None):
            raise Refused(int(answer["Code"]), str(answer.get("Message", "")))
        data = answer.get("Data", answer)
        entries = data if isinstance(data, list) else data.get("Files") or []
        paths = {str(entry.get("Path") or entry["Name"]) for entry in entries}
        for entry in entries:
            path = str(entry.get("Path") or entry["Name"])
            if entry.get("Type") != "tree" and _wanted(path):
                where = f"{endpoint}/api/v1/datasets/{name}/repo?Revision=master&FilePath={quote_plus(path)}"
                identity = next((str(entry[key]) for key in ("Sha256", "BlobId", "Id") if entry.get(key)), "")
                files[path] = RemoteFile(
                    f"ms::{name}/{path}", where, int(entry["Size"]), identity, tuple(headers.items())
                )
        if len(entries) < PAGE_SIZE or paths <= seen:
            return Listing(name, "ms", "", files)
        seen |= paths
        number += 1


def _wanted(path: str) -> bool:
    """Whether a file may hold rows or is the card, and has a path that stays inside a folder."""
    parts = PurePosixPath(path).parts
    inside = bool(path) and not path.startswith("/") and ".." not in parts and "\0" not in path and "\\" not in path
    return inside and (path == CARD or PurePosixPath(path).suffix.lower() in READERS)
