"""Names of models to folders, without a network."""

from __future__ import annotations

import sys
import types

import pytest

from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.hub import PATTERNS, local_model, wants_hugging_face


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USE_HF", raising=False)
    for package in ("modelscope", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)


def hub(monkeypatch, package, answer):
    asked = {}
    module = types.ModuleType(package)

    def snapshot_download(model, **options):
        asked.update(options, model=model)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, package, module)
    return asked


def test_a_folder_wins(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Q").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(local_model("Qwen/Q")) == "Qwen/Q"
    assert local_model("~/Qwen/Q") == tmp_path / "Qwen" / "Q"


@pytest.mark.parametrize("name", ["/a/b", "./a", "../a/b", "~/a", "a", "a/b/c"])
def test_what_can_be_no_name(name):
    with pytest.raises(UsageError, match="is not an existing folder"):
        local_model(name)


@pytest.mark.parametrize(
    ("package", "use_hf", "pattern_key"),
    [("modelscope", False, "allow_file_pattern"), ("huggingface_hub", True, "allow_patterns")],
)
def test_asking_a_hub(tmp_path, monkeypatch, package, use_hf, pattern_key):
    with pytest.raises(UsageError, match=f"the package {package} is not installed") as error:
        local_model("Qwen/Q", use_hf=use_hf)
    assert "pip install 'megatron-swift[hub]'" in error.value.do and ("--use_hf" in error.value.do) != use_hf
    asked = hub(monkeypatch, package, tmp_path)
    assert local_model("Qwen/Q", use_hf=use_hf, revision="r", token="t") == tmp_path
    assert asked == {"model": "Qwen/Q", "revision": "r", "token": "t", pattern_key: PATTERNS}
    hub(monkeypatch, package, ConnectionError("no network"))
    with pytest.raises(UsageError, match=r"cannot be fetched from .*: no network"):
        local_model("Qwen/Q", use_hf=use_hf)


def test_no_code_and_no_pickles_are_fetched():
    assert not [
        pattern for pattern in PATTERNS if pattern.endswith((".py", ".bin", ".pt", "*")) and pattern != "LICENSE*"
    ]


@pytest.mark.parametrize(("text", "wanted"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_environment(monkeypatch, text, wanted):
    monkeypatch.setenv("USE_HF", text)
    assert wants_hugging_face(False) == wanted and wants_hugging_face(True)
