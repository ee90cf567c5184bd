"""Data sets on ModelScope or Hugging Face, and folders laid out as there: fetching them, and which of their files to read."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_swift.data.readers import READERS
from megatron_swift.utils.errors import DataError, UsageError
from megatron_swift.utils.hub import wants_hugging_face
from megatron_swift.utils.log import get_logger

HubName = Literal["ms", "hf"]
TITLES = {"ms": "ModelScope", "hf": "Hugging Face"}
PACKAGES = {"ms": "modelscope", "hf": "huggingface_hub"}
OFFLINE = {"ms": ("MODELSCOPE_OFFLINE",), "hf": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
TOKENS = {"ms": "MODELSCOPE_API_TOKEN", "hf": "HF_TOKEN"}
ATTEMPTS, PAUSE = 3, 1.0  # downloads are tried so often, with so many seconds in between
CARD = "README.md"
PATTERNS = [*(f"*{suffix}" for suffix in READERS), CARD]  # rows and their description, never code
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "configuration.json")
PROSE = ("readme", "license", "licence", "notice", "requirements", "citation")
SHOWN = 10  # names of files in a message
NOT_TRAINING = {"test", "testing", "eval", "evaluation", "dev", "valid", "validation", "val"}
LARGEST_CARD = 1 << 20  # bytes

Configs = dict[str, dict[str, list[str]]]  # subset -> split -> patterns of files


@dataclass(frozen=True)
class Hub:
    """Where data sets that are not on disk come from. The user's names; see the parameter list for their meaning."""

    use_hf: bool = False
    token: str | None = field(default=None, repr=False)
    force: bool = False

    def choose(self, prefix: str) -> HubName:
        """The hub to ask: the prefix `hf::` or `ms::` of the data set's name, else --use_hf or USE_HF, else ModelScope."""
        if prefix:
            return "hf" if prefix == "hf::" else "ms"
        return "hf" if wants_hugging_face(self.use_hf) else "ms"

    def offline(self, hub: HubName) -> str:
        """The variable that is set to keep us from asking `hub`, or ""."""
        return next((variable for variable in OFFLINE[hub] if _is_on(variable)), "")

    def headers(self, hub: HubName) -> dict[str, str]:
        """What tells `hub` who asks: --hub_token, else the token of its environment variable, else that of its own login."""
        token = self.token or os.environ.get(TOKENS[hub])
        stored = _stored_token(hub) if not token else None
        bearer, session = (token or stored, None) if hub == "hf" else (token, token or stored)
        return {
            **({"Authorization": f"Bearer {_checked(bearer)}"} if bearer else {}),
            **({"Cookie": f"m_session_id={_checked(session)}"} if session else {}),
        }

    def fetch(
        self, name: str, hub: HubName, *, flag: str, only: Sequence[str] = (), revision: str | None = None
    ) -> Path:
        """The folder with the newest files of data set `name`, from the hub's own cache where they are there already.

        With the hub's offline variable (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE, MODELSCOPE_OFFLINE) only the cache is
        asked. DataError where it cannot be had; `flag` is what the user typed. only: the paths wanted, where not all.
        """
        title = TITLES[hub]
        offline = self.offline(hub)
        patterns = [glob.escape(path) for path in only] or PATTERNS
        if offline and self.force:
            raise UsageError(f"--download_mode force_redownload with {offline}=1", do="leave one of the two out")
        other = ask_the_other(hub)
        get_logger().info("%s: asking %s%s", flag, title, f"'s cache, because {offline} is set" if offline else "")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _download(name, hub, self, patterns=patterns, revision=revision, offline=bool(offline))
            except ImportError:
                raise UsageError(
                    f"{flag} is neither a file nor a folder, and {title} cannot be asked: "
                    f"the package {PACKAGES[hub]} is not installed",
                    do=f"pip install 'megatron-swift[hub]', or give a local file or folder, or {other}",
                ) from None
            except Exception as error:  # the hubs' libraries raise many kinds, all meaning: it cannot be had
                if offline or attempt == ATTEMPTS:
                    reach = f"is not in the cache of {title}" if offline else f"cannot be fetched from {title}"
                    do = (
                        f"unset {offline}, or give its folder"
                        if offline
                        else f"check the name and the network, or {other}"
                    )
                    raise DataError(f"{flag}: {name} {reach}", why=str(error), do=do) from error
                get_logger().warning("%s: attempt %d of %d failed: %s", flag, attempt, ATTEMPTS, error)
                time.sleep(PAUSE * attempt)
        raise AssertionError


def ask_the_other(hub: HubName) -> str:
    """How the other hub would be asked."""
    return "add --use_hf true" if hub == "ms" else "leave out --use_hf and USE_HF to ask ModelScope"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _stored_token(hub: HubName) -> str | None:
    """What the hub's own library knows us by, if it is there."""
    try:
        if hub == "hf":
            from huggingface_hub import get_token

            return get_token()
        from modelscope.hub.api import ModelScopeConfig
    except ImportError:
        return None
    cookies = ModelScopeConfig.get_cookies() or ()
    return next((cookie.value for cookie in cookies if cookie.name == "m_session_id"), None)


def _checked(token: str) -> str:
    """The token, if it can be sent; an error of the standard library would show it."""
    if not re.fullmatch(r"[!-~]+", token.strip()):
        raise UsageError("the hub's token has characters that no token has", do="check --hub_token; it is not shown")
    return token.strip()


def _download(name: str, hub: HubName, asker: Hub, *, patterns: list[str], revision: str | None, offline: bool) -> Path:
    token, force = asker.token, asker.force
    if hub == "hf":
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                name,
                repo_type="dataset",
                token=token,
                force_download=force,
                local_files_only=offline,
                allow_patterns=patterns,
                revision=revision,
            )
        )
    import modelscope

    def fetch(*, local: bool) -> Path:
        snapshot = modelscope.snapshot_download(
            repo_id=name, repo_type="dataset", token=token, local_files_only=local, allow_file_pattern=patterns
        )
        return Path(str(snapshot))

    if not force:
        return fetch(local=offline)
    cached: Path | None = None
    with suppress(Exception):  # it raises many kinds where the cache has nothing
        cached = fetch(local=True)
    with _set_aside(cached):  # ModelScope's library knows no other way
        return fetch(local=False)


@contextmanager
def _set_aside(folder: Path | None) -> Iterator[None]:
    """Have `folder` out of the way; it comes back if what is done meanwhile fails, else it is deleted."""
    if folder is None or not folder.is_dir():
        yield
        return
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


# --- which files of a folder -----------------------------------------------------------------------------------------


def choose_files(folder: Path, *, subset: str, splits: Sequence[str], flag: str) -> tuple[Path, ...]:
    """The files of a data set's folder that hold `subset` ("" for the default one) and `splits`, in order.

    The folder's description decides (`configs` in README.md, or ModelScope's NAME.json), else the names: a subset is a
    folder or file of that name, and files named after another split than the training split are left out with a
    warning. UsageError for a subset or split that is not there, DataError where there is no file.
    """
    configs = card_configs(folder) or _meta_configs(folder)
    files = _described(folder, configs, subset, splits, flag) if configs else _by_name(folder, subset, splits, flag)
    if not files:
        raise DataError(
            f"{flag}: {folder} holds no {' or '.join(READERS)} file", do="give the folder that holds the rows"
        )
    return files


def _described(folder: Path, configs: Configs, subset: str, splits: Sequence[str], flag: str) -> tuple[Path, ...]:
    names = ", ".join(configs)
    if not subset or (subset == "default" and len(configs) == 1):
        if len(configs) > 1 and "default" not in configs:
            raise UsageError(f"{flag}: a subset must be named", why=f"there are {names}", do=f"write {flag}:NAME")
        subset = "default" if "default" in configs else next(iter(configs))
    if subset not in configs:
        raise UsageError(f"{flag}: there is no subset {subset!r}", do=f"choose {names}")
    known = configs[subset]
    found: list[Path] = []
    for split in splits:
        if split not in known:
            raise UsageError(
                f"{flag}: there is no split {split!r}, only {', '.join(known)}", do="give its file instead"
            )
        for pattern in known[split]:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise DataError(f"{flag}: its description names a file outside its folder: {pattern!r}")
            found += sorted(path for path in folder.glob(pattern) if path.is_file())
    return tuple(path for path in dict.fromkeys(found) if path.suffix.lower() in READERS)


def card_configs(folder: Path) -> Configs:
    """The subsets that the header of README.md describes; {} where it describes none."""
    card = folder / CARD
    if not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return {}
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        described = yaml.safe_load(header[1]) if header else None
        entries = described.get("configs") if isinstance(described, dict) else None
        configs = {str(entry["config_name"]): _patterns(entry) for entry in entries or []}
        default = [str(entry["config_name"]) for entry in entries or [] if entry.get("default")]
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, AttributeError, ValueError) as error:
        get_logger().warning("%s: its header cannot be read (%s); files are chosen by their names", card, error)
        return {}
    if default and "default" not in configs:
        configs["default"] = configs[default[0]]
    return {name: splits for name, splits in configs.items() if splits}


def _patterns(entry: dict[str, Any]) -> dict[str, list[str]]:
    """One entry of `configs` as split -> patterns."""
    files = entry.get("data_files")
    if files is None:
        return {"train": [f"{entry['data_dir']}/**/*"]} if "data_dir" in entry else {}
    splits: dict[str, list[str]] = {}
    for item in files if isinstance(files, list) else [files]:
        split, path = (str(item["split"]), item["path"]) if isinstance(item, dict) else ("train", item)
        splits.setdefault(split, []).extend(map(str, path if isinstance(path, list) else [path]))
    return splits


def _meta_configs(folder: Path) -> Configs:
    """The subsets that ModelScope's NAME.json describes, {subset: {split: {"meta": file}}}; {} where there is none."""
    for meta in sorted(folder.glob("*.json")):
        if meta.stat().st_size > LARGEST_CARD or meta.name in NOT_DATA:
            continue
        try:
            described = json.loads(meta.read_text(encoding="utf-8"))
            configs = {
                str(subset): {
                    str(split): [one] if isinstance(one := parts["meta"], str) else [str(part) for part in one]
                    for split, parts in splits.items()
                }
                for subset, splits in described.items()
            }
        except (ValueError, OSError, RecursionError, KeyError, TypeError, AttributeError):
            continue
        if configs and all(configs.values()):
            return configs
    return {}


def _by_name(folder: Path, subset: str, splits: Sequence[str], flag: str) -> tuple[Path, ...]:
    root = folder
    if subset and subset != "default":
        if (folder / subset).is_dir() and not {"..", "/"} & set(Path(subset).parts):
            root = folder / subset
        else:
            files = [path for path in _data_files(folder.iterdir()) if path.stem == subset]
            if not files:
                known = ", ".join(
                    sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
                )
                raise UsageError(
                    f"{flag}: there is no subset {subset!r}", do=f"choose {known}" if known else "leave it out"
                )
            return tuple(files)
    found = _data_files(root.iterdir()) or _data_files(root.rglob("*"), below=root)
    return _of_splits(found, root, splits, flag)


def _data_files(paths: Iterable[Path], *, below: Path | None = None) -> list[Path]:
    """Those that hold rows, sorted: no hidden file, no description; plain text only where nothing else is."""
    kept = [
        path
        for path in sorted(paths)
        if path.suffix.lower() in READERS
        and path.name not in NOT_DATA
        and not any(part.startswith(".") for part in (path.relative_to(below).parts if below else (path.name,)))
        and path.is_file()
    ]
    rows = [path for path in kept if path.suffix.lower() != ".txt"]
    return rows or [path for path in kept if not path.stem.lower().startswith(PROSE)]


def _of_splits(files: Sequence[Path], root: Path, splits: Sequence[str], flag: str) -> tuple[Path, ...]:
    names = {path: path.relative_to(root).with_suffix("").as_posix().lower() for path in files}
    if tuple(splits) != ("train",):
        ends = [re.compile(rf"(?:^|[-./]){re.escape(split.lower())}(?:$|[-./])") for split in splits]
        exact = [path for end in ends for path in files if end.search(names[path])]
        if exact:
            return tuple(dict.fromkeys(exact))
    named_after_others = [bool(NOT_TRAINING & set(re.split(r"[^a-z]+", names[path]))) for path in files]
    kept = [path for path, other in zip(files, named_after_others, strict=True) if not other]
    left_out = [path.name for path, other in zip(files, named_after_others, strict=True) if other]
    if kept and left_out:
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        get_logger().warning("%s: not for training by their names: %s%s", flag, ", ".join(left_out[:SHOWN]), more)
    return tuple(kept or files)
