"""Data sets at a hub that are streamed: which files, from where, with which token. Both hubs are on this machine."""

from __future__ import annotations

import json
import logging

import pytest
from mini_hub import MiniHub, git_id, sha256

from megatron_swift.data import hub as hub_module
from megatron_swift.data import listing, remote, web
from megatron_swift.data.hub import Hub
from megatron_swift.data.options import DataOptions
from megatron_swift.data.prepare import find_sources
from megatron_swift.data.registry import Identity
from megatron_swift.data.remote import RemoteFile
from megatron_swift.data.sources import Source, Table, find_source, fixed, make_lookup
from megatron_swift.utils.errors import DataError, UsageError

ROW = b'{"text": "a"}\n'
TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch):
    for variable in (
        "USE_HF",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "MODELSCOPE_OFFLINE",
        *hub_module.TOKENS.values(),
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setattr(hub_module, "_stored_token", lambda hub: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote._page.cache_clear()
    with MiniHub({}).serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


def find(value: str, **lookup) -> Source:
    return find_source(value, lookup=make_lookup(**lookup), streaming=True)


def shown(source: Source) -> list[str]:
    return [str(file) for file, _ in source.at_hub]


def read(source: Source) -> list[bytes]:
    return [file.fetch(0, file.size) for file, _ in source.at_hub if isinstance(file, RemoteFile)]


@pytest.mark.parametrize("which", ["hf", "ms"])
def test_files_are_left_at_the_hub(hub, which):
    hub.files["org/name"] = {
        "train.jsonl": ROW,
        "test.jsonl": ROW * 2,
        "train ä#2.jsonl": ROW * 3,
        "model.bin": b"x",
        "sub/more.jsonl": ROW,
        "../../outside.jsonl": ROW,
    }
    source = find(f"{which}::org/name#5")
    assert shown(source) == [f"{which}::org/name/train ä#2.jsonl", f"{which}::org/name/train.jsonl"]
    assert (source.request.limit, source.parts, source.paths) == (5, (), ())
    assert hub.requests() == 0
    assert read(source) == [ROW * 3, ROW]
    [file, _] = [file for file, _ in source.at_hub]
    assert file.identity == (git_id(ROW * 3) if which == "hf" else sha256(ROW * 3))


def test_a_revision_stays_what_it_was(hub):
    hub.files["org/name"] = {"train.jsonl": ROW}
    source = find("hf::org/name")
    assert hub.revision("org/name") in source.at_hub[0][0].url
    hub.files["org/name"] = {"train.jsonl": ROW * 2}
    with pytest.raises(DataError, match=r"hf::org/name/train\.jsonl cannot be read"):
        read(source)  # this hub forgets its former revisions


def test_pages_of_a_list(hub, monkeypatch):
    monkeypatch.setattr(listing, "PAGE_SIZE", 4)
    hub.files["org/name"] = {f"train-{n:02}.jsonl": ROW for n in range(11)}  # and a folder, 12: the last page is empty
    assert len(find("ms::org/name").at_hub) == 11
    assert len(hub.seen) == 4


def test_the_description_decides(hub):
    card = b"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*\n---\n"
    hub.files["org/name"] = {"en/a.jsonl": ROW, "de/a.jsonl": ROW, "README.md": card, "other.json": b"{}"}
    assert shown(find("hf::org/name")) == ["hf::org/name/en/a.jsonl"]
    assert [one.path for one in hub.seen] == ["", "README.md"]
    with pytest.raises(UsageError, match="there is no subset 'de'"):
        find("hf::org/name:de")


@pytest.mark.parametrize("others", [0, listing.DESCRIPTIONS])
def test_modelscopes_description_decides(hub, others):
    meta = {"default": {"train": {"meta": "b.jsonl"}}, "en": {"train": {"meta": "c.jsonl"}}}
    hub.files["org/name"] = {f"{letter}.jsonl": ROW for letter in "abc"} | {"name.json": json.dumps(meta).encode()}
    hub.files["org/name"] |= {f"other{n}.json": ROW for n in range(others)}
    assert shown(find("org/name")) == ["ms::org/name/b.jsonl"]
    assert hub.requests() == 1 if others else hub.requests(".json") == 1
    assert shown(find("org/name:en")) == ["ms::org/name/c.jsonl"]


def test_registered_rows(hub):
    row = {"instruction": "翻译", "input": "输入：早", "output": "x"}
    hub.files["llm-wizard/alpaca-gpt4-data-zh"] = {"train.jsonl": json.dumps(row).encode()}
    source = find("AI-ModelScope/alpaca-gpt4-data-zh", use_hf=True)
    assert shown(source) == ["hf::llm-wizard/alpaca-gpt4-data-zh/train.jsonl"]
    [subset] = [subset for _, subset in source.at_hub]
    assert fixed(subset.fixup, row, Identity())["input"] == "早"


def test_who_asks(hub):
    hub.files["org/name"] = {"train.jsonl": ROW}
    hub.token = TOKEN
    assert read(find("hf::org/name", hub_token=TOKEN)) == [ROW]
    assert read(find("ms::org/name", hub_token=f"{TOKEN}\n")) == [ROW]
    bearer, cookie = f"Bearer {TOKEN}", f"m_session_id={TOKEN}"
    assert [one.secrets for one in hub.seen] == [{"Authorization": bearer}] * 2 + [
        {"Authorization": bearer, "Cookie": cookie}
    ] * 2


def test_where_a_token_comes_from(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "_stored_token", lambda hub: f"{hub} login")
    with pytest.raises(UsageError, match="characters that no token has") as caught:
        Hub().headers("hf")
    assert "login" not in caught.value.block()
    monkeypatch.setattr(hub_module, "_stored_token", lambda hub: f"{hub}-login")
    assert Hub().headers("hf") == {"Authorization": "Bearer hf-login"}
    assert Hub().headers("ms") == {"Cookie": "m_session_id=ms-login"}  # of a session: no token
    monkeypatch.setenv("HF_TOKEN", "variable")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "variable")
    assert Hub().headers("hf") == {"Authorization": "Bearer variable"}
    assert Hub().headers("ms") == {"Authorization": "Bearer variable", "Cookie": "m_session_id=variable"}
    assert Hub(token="flag").headers("hf") == {"Authorization": "Bearer flag"}


@pytest.mark.parametrize(
    ("value", "why", "do"),
    [
        ("hf::no/name", "HTTP 404 Not Found", "check the name and the network, or leave out --use_hf"),
        ("no/name", "HTTP 404 no such data set", "check the name and the network, or add --use_hf true"),
    ],
)
def test_a_name_that_is_not_there(hub, value, why, do):
    with pytest.raises(DataError) as caught:
        find(value)
    title = "Hugging Face" if "hf::" in value else "ModelScope"
    assert caught.value.what == f"--dataset {value}: no/name cannot be listed at {title}"
    assert caught.value.why == why
    assert caught.value.do.startswith(do)


def test_a_hub_that_wants_another_token(hub):
    hub.token = "another"
    with pytest.raises(DataError, match="cannot be listed at Hugging Face") as caught:
        find("hf::org/name", hub_token=TOKEN)
    assert caught.value.why == "HTTP 401 Unauthorized"
    assert "--hub_token" in caught.value.do
    assert TOKEN not in caught.value.block()


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    with MiniHub({}).serve() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    with pytest.raises(DataError, match="cannot be listed") as caught:
        find("hf::org/name")
    assert "refused" in caught.value.why
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(UsageError, match="HF_ENDPOINT=file:///etc is not a web address"):
        find("hf::org/name")


def test_an_answer_that_is_not_understood(hub, monkeypatch):
    monkeypatch.setattr(listing, "get", lambda *_, **__: b'{"siblings": [{}]}')
    with pytest.raises(DataError, match="cannot be listed") as caught:
        find("hf::org/name")
    assert caught.value.why == "its answer is not understood: KeyError('sha')"


def test_what_needs_an_index_is_fetched_whole(hub, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    files = {
        "a.csv": b"text\na\n",
        "b.json": b' [{"text": "b"}]',
        "c.json": b'{"text": "c"}\n',
        "d[1].csv": b"text\nd\n",
    }
    hub.files["org/name"] = files
    asked = []

    def download(name, which, asker, *, patterns, revision, offline):
        asked.append((name, which, patterns, revision, offline))
        for path in ("a.csv", "b.json", "d[1].csv"):
            (tmp_path / path).write_bytes(files[path])
        return tmp_path

    monkeypatch.setattr(hub_module, "_download", download)
    source = find("hf::org/name")
    assert shown(source) == [
        str(tmp_path / "a.csv"),
        str(tmp_path / "b.json"),
        "hf::org/name/c.json",
        str(tmp_path / "d[1].csv"),
    ]
    assert asked == [("org/name", "hf", ["a.csv", "b.json", "d[[]1].csv"], hub.revision("org/name"), False)]
    assert "3 of 4 files are fetched whole, for .csv and arrays in .json cannot be read in parts" in caplog.text
    assert "1 files, 0.0 MB, are read over the network while training" in caplog.text


def test_offline_asks_the_cache(hub, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(ROW)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_module, "_download", lambda *_, offline, **__: tmp_path if offline else None)
    source = find("hf::org/name")
    assert (source.at_hub, source.paths) == ((), (tmp_path / "train.jsonl",))
    assert hub.seen == []


def test_only_training_rows_are_left_there(hub, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(ROW)
    hub.files["org/name"] = {"train.jsonl": ROW}
    monkeypatch.setattr(hub_module, "_download", lambda *_, **__: tmp_path)
    options = DataOptions(("hf::org/name",), template="chatml", val_dataset=("hf::org/name",))
    [train], [val] = find_sources(options, streaming=True)
    assert (shown(train), train.paths) == (["hf::org/name/train.jsonl"], ())
    assert Table(val, identity=Identity()).read(0) == {"text": "a"}
    assert find_sources(options)[0] == [val._replace(request=train.request)]
