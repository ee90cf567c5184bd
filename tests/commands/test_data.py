"""`megatron data show`: samples, report and histogram, on a terminal, in a pipe and as JSON, without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from megatron_swift.args.commands import DataShowArguments, InferArguments, SftArguments, parse
from megatron_swift.cli import main
from megatron_swift.commands import data
from megatron_swift.commands.chat_template import asked_template, chosen_template
from megatron_swift.data.jinja_template import JinjaTemplate
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import DataError, UsageError

ROWS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    {"messages": [{"role": "user", "content": "one"}]},
    {"messages": [{"role": "user", "content": "x " * 1000}, {"role": "assistant", "content": "three"}]},
    {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
            {"role": "tool_response", "content": "done"},
            {"role": "assistant", "content": "well"},
        ],
        "tools": [{"name": "f"}],
    },
]
FLAGS = ("--strict", "false", "--split_dataset_ratio", "0", "--dataset_shuffle", "false", "--max_length", "1500")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_tiny_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def show(place, monkeypatch, capsys):
    def run(*flags, model="model"):
        monkeypatch.chdir(place)
        data.show(parse(DataShowArguments, ["--dataset", "rows.jsonl", "--model", model, *FLAGS, *flags]), {})
        return capsys.readouterr()

    return run


def test_a_pipe_gets_marks(show):
    out, _ = show("--template", "qwen", "--num_samples", "5")
    assert "\x1b" not in out
    assert "--- sample 1\n" in out and "⟦two<|im_end|>↵⟧" in out
    assert '⟦<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>↵⟧' in out and "⟦well" in out
    assert "--- sample 3" not in out
    assert "template qwen" in out
    assert "4 rows read, 2 left out" in out
    assert "longer than max_length" in out and "rows.jsonl:3" in out and "rows.jsonl:2" in out
    assert "tokens  samples" in out and "█" in out


def test_a_terminal_gets_colour_unless_it_asks_not_to(place, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.chdir(place)
    args = parse(DataShowArguments, ["--dataset", "rows.jsonl", "--model", "model", "--template", "qwen", *FLAGS])
    for env, colour in (({}, True), ({"NO_COLOR": "1"}, False)):
        monkeypatch.setattr(sys, "stdout", Terminal())
        data.show(args, env)
        assert ("\x1b[32mtwo<|im_end|>" in sys.stdout.getvalue()) is colour
        assert ("⟦two" in sys.stdout.getvalue()) is not colour


def test_weights(show):
    out, _ = show("--template", "qwen", "--loss_scale", "hermes")
    assert "⟦×2 <tool_call>" in out and "⟦well<|im_end|>↵⟧" in out


def test_json(show):
    out, err = show("--template", "qwen", "--json", "true", "--num_samples", "1")
    [line] = out.splitlines()
    value = json.loads(line)
    assert len(value["input_ids"]) == len(value["labels"]) == value["num_tokens"]
    assert value["trained"][0][3] == "two<|im_end|>\n"
    assert [i for i in value["labels"] if i != -100] == value["input_ids"][slice(*value["trained"][0][:2])]
    assert "2 left out" in err and "tokens  samples" in err


def test_strict_and_split(show):
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        show("--template", "qwen", "--strict", "true")
    out, _ = show("--template", "qwen", "--truncation_strategy", "split", "--max_length", "100", "--loss_scale", "all")
    assert "longer than max_length" not in out
    samples = int(out.split("  train ")[1].split()[0])
    assert samples > 5


def test_picture(show, tmp_path):
    pytest.importorskip("matplotlib")
    show("--template", "qwen", "--histogram_png", str(tmp_path / "h.png"))
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_own_template(show, place):
    out, _ = show("--template_backend", "jinja")
    assert "template jinja" in out and "⟦two" in out


def test_a_folder_with_only_a_tokenizer(show, place):
    folder = place / "tokenizer_only"
    folder.mkdir()
    for path in (place / "model").iterdir():
        if path.name.startswith(("tokenizer", "special")):
            (folder / path.name).write_bytes(path.read_bytes())
    out, _ = show("--template", "llama3", model="tokenizer_only")
    assert "⟦two<|eot_id|>⟧" in out


def test_what_is_needed(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match="needs --dataset and --model"):
        data.show(parse(DataShowArguments, ["--model", "model"]), {})


def test_the_command_line(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main("megatron", ["data", "show", "--help"]) == 0
    assert "usage: megatron data show" in capsys.readouterr().out
    assert main("megatron", ["--help"]) == 0
    assert "data show" in capsys.readouterr().out
    assert main("megatron", ["data", "show", "--dataset", "rows.jsonl", "--model", "model", "--template", "qwen"]) == 3
    assert main("megatron", ["data"]) == 2
    assert "data show" in capsys.readouterr().err


def test_without_torch(place):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_swift.cli import main\n"
        f"sys.exit(main('megatron', ['data', 'show', '--dataset', 'rows.jsonl', '--model', 'model', '--template', 'qwen', *{FLAGS!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "⟦two<|im_end|>↵⟧" in done.stdout


def test_which_template_is_asked_for():
    assert asked_template(parse(SftArguments, [])) is None
    assert asked_template(parse(SftArguments, ["--template", "qwen"])) == "qwen"
    assert asked_template(parse(InferArguments, ["--use_chat_template", "false", "--template", "qwen"])) == "generation"
    assert asked_template(parse(SftArguments, ["--template_backend", "jinja"])) == "jinja"
    with pytest.raises(UsageError, match="--template qwen does not go with --template_backend jinja"):
        asked_template(parse(SftArguments, ["--template_backend", "jinja", "--template", "qwen"]))


def test_the_arguments_settle_the_template(place, tmp_path):
    tokenizer = Tokenizer.load(place / "model")

    def chosen(name, *flags):
        return chosen_template(parse(SftArguments, list(flags)), name, tokenizer)

    assert "Today Date: 30 Apr 2025" in chosen("llama3_2", "--template_date", "2025-04-30").prefix
    assert chosen("qwen3", "--enable_thinking", "false").response_prefix == "<think>\n\n</think>\n\n"
    assert chosen("qwen", "--agent_template", "react_en").agent_template == "react_en"
    plain = chosen("generation", "--use_chat_template", "false", "--enable_thinking", "true")
    assert plain.name == "generation"
    assert isinstance(chosen("jinja", "--template_backend", "jinja"), JinjaTemplate)
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import replace\nfrom megatron_swift.data.templates import TEMPLATES as OURS\n"
        "TEMPLATES = [replace(OURS['chatml'], name='mine', default_system='Hi.')]\n"
    )
    assert chosen("mine", "--custom_register_path", str(plugin)).default_system == "Hi."
    assert chosen("mine", "--external_plugins", str(plugin)).default_system == "Hi."
    for text, what in (("TEMPLATES = ['x']", "TEMPLATES holds 'x'"),):
        plugin = tmp_path / f"{what.split()[0]}.py"
        plugin.write_text(text)
        with pytest.raises(UsageError, match=what):
            chosen("qwen", "--custom_register_path", str(plugin))
