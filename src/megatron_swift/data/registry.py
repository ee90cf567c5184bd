"""Data sets known by name: their ids on both hubs, the files shipped with the package, and what their rows need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_swift.utils.errors import UsageError


@dataclass(frozen=True)
class Identity:
    """Who the model shall say it is: names and authors, each a value for Chinese rows and one for the others.

    One value serves both; none leaves the placeholder as it is.
    """

    names: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()


Row = dict[str, Any]
# What a data set's rows need before their columns are read: a new row, or None for a row that is not wanted.
Fixup = Callable[[Row, Identity], Row | None]


def plain(row: Row, identity: Identity) -> Row:
    """The row as it is."""
    return row


@dataclass(frozen=True)
class Rename:
    """A fixup that gives columns other names; a column that has the new name already stays and wins.

    columns : (name in the data, new name) pairs; the first is matched without regard to case.
    """

    columns: tuple[tuple[str, str], ...]

    def __call__(self, row: Row, identity: Identity) -> Row:
        """The row with its columns renamed."""
        targets = {source.lower(): target for source, target in self.columns}
        present = {name.lower() for name in row if name.lower() not in targets}
        renamed = {}
        for name, value in row.items():
            target = targets.get(name.lower(), name)
            renamed[name if target != name and target.lower() in present else target] = value
        return renamed


@dataclass(frozen=True)
class Subset:
    """A part of a data set that has its own rows or its own fixup.

    name   : what the user writes after the colon.
    fixup  : what its rows need.
    config : the hub's name for it, None where it is `name`.
    splits : the splits to read, () for those of the data set.
    weak   : not meant by the subset name "all".
    """

    name: str = "default"
    fixup: Fixup = plain
    config: str | None = None
    splits: tuple[str, ...] = ()
    weak: bool = False


@dataclass(frozen=True)
class Registered:
    """A data set known by name.

    ms, hf      : its ids at ModelScope and at Hugging Face, "" where it is not there.
    path        : a file or folder that holds it, instead of a hub.
    aliases     : further names.
    subsets     : its subsets; "default", or else the only one, is used where the user names none.
    splits      : the splits to read.
    asset       : file in data/assets that holds its rows, or "" where the rows are not shipped.
    fingerprint : changes when its fixups do; "" for fixups of this package.

    The last component of each name and id also matches local files and folders, which are then read as this data set.
    """

    ms: str = ""
    hf: str = ""
    path: str = ""
    aliases: tuple[str, ...] = ()
    subsets: tuple[Subset, ...] = (Subset(),)
    splits: tuple[str, ...] = ("train",)
    asset: str = ""
    fingerprint: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All its names; the first is the one that we use."""
        return tuple(name for name in (self.ms, self.hf, *self.aliases, self.path) if name)

    def choose(self, wanted: Sequence[str], *, flag: str) -> tuple[Subset, ...]:
        """The subsets of these names. A name that is not registered is a subset of the hub's, without a fixup.

        UsageError where there are several, none is named and none is "default"; `flag` says what the user typed.
        """
        known = {subset.name: subset for subset in self.subsets}
        if not wanted:
            subset = known.get("default") or (self.subsets[0] if len(known) == 1 else None)
            if subset is None:
                raise UsageError(f"{flag}: a subset must be named", do=f"add one of :{', :'.join(known)} or :all")
            return (subset,)
        if tuple(wanted) == ("all",) and "all" not in known:
            return tuple(subset for subset in self.subsets if not subset.weak)
        return tuple(known.get(name) or Subset(name) for name in wanted)


def find_registered(name: str, entries: Sequence[Registered] | None = None) -> Registered | None:
    """The first data set that has `name` as a name, else whose name ends in it; without regard to case."""
    wanted = name.lower()
    entries = REGISTRY if entries is None else entries
    exact = (entry for entry in entries if wanted in [known.lower() for known in entry.names])
    alike = (
        entry
        for entry in entries
        if wanted in [known.lower().rsplit("/", 1)[-1] for known in entry.names if known != entry.path]
    )
    return next(exact, None) or next(alike, None)


# --- data sets of the user's own, described in JSON files ------------------------------------------------------------

_INFO_KEYS = ("ms_dataset_id", "hf_dataset_id", "dataset_path", "dataset_name", "subsets", "split", "columns")
_SUBSET_KEYS = ("name", "subset", "split", "columns", "is_weak_subset")
_REMARKS = ("tags", "help", "huge_dataset")  # for people, and for ms-swift's own lists


def read_dataset_info(file: str) -> tuple[Registered, ...]:
    """The data sets that a JSON file of --custom_dataset_info describes: a list of objects as ms-swift writes them.

    UsageError for a file that is no such list.
    """
    path = Path(file).expanduser()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--custom_dataset_info {file} cannot be read: {error.strerror}", do="check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--custom_dataset_info {file} is not JSON", why=str(error), do="mend the file") from None
    if not isinstance(entries, list):
        raise UsageError(f"--custom_dataset_info {file}: the file must hold a list of objects")
    return tuple(
        _registered(entry, f"--custom_dataset_info {file}, entry {number}", path.parent)
        for number, entry in enumerate(entries, 1)
    )


def _registered(entry: Any, where: str, folder: Path) -> Registered:
    _check_keys(entry, (*_INFO_KEYS, *_REMARKS), where)
    columns = _columns(entry, where)
    fixup: Fixup = Rename(columns) if columns else plain
    ms, hf, path, name = (_entry_text(entry, key, where) for key in _INFO_KEYS[:4])
    if path:
        path = str(folder / Path(path).expanduser())
    if not (ms or hf or path):
        raise UsageError(f"{where}: no data set is named", do="add ms_dataset_id, hf_dataset_id or dataset_path")
    subsets = []
    for item in _entry_list(entry, "subsets", where) or ["default"]:
        if isinstance(item, str):
            subsets.append(Subset(item, fixup))
            continue
        _check_keys(item, (*_SUBSET_KEYS, *_REMARKS), f"{where}, subsets")
        own = _columns(item, where)
        config = _entry_text(item, "subset", where) or "default"
        subset = Subset(_entry_text(item, "name", where) or config, Rename(own) if own else fixup, config)
        splits = tuple(map(str, _entry_list(item, "split", where)))
        subsets.append(replace(subset, splits=splits, weak=bool(item.get("is_weak_subset"))))
    return Registered(
        ms=ms,
        hf=hf,
        path=path,
        aliases=(name,) if name else (),
        subsets=tuple(subsets),
        splits=tuple(map(str, _entry_list(entry, "split", where))) or ("train",),
        fingerprint=hashlib.blake2b(json.dumps(entry, sort_keys=True).encode(), digest_size=8).hexdigest(),
    )


def _check_keys(entry: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not an object", do=f"write an object with {', '.join(known)}")
    unknown = sorted(entry.keys() - set(known))
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}", do=f"known are {', '.join(known)}")


def _entry_text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key) or ""
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} must be text")
    return value


def _entry_list(entry: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = entry.get(key) or []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise UsageError(f"{where}: {key} must be a list")
    return value


def _columns(entry: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    value = entry.get("columns") or {}
    if not isinstance(value, dict) or not all(isinstance(target, str) for target in value.values()):
        raise UsageError(f"{where}: columns must be an object of texts", do='for example {"problem": "query"}')
    return tuple(value.items())


# --- data sets that we know ------------------------------------------------------------------------------------------


def _fill_identity(row: Row, identity: Identity) -> Row:
    values = (("{{NAME}}", identity.names), ("{{AUTHOR}}", identity.authors))
    which = 0 if row.get("tag") == "zh" else -1
    filled = dict(row)
    for column in ("query", "response"):
        text = filled.get(column)
        if isinstance(text, str):
            for placeholder, choices in values:
                if choices:
                    text = text.replace(placeholder, choices[:2][which])
            filled[column] = text
    return filled


def _fill_identity_without_thinking(row: Row, identity: Identity) -> Row:
    filled = _fill_identity(row, identity)
    if isinstance(filled.get("query"), str) and isinstance(filled.get("response"), str):
        filled["query"] += " /no_think"
        filled["response"] = "<think>\n\n</think>\n\n" + filled["response"]
    return filled


def _strip_input_heading(row: Row, identity: Identity) -> Row:
    text = row.get("input")
    return {**row, "input": text.removeprefix("输入：")} if isinstance(text, str) else row


def _strip_answer_heading(row: Row, identity: Identity) -> Row:
    text = row.get("output")
    if not isinstance(text, str) or not text.startswith("Answer: "):
        return row
    return {**row, "output": text.removeprefix("Answer: ").strip()}


def _subsets(*names: str) -> tuple[Subset, ...]:
    return tuple(Subset(name) for name in names)


def _renamed(**columns: str) -> tuple[Subset, ...]:
    return (Subset(fixup=Rename(tuple(columns.items()))),)


REGISTRY = (
    Registered(
        "swift/self-cognition",
        "modelscope/self-cognition",
        subsets=(Subset(fixup=_fill_identity), Subset("qwen3", _fill_identity_without_thinking, "default", weak=True)),
        asset="self_cognition.jsonl",
    ),
    Registered(
        "AI-ModelScope/alpaca-gpt4-data-zh",
        "llm-wizard/alpaca-gpt4-data-zh",
        subsets=(Subset(fixup=_strip_input_heading),),
    ),
    Registered("AI-ModelScope/alpaca-gpt4-data-en", "vicgalle/alpaca-gpt4"),
    Registered("AI-ModelScope/alpaca-cleaned", "yahma/alpaca-cleaned"),
    Registered("AI-ModelScope/LongAlpaca-12k", "Yukang/LongAlpaca-12k", subsets=(Subset(fixup=_strip_answer_heading),)),
    Registered("AI-ModelScope/CodeAlpaca-20k", "HuggingFaceH4/CodeAlpaca_20K"),
    Registered("AI-ModelScope/train_0.5M_CN", "BelleGroup/train_0.5M_CN"),
    Registered("AI-ModelScope/train_1M_CN", "BelleGroup/train_1M_CN"),
    Registered("AI-ModelScope/Open-Platypus", "garage-bAInd/Open-Platypus"),
    Registered("AI-ModelScope/MathInstruct", "TIGER-Lab/MathInstruct"),
    Registered("AI-ModelScope/tulu-v2-sft-mixture", "allenai/tulu-v2-sft-mixture"),
    Registered("AI-ModelScope/OpenOrca-Chinese", "yys/OpenOrca-Chinese"),
    Registered(
        "AI-ModelScope/COIG-CQIA",
        subsets=_subsets(
            *("chinese_traditional", "coig_pc", "exam", "finance", "douban", "human_value", "logi_qa", "ruozhiba"),
            *("segmentfault", "wiki", "wikihow", "xhs", "zhihu"),
        ),
    ),
    Registered(
        "AI-ModelScope/sql-create-context",
        "b-mc2/sql-create-context",
        subsets=_renamed(question="instruction", context="input", answer="output"),
    ),
    Registered("swift/sharegpt", subsets=_subsets("common-zh", "unknown-zh", "common-en")),
    Registered("swift/SlimOrca", "Open-Orca/SlimOrca"),
    Registered("swift/OpenHermes-2.5", "teknium/OpenHermes-2.5"),
    Registered("swift/no_robots", "HuggingFaceH4/no_robots"),
    Registered("swift/ultrachat_200k", "HuggingFaceH4/ultrachat_200k", splits=("train_sft",)),
    Registered("swift/chinese-c4", "shjwudp/chinese-c4"),
    Registered("AI-ModelScope/wikipedia-cn-20230720-filtered", "pleisto/wikipedia-cn-20230720-filtered"),
    Registered("swift/github-code", "codeparrot/github-code", subsets=_renamed(code="response")),
)
