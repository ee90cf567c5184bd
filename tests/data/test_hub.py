"""Data sets from hubs, without a network: stand-ins for the hubs' libraries, and the real library on a cache made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_swift.data import hub as hub_module
from megatron_swift.data.hub import choose_files
from megatron_swift.data.registry import Identity
from megatron_swift.data.sources import Source, Table, find_source, make_lookup
from megatron_swift.utils.errors import DataError, UsageError

# A hub's library: what it is asked is written to `asked.jsonl`, and `answers/OWNER--NAME` is what it gives.
STAND_IN = """
import json, os
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def snapshot_download({first}, **asked):
    asked["name"] = {first}
    with open(os.path.join(HERE, "asked.jsonl"), "a") as file:
        file.write(json.dumps(asked) + "\\n")
    folder = os.path.join(HERE, "answers", {first}.replace("/", "--"))
    if not os.path.isdir(folder):
        raise ConnectionError("no such data set")
    return folder
"""


class StandIns:
    """Both hubs' libraries, replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package, first in (("huggingface_hub", "repo_name"), ("modelscope", "repo_id")):
            (folder / package).mkdir(parents=True)
            (folder / package / "__init__.py").write_text(STAND_IN.format(first=first))

    def offer(self, name: str, files: dict[str, str]) -> Path:
        folder = self.folder / "answers" / name.replace("/", "--")
        return write_files(folder, files)

    @property
    def asked(self) -> list[dict]:
        file = self.folder / "asked.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def hubs(tmp_path, monkeypatch) -> StandIns:
    stand_ins = StandIns(tmp_path / "hubs")
    monkeypatch.syspath_prepend(str(stand_ins.folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("huggingface_hub", "modelscope")]:
        monkeypatch.delitem(sys.modules, name)
    for variable in ("USE_HF", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "MODELSCOPE_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub_module, "PAUSE", 0.0)
    yield stand_ins
    for name in ("huggingface_hub", "modelscope"):
        sys.modules.pop(name, None)


def rows(source: Source) -> list[dict]:
    table = Table(source, identity=Identity())
    return [table.read(index) for index in range(len(table))]


def names(source: Source) -> list[str]:
    return [path.name for path in source.paths]


ROW = '{"text": "a"}\n'


def test_modelscope_is_the_default(hubs):
    hubs.offer("org/name", {"train.jsonl": ROW, "test.jsonl": ROW})
    source = find_source("org/name#5", lookup=make_lookup(hub_token="t"))
    assert names(source) == ["train.jsonl"]
    assert source.request.limit == 5
    [asked] = hubs.asked
    assert (asked["name"], asked["repo_type"], asked["token"]) == ("org/name", "dataset", "t")
    assert asked["local_files_only"] is False
    assert "*.jsonl" in asked["allow_file_pattern"]
    assert not any(pattern.endswith((".py", "*", ".bin")) for pattern in asked["allow_file_pattern"])


@pytest.mark.parametrize("how", ["flag", "variable", "prefix"])
def test_hugging_face(hubs, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("USE_HF", "1")
    hubs.offer("org/name", {"train.csv": "text\na\n"})
    source = find_source("hf::org/name" if how == "prefix" else "org/name", lookup=make_lookup(use_hf=how == "flag"))
    assert rows(source) == [{"text": "a"}]
    [asked] = hubs.asked
    assert (asked["repo_type"], asked["force_download"], asked["local_files_only"]) == ("dataset", False, False)
    assert "*.parquet" in asked["allow_patterns"]


def test_the_prefix_beats_the_flag(hubs):
    hubs.offer("org/name", {"train.txt": "a\n"})
    assert rows(find_source("ms::org/name", lookup=make_lookup(use_hf=True))) == [{"text": "a"}]
    assert "allow_file_pattern" in hubs.asked[0]


@pytest.mark.parametrize(
    ("value", "use_hf", "asked"),
    [
        ("AI-ModelScope/alpaca-gpt4-data-zh", False, "AI-ModelScope/alpaca-gpt4-data-zh"),
        ("AI-ModelScope/alpaca-gpt4-data-zh", True, "llm-wizard/alpaca-gpt4-data-zh"),
        ("LLM-Wizard/Alpaca-GPT4-data-zh#2", False, "AI-ModelScope/alpaca-gpt4-data-zh"),
        ("hf::AI-ModelScope/alpaca-gpt4-data-zh", False, "llm-wizard/alpaca-gpt4-data-zh"),
        ("someone/alpaca-gpt4-data-zh", False, "someone/alpaca-gpt4-data-zh"),
    ],
)
def test_registered_names_have_an_id_at_each_hub(hubs, value, use_hf, asked):
    row = json.dumps({"instruction": "翻译", "input": "输入：早", "output": "x"})
    hubs.offer(asked, {"train.jsonl": row})
    assert rows(find_source(value, lookup=make_lookup(use_hf=use_hf)))[0]["input"] == "早"
    assert hubs.asked[0]["name"] == asked


def test_english_alpaca_and_the_split_of_ultrachat(hubs):
    hubs.offer("vicgalle/alpaca-gpt4", {"data/train-0.jsonl": ROW})
    hubs.offer(
        "HuggingFaceH4/ultrachat_200k", {f"data/{n}-0.jsonl": ROW for n in ("train_gen", "train_sft", "test_sft")}
    )
    lookup = make_lookup(use_hf=True)
    assert names(find_source("AI-ModelScope/alpaca-gpt4-data-en", lookup=lookup)) == ["train-0.jsonl"]
    assert names(find_source("swift/ultrachat_200k", lookup=lookup)) == ["train_sft-0.jsonl"]


def test_a_set_that_is_at_one_hub_only(hubs):
    hubs.offer("swift/sharegpt", {"common-zh.jsonl": ROW, "common-en.jsonl": ROW + ROW, "unknown-zh.jsonl": ROW})
    lookup = make_lookup(use_hf=True)
    assert len(rows(find_source("swift/sharegpt:common-zh/common-en", lookup=lookup))) == 3
    assert len(rows(find_source("swift/sharegpt:all", lookup=lookup))) == 4
    with pytest.raises(UsageError, match="a subset must be named") as caught:
        find_source("swift/sharegpt", lookup=lookup)
    assert "common-zh" in caught.value.do


def test_failures_are_tried_again(hubs):
    with pytest.raises(DataError, match="org/name cannot be fetched from ModelScope") as caught:
        find_source("org/name")
    assert (caught.value.why, len(hubs.asked)) == ("no such data set", 3)
    assert "--use_hf" in caught.value.do


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HF_HUB_OFFLINE", "hf::org/name"), ("HF_DATASETS_OFFLINE", "hf::org/name"), ("MODELSCOPE_OFFLINE", "org/name")],
)
def test_offline(hubs, monkeypatch, variable, value):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DataError, match="is not in the cache") as caught:
        find_source(value)
    assert variable in caught.value.do
    assert len(hubs.asked) == 1
    hubs.offer("org/name", {"train.jsonl": ROW})
    assert rows(find_source(value)) == [{"text": "a"}]
    assert [asked["local_files_only"] for asked in hubs.asked] == [True, True]
    with pytest.raises(UsageError, match="force_redownload"):
        find_source(value, lookup=make_lookup(download_mode="force_redownload"))


def test_force_redownload(hubs):
    folder = hubs.offer("org/name", {"train.jsonl": ROW})
    lookup = make_lookup(download_mode="force_redownload")
    find_source("hf::org/name", lookup=lookup)
    assert hubs.asked[0]["force_download"] is True
    # ModelScope's library cannot be told so: the copy is set aside, and comes back because the stand-in fetches nothing.
    with pytest.raises(DataError, match="cannot be fetched"):
        find_source("ms::org/name", lookup=lookup)
    assert (folder / "train.jsonl").read_text() == ROW
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("package", ["modelscope", "huggingface_hub"])
def test_without_the_library(package):
    value = "org/name" if package == "modelscope" else "hf::org/name"
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from megatron_swift.data.sources import find_source\n"
        "from megatron_swift.utils.errors import UsageError\n"
        f"try: find_source({value!r})\nexcept UsageError as error: print(error.block())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"the package {package} is not installed" in shown
    assert "pip install 'megatron-swift[hub]'" in shown


def test_the_token_is_never_shown():
    assert "secret" not in repr(make_lookup(hub_token="secret"))


def test_no_hub_library_is_imported_for_local_files(tmp_path):
    (tmp_path / "d.jsonl").write_text(ROW)
    code = (
        "import sys; from megatron_swift.data.sources import find_source\n"
        f"find_source({str(tmp_path / 'd.jsonl')!r}); find_source('swift/self-cognition')\n"
        "sys.exit(bool({'huggingface_hub', 'modelscope', 'yaml', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_real_library_reads_its_cache(tmp_path):
    """huggingface_hub itself, offline, on a cache laid out as it lays it out."""
    pytest.importorskip("huggingface_hub")
    commit = "0123456789012345678901234567890123456789"
    repo = tmp_path / "datasets--org--name"
    write_files(repo, {"refs/main": commit, f"snapshots/{commit}/data/train.jsonl": ROW})
    code = (
        "from megatron_swift.data.sources import find_source\n"
        "from megatron_swift.utils.errors import SwiftError\n"
        "try: print(find_source('hf::org/name').paths[0])\nexcept SwiftError as error: print(error.block())"
    )
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(repo / f"snapshots/{commit}/data/train.jsonl")


# --- which files of a folder -----------------------------------------------------------------------------------------


def chosen(folder: Path, *, subset: str = "", splits: tuple[str, ...] = ("train",)) -> list[str]:
    files = choose_files(folder, subset=subset, splits=splits, flag="--dataset x")
    return [path.relative_to(folder).as_posix() for path in files]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["b.jsonl", "a.json", "notes.txt", "README.md"], ["a.json", "b.jsonl"]),
        (["a.txt", "README.txt", "LICENSE.txt", "requirements.txt"], ["a.txt"]),
        (["train.jsonl", "test.jsonl", "validation.jsonl", "my-dev-set.jsonl"], ["train.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["contest.jsonl", "value.jsonl"], ["contest.jsonl", "value.jsonl"]),
        (["data/train-1.csv", "data/train-0.csv", "data/test-0.csv"], ["data/train-0.csv", "data/train-1.csv"]),
        (["en/a.jsonl", "test/b.jsonl", ".git/c.jsonl", "configuration.json"], ["en/a.jsonl"]),
    ],
)
def test_files_by_their_names(tmp_path, files, expected):
    write_files(tmp_path, dict.fromkeys(files, ROW))
    assert chosen(tmp_path) == expected


def test_what_is_not_for_training_is_said(tmp_path, caplog):
    write_files(tmp_path, {"train.jsonl": ROW, "test.jsonl": ROW})
    chosen(tmp_path)
    assert "not for training by their names: test.jsonl" in caplog.text


def test_subsets_by_name(tmp_path):
    write_files(tmp_path, {"one/a.jsonl": ROW, "two/b.jsonl": ROW, "three.csv": "a\n1\n"})
    assert chosen(tmp_path, subset="two") == ["two/b.jsonl"]
    assert chosen(tmp_path, subset="three") == ["three.csv"]
    with pytest.raises(UsageError, match="no subset 'four'") as caught:
        chosen(tmp_path, subset="four")
    assert "one, two" in caught.value.do
    with pytest.raises(UsageError, match="no subset"):
        chosen(tmp_path, subset="..")


CARD = """---
license: mit
configs:
- config_name: {name}
  data_files:
  - split: train
    path: parts/train-*
  - split: test
    path: [parts/test-0.jsonl]
- config_name: small
  data_files: small.jsonl
- config_name: folder
  data_dir: parts
---
# A data set
"""
FILES = {f"parts/{name}.jsonl": ROW for name in ("train-0", "train-1", "test-0")} | {"small.jsonl": ROW}


def test_subsets_by_description(tmp_path):
    write_files(tmp_path, {**FILES, "README.md": CARD.format(name="default")})
    assert chosen(tmp_path) == ["parts/train-0.jsonl", "parts/train-1.jsonl"]
    assert chosen(tmp_path, splits=("test", "train"))[0] == "parts/test-0.jsonl"
    assert chosen(tmp_path, subset="small") == ["small.jsonl"]
    assert len(chosen(tmp_path, subset="folder")) == 3
    with pytest.raises(UsageError, match="no subset 'large'") as caught:
        chosen(tmp_path, subset="large")
    assert "default, small, folder" in caught.value.do
    with pytest.raises(UsageError, match="no split 'dev', only train, test"):
        chosen(tmp_path, splits=("dev",))


def test_a_described_subset_must_be_named(tmp_path):
    card = CARD.format(name="big")
    write_files(tmp_path, {**FILES, "README.md": card})
    with pytest.raises(UsageError, match="a subset must be named"):
        chosen(tmp_path)
    (tmp_path / "README.md").write_text(card.replace("- config_name: small", "- config_name: small\n  default: true"))
    assert chosen(tmp_path) == ["small.jsonl"]


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/passwd", "parts/../../x.jsonl"])
def test_a_description_cannot_lead_outside(tmp_path, pattern):
    folder = write_files(tmp_path / "set", {**FILES, "README.md": CARD.format(name="default")})
    card = folder / "README.md"
    card.write_text(card.read_text().replace("parts/train-*", pattern))
    (tmp_path / "secret.jsonl").write_text(ROW)
    with pytest.raises(DataError, match="outside its folder"):
        chosen(folder)


@pytest.mark.parametrize(
    "card",
    [
        "---\nconfigs: [1]\n---\n",
        "---\n{\n---\n",
        "---\nconfigs: !!python/object/apply:os.mkdir [canary]\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "no header",
        "---\nlicense: mit\n---\n",
    ],
)
def test_a_card_that_says_nothing(tmp_path, card, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"train.jsonl": ROW, "README.md": card})
    assert chosen(tmp_path) == ["train.jsonl"]
    assert not (tmp_path / "canary").exists()


def test_modelscope_description(tmp_path):
    meta = {
        "default": {"train": {"meta": "train.csv", "file": ""}, "test": {"meta": "t.csv"}},
        "en": {"train": {"meta": "en.csv"}},
    }
    write_files(tmp_path, {"name.json": json.dumps(meta), "train.csv": "a\n1\n", "en.csv": "a\n1\n", "t.csv": "a\n1\n"})
    assert chosen(tmp_path) == ["train.csv"]
    assert chosen(tmp_path, subset="en") == ["en.csv"]


def test_no_file(tmp_path):
    write_files(tmp_path, {"README.md": "x", "model.bin": "x"})
    with pytest.raises(DataError, match=r"holds no \.jsonl or"):
        chosen(tmp_path)
