"""Documents to pre-train on, as `megatron pt` prepares them: whole in tokens, ended, split where long, and tightly packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.prepare import DataOptions, Prepared, prepare
from megatron_swift.data.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
EOS = "<|im_end|>"
ROUNDS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "abc"},
    {"role": "user", "content": "R"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture
def pretrain(tmp_path, tokenizer) -> Callable[..., Prepared]:
    def run(*dataset: Path, using: Tokenizer = tokenizer, **values: object) -> Prepared:
        defaults = {"max_length": 200, "truncation": "split", "loss_scale": "all", "packing": True, "strict": True}
        fixed = {"template": "generation", "split_dataset_ratio": 0.0, "dataset_shuffle": False}
        options = DataOptions(tuple(map(str, dataset)), cache_dir=tmp_path / "cache", **fixed, **{**defaults, **values})
        return prepare(options, using)

    return run


def documents(prepared: Prepared, tokenizer: Tokenizer) -> list[str]:
    """The samples, of which every token is trained."""
    samples = [sample for index in range(len(prepared.train)) for sample in prepared.train.row(index)]
    assert all((sample.labels == sample.ids).all() for sample in samples)
    return [tokenizer.decode(sample.ids.tolist()) for sample in samples]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "abc"}, "abc"),
        ({"messages": ROUNDS[1:2]}, "abc"),
        ({"messages": ROUNDS[:2]}, "Qabc"),
        ({"query": "Q", "response": "abc"}, "Qabc"),
        ({"messages": ROUNDS}, "Rd"),  # the last round only, as ms-swift 3.4
    ],
)
def test_rows_of_json(pretrain, tokenizer, tmp_path, row, text):
    prepared = pretrain(write(tmp_path / "d.jsonl", row))
    assert documents(prepared, tokenizer) == [text + EOS]


def test_lines_of_text(pretrain, tokenizer, tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one\r\n\n two \nthree")
    prepared = pretrain(tmp_path / "d.txt", packing=False)
    assert documents(prepared, tokenizer) == [f"one{EOS}", f" two {EOS}", f"three{EOS}"]


def test_a_tokenizer_that_begins(pretrain, tmp_path):
    begins = Tokenizer.load(write_tokenizer(tmp_path / "tok", bos="<s>", adds_bos=True))
    prepared = pretrain(write(tmp_path / "d.jsonl", {"text": "abc"}), using=begins)
    assert documents(prepared, begins) == [f"<s>abc{EOS}"]


def test_long_documents(pretrain, tokenizer, tmp_path):
    texts = ["a" * 23, "b" * 5, "c" * 9, "d" * 10]
    data = write(tmp_path / "d.jsonl", *({"text": text} for text in texts))
    prepared = pretrain(data, max_length=10, packing=False)
    pieces = [piece.replace(EOS, ".") for piece in documents(prepared, tokenizer)]
    # the end token of d stands alone in a piece that would train nothing
    assert pieces == ["a" * 10, "a" * 10, "aaa.", "bbbbb.", "c" * 9 + ".", "d" * 10]
    assert not prepared.report.left_out
    dropped = pretrain(data, max_length=10, packing=False, truncation="delete")
    assert [piece[0] for piece in documents(dropped, tokenizer)] == ["b", "c"]
    assert dropped.report.left_out["longer than max_length"].count == 2


@pytest.mark.shared
@pytest.mark.parametrize("max_length", [1024, 4096])
def test_real_lengths_fill_the_packs(pretrain, max_length):
    files = [SHARED / "c4_demo.jsonl", SHARED / "wiki_demo.txt"]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{SHARED} is absent")
    part = pretrain(*files, max_length=max_length).report.train
    assert part.samples > 330
    assert part.efficiency >= 0.99
