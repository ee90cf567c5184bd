"""What is settled before a rank starts: dtype, length, model parameters, banner; all of it without torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from runs import set_up, write_rows

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.commands.setup import choose_dtype, system_text, train_iters
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    make_tiny_model(folder / "model", dtype="bfloat16")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def prepare(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(*flags, **kwargs):
        base = ("--model", str(place / "model"), "--dataset", str(place / "rows.jsonl"), "--train_iters", "6")
        return set_up(*base, *flags, **kwargs)

    return start


DTYPES = [
    ((), "bfloat16"),
    (("--torch_dtype", "float32"), "float32"),
    (("--torch_dtype", "float16"), "float16"),
    (("--fp16", "true"), "float16"),
    (("--bf16", "true", "--torch_dtype", "float32"), "bfloat16"),
    (("--bf16", "false"), "float32"),
    (("--fp16", "false"), "bfloat16"),
    (("--fp16", "false", "--torch_dtype", "float16"), "float32"),
]


@pytest.mark.parametrize(("flags", "dtype"), DTYPES)
def test_dtype(prepare, flags, dtype):
    assert prepare(*flags).dtype == dtype


def test_dtype_of_a_float32_model(prepare):
    setup = prepare()
    args = parse(SftArguments, [])
    assert choose_dtype(args, setup.model.replace(dtype="float32")) == "float32"


@pytest.mark.parametrize(
    ("flags", "rows", "iters"),
    [
        (["--train_iters", "7"], 10, 7),
        (["--max_epochs", "1", "--global_batch_size", "4"], 10, 2),
        (["--max_epochs", "3", "--global_batch_size", "4"], 10, 7),
        (["--max_epochs", "1", "--global_batch_size", "16"], 10, 1),
        (["--train_iters", "2", "--global_batch_size", "5", "--dataloader_type", "single"], 10, 2),
    ],
)
def test_iterations(flags, rows, iters):
    assert train_iters(parse(SftArguments, flags), rows) == iters


def test_a_single_pass_is_too_short():
    args = parse(SftArguments, ["--train_iters", "3", "--global_batch_size", "4", "--dataloader_type", "single"])
    with pytest.raises(UsageError, match="10 rows are 2 iterations of --global_batch_size 4, not 3"):
        train_iters(args, 10)


def test_system_text(tmp_path):
    (tmp_path / "s.txt").write_text("from a file\n")
    assert [system_text(t) for t in (None, "", "a\\nb", str(tmp_path / "s.txt"))] == [None, "", "a\nb", "from a file"]
    with pytest.raises(UsageError, match="cannot be read"):
        system_text("missing.txt")


def test_model_parameters_win(prepare, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("megatron_swift"), "propagate", True)
    setup = prepare("--rotary_base", "5000", "--norm_epsilon", "1e-5", "--untie_embeddings_and_output_weights", "true")
    assert (setup.model.rotary_base, setup.model.norm_epsilon, setup.model.tied_embeddings) == (5000, 1e-5, False)
    assert "model parameter rotary_base: 5000.0 instead of config.json's 10000.0" in caplog.text
    assert len({text for text in caplog.messages if text.startswith("model parameter")}) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--use_chat_template", "false"), "generation (use_chat_template is false)"),
        (("--template_backend", "jinja"), "jinja (as told by --template_backend)"),
        (("--template", "chatml"), "chatml (as told by --template)"),
    ],
)
def test_why_that_template(prepare, capsys, flags, words):
    prepare(*flags)
    assert words in capsys.readouterr().out


def test_banner(prepare, capsys):
    prepare("--lr_warmup_iters", "2", "--global_batch_size", "8", "--split_dataset_ratio", "0.1", ranks=2)
    out = capsys.readouterr().out
    for line in (
        "2 layers, hidden 64, 0.1 M parameters",
        "in bfloat16, float32 masters",
        "chatml (by '<|im_start|>' in the model's chat template)",
        "micro 2 x data parallel 2 x accumulation 2 = global 8",
        "6 iterations = 2.18 passes over 22 rows",
        "cosine: 0 -> 0.01 in 2, to 0 at 6",
        "every 100 iterations, 100 global batches, of 2 rows",
    ):
        assert line in out
    assert "⟦" in out and "<|im_start|>user" in out


@pytest.mark.parametrize(
    ("flags", "kind", "words"),
    [
        (("--max_length", "1000"), UsageError, "--max_length 1000 is more than the model's 512"),
        (("--lr_warmup_iters", "6"), UsageError, "--lr_warmup_iters 6 must be below train_iters 6"),
        (("--template", "nonsense"), UsageError, "nonsense"),
        (("--num_attention_heads", "3"), UsageError, "num_attention_heads"),
        (("--padded_vocab_size", "100"), UsageError, "vocabulary"),
        (
            ("--tensor_model_parallel_size", "2"),
            UsageError,
            "1 processes cannot be split by tensor_model_parallel_size 2",
        ),
        (("--model", "/nowhere"), UsageError, "is not an existing folder"),
        (("--load", "/nowhere"), UsageError, "does not exist"),
    ],
)
def test_errors_come_before_the_run_folder(prepare, tmp_path, flags, kind, words):
    with pytest.raises(kind, match=words):
        prepare(*flags, "--save", "out")
    assert not (tmp_path / "out").exists()


def test_compiling_without_a_compiler(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare("--torch_compile", "auto", "--save", "auto").run_dir is not None
    with pytest.raises(UsageError, match="--torch_compile true cannot be used here") as caught:
        prepare("--torch_compile", "true", "--save", "out")
    assert "install one (`apt install " in caught.value.why
    assert not (tmp_path / "out").exists()


def test_compiling_excludes_fp8(prepare):
    with pytest.raises(UsageError, match="--torch_compile true excludes --fp8_format e4m3"):
        prepare("--torch_compile", "true", "--fp8_format", "e4m3")


def test_folder_without_weights_or_config(prepare, place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        prepare("--model", str(tmp_path / "empty"))
    make_tiny_model(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel.* is not supported"):
        prepare("--model", str(tmp_path / "odd"))


def test_needs_no_torch():
    code = "import sys, megatron_swift.commands.setup, megatron_swift.commands.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
