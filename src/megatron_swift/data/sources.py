"""Data set strings to tables of rows."""

from __future__ import annotations

import bisect
import importlib.resources
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_swift.data.hub import Hub, HubName, choose_files
from megatron_swift.data.listing import list_files
from megatron_swift.data.messages import RowError
from megatron_swift.data.plugins import load_plugins
from megatron_swift.data.readers import READERS, RowFile, open_file
from megatron_swift.data.registry import (
    REGISTRY,
    Fixup,
    Identity,
    Registered,
    Row,
    Subset,
    find_registered,
    read_dataset_info,
)
from megatron_swift.data.remote import AnyFile
from megatron_swift.utils.errors import DataError, UsageError

UNWANTED = "not wanted by its data set"  # the reason of a row for which a fixup gives None
IDENTITY_ASSET = "self_cognition.jsonl"
MOST_OPEN = 64  # files of a table held open: a folder may have more than a process may open


class Request(NamedTuple):
    """What a data set string asks for.

    value   : the string as the user typed it.
    name    : a path that exists or a hub id.
    subsets : names after the colon.
    limit   : the number after #, or None.
    prefix  : "hf::", "ms::" or "".
    """

    value: str
    name: str
    subsets: tuple[str, ...] = ()
    limit: int | None = None
    prefix: str = ""


def parse_dataset(value: str, *, flag: str = "--dataset") -> Request:
    """Read `[hf::|ms::]id|dir|file[:subset1/subset2][#N]`; a string that exists on disk is taken literally."""
    if not value.strip():
        raise UsageError(f"{flag} has an empty value", do="give a file, a folder or a data set's name")
    if os.path.exists(os.path.expanduser(value)):
        return Request(value, os.path.expanduser(value))
    prefix = next((one for one in ("hf::", "ms::") if value.startswith(one)), "")
    name = value.removeprefix(prefix)
    limit = None
    if "#" in name and not os.path.exists(os.path.expanduser(name)):
        name, _, number = name.rpartition("#")
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise UsageError(
                f"{flag} {value}: {number!r} after # is not a number of rows", do="write for example FILE#500"
            )
        limit = int(number)
    subsets: tuple[str, ...] = ()
    if not os.path.exists(os.path.expanduser(name)) and ":" in name:
        name, _, subset = name.partition(":")
        subsets = tuple(part for part in subset.split("/") if part)
    if os.path.exists(os.path.expanduser(name)):
        name = os.path.expanduser(name)
    return Request(value, name, subsets, limit, prefix)


@dataclass(frozen=True)
class Lookup:
    """Where names of data sets are looked up: the entries in order, then the hub."""

    hub: Hub = field(default_factory=Hub)
    entries: tuple[Registered, ...] = REGISTRY


def make_lookup(
    *,
    use_hf: bool = False,
    hub_token: str | None = None,
    download_mode: str = "reuse_dataset_if_exists",
    custom_dataset_info: Sequence[str] = (),
    custom_register_path: Sequence[str] = (),
) -> Lookup:
    """The lookup that the parameters of these names ask for; the user's own data sets come before ours."""
    own = load_plugins(custom_register_path).datasets
    described = tuple(entry for file in custom_dataset_info for entry in read_dataset_info(file))
    hub = Hub(use_hf, hub_token, download_mode == "force_redownload")
    return Lookup(hub, (*own, *described, *REGISTRY))


class Source(NamedTuple):
    """A data set string resolved to files, before any row is read.

    parts      : (file, subset) pairs in order; a file is read once for each subset that it holds.
    registered : the entry whose subsets these are, or None.
    at_hub     : instead of `parts` where the files are left at a hub; some of them may have been fetched all the same.
    """

    request: Request
    parts: tuple[tuple[Path, Subset], ...]
    registered: Registered | None
    at_hub: tuple[tuple[AnyFile, Subset], ...] = ()

    @property
    def files(self) -> tuple[tuple[AnyFile, Subset], ...]:
        """`at_hub`, else `parts`."""
        return self.at_hub or self.parts

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, each once, in order."""
        return tuple(dict.fromkeys(path for path, _ in self.parts))

    @property
    def needs_identity(self) -> bool:
        """True where rows have placeholders for a name and an author."""
        return self.registered is not None and self.registered.asset == IDENTITY_ASSET


def find_source(
    value: str, *, lookup: Lookup | None = None, flag: str = "--dataset", streaming: bool = False
) -> Source:
    """The files behind a data set string, fetched from a hub where they are on none of our disks; or, streaming, left there.

    `flag` is the parameter it was given to, for messages. DataError where there are no files; UsageError for an unknown
    subset, or where the package is missing that could fetch them.
    """
    lookup = lookup or Lookup()
    request = parse_dataset(value, flag=flag)
    said = f"{flag} {value}"
    path = Path(request.name)
    exact = next((one for one in lookup.entries if request.name.lower() in [name.lower() for name in one.names]), None)
    # The last component of a name is enough for a local copy, and for another owner's copy at a hub.
    last = path.stem if path.suffix.lower() in READERS else path.name
    alike = exact or find_registered(last, lookup.entries)
    if path.exists():
        return Source(request, _local(path, alike or Registered(path=request.name), request, said), alike)
    if exact and exact.path:
        path = Path(exact.path)
        if not path.exists():
            raise DataError(f"{said}: {path} does not exist", why="that is where it is registered to be")
        return Source(request, _local(path, exact, request, said), exact)
    if exact and exact.asset:
        asset = Path(str(importlib.resources.files("megatron_swift.data") / "assets" / exact.asset))
        return Source(request, tuple((asset, subset) for subset in _known_subsets(exact, request, said)), exact)
    name, which = _at_hub(exact, alike, request, lookup.hub, said)
    entry = alike or Registered(ms=name)
    subsets = entry.choose(request.subsets, flag=said)
    if not request.subsets and subsets[0].name == "default":
        subsets = (replace(subsets[0], config=""),)
    if streaming and not lookup.hub.offline(which):
        return Source(request, (), alike, _left_there(name, which, entry, subsets, lookup.hub, said))
    folder = lookup.hub.fetch(name, which, flag=said)
    return Source(request, _in_folder(folder, entry, subsets, said), alike)


def _known_subsets(entry: Registered, request: Request, said: str) -> tuple[Subset, ...]:
    """The subsets, where only those that are registered can be had."""
    known = [subset.name for subset in entry.subsets]
    for name in request.subsets:
        if name not in known and request.subsets != ("all",):
            choices = f"choose {', '.join(known)}" if known != ["default"] else "leave it out: this data set has none"
            raise UsageError(f"{said}: there is no subset {name!r}", do=choices)
    return entry.choose(request.subsets, flag=said) if request.subsets else (_default_subset(entry),)


def _default_subset(entry: Registered) -> Subset:
    """What a file or folder of ours without a subset's name is: "default", else the first one."""
    return next((subset for subset in entry.subsets if subset.name == "default"), entry.subsets[0])


def _local(path: Path, entry: Registered, request: Request, said: str) -> tuple[tuple[Path, Subset], ...]:
    if path.is_dir():
        if request.subsets:
            return _in_folder(path, entry, entry.choose(request.subsets, flag=said), said)
        return _in_folder(path, entry, [replace(_default_subset(entry), config="")], said)
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{said}: files of kind {path.suffix or 'no suffix'!r} cannot be read",
            do=f"convert it to {' or '.join(READERS)}",
        )
    return tuple((path, subset) for subset in _known_subsets(entry, request, said))


def _in_folder(
    folder: Path, entry: Registered, subsets: Sequence[Subset], said: str
) -> tuple[tuple[Path, Subset], ...]:
    parts: list[tuple[Path, Subset]] = []
    for subset in subsets:
        config = subset.config if subset.config is not None else subset.name
        files = choose_files(folder, subset=config, splits=subset.splits or entry.splits, flag=said)
        parts += [(file, subset) for file in files]
    return tuple(parts)


def _at_hub(
    exact: Registered | None, alike: Registered | None, request: Request, hub: Hub, said: str
) -> tuple[str, HubName]:
    """The data set's name at the hub to ask, and that hub."""
    name = request.name
    which = hub.choose(request.prefix)
    if exact:
        ids = {"ms": exact.ms, "hf": exact.hf}
        if not ids[which] and not request.prefix:
            which = "hf" if which == "ms" else "ms"
        name = ids[which] or name
    elif Path(name).suffix.lower() in (*READERS, ".arrow") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        meant = f", or write {alike.names[0]}" if alike else ""
        raise DataError(f"{said}: {name} does not exist", do=f"check the path{meant}")
    return name, which


def _left_there(
    name: str, which: HubName, entry: Registered, subsets: Sequence[Subset], hub: Hub, said: str
) -> tuple[tuple[AnyFile, Subset], ...]:
    listing = list_files(name, which, hub, flag=said)
    with listing.skeleton() as folder:
        parts = _in_folder(folder, entry, subsets, said)
    paths = [path.relative_to(folder).as_posix() for path, _ in parts]
    files = listing.take(paths, hub, flag=said)
    return tuple((files[path], subset) for path, (_, subset) in zip(paths, parts, strict=True))


def fixed(fixup: Fixup, row: Row, identity: Identity) -> Row:
    """The row with its fixup; RowError where it is malformed, or of kind UNWANTED."""
    found = fixup(row, identity)
    if found is None:
        raise RowError(UNWANTED)
    return found


class Table:
    """The rows of one data set string, read one by one. May be sent to another process."""

    def __init__(self, source: Source, *, identity: Identity) -> None:
        self.source = source
        self.identity = identity
        files = {path: open_file(path) for path in source.paths}
        self.files = list(files.values())
        self._parts: list[tuple[RowFile, Fixup]] = [(files[path], subset.fixup) for path, subset in source.parts]
        self._ends = np.cumsum([len(file) for file, _ in self._parts]).tolist()
        self._open: dict[int, RowFile] = {}  # by part, the one that was opened first in front

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[RowFile, Fixup, int]:
        part = bisect.bisect_right(self._ends, index) if len(self._ends) > 1 else 0
        file, fixup = self._parts[part]
        if part not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[part] = file
        return file, fixup, index - (self._ends[part - 1] if part else 0)

    def read(self, index: int) -> Row:
        """Row `index` with its fixup; RowError where it is malformed, or of kind UNWANTED."""
        file, fixup, local = self._find(index)
        return fixed(fixup, file.read(local), self.identity)

    def where(self, index: int) -> str:
        """`file.jsonl:12`, or `file.json[11]` for an element of an array."""
        file, _, local = self._find(index)
        return file.where(local)
