"""The chat as a user sees it: lines in, text and result lines out."""

from __future__ import annotations

import io
import json

import pytest

from megatron_swift.infer.chat import Chat
from megatron_swift.infer.results import ResultFile

RULE = "-" * 50


@pytest.fixture
def talk(make_engine, tmp_path):
    """Run a chat on the lines; returns what was shown and the conversations that were written."""

    def run(
        text: str, *, template="chatml", stream=True, out=None, **options
    ) -> tuple[str, list[list[tuple[str, str]]]]:
        out = out if out is not None else io.StringIO()
        path = tmp_path / "results" / "r.jsonl"
        path.unlink(missing_ok=True)
        with ResultFile(path) as results:
            engine = make_engine(template, max_new_tokens=3, **options)
            Chat(engine, source=io.StringIO(text), out=out, results=results, stream=stream).run()
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for row in rows:
            assert row["response"] == row["messages"][-1]["content"]
        return out.getvalue(), [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in rows]

    return run


def asked(conversations) -> list[list[tuple[str, str]]]:
    """The turns without the model's."""
    return [[turn for turn in turns if turn[0] != "assistant"] for turns in conversations]


@pytest.mark.parametrize("stream", [True, False])
def test_turns(talk, stream):
    shown, conversations = talk("Hi\n\nAnd?\n  EXIT \nnever\n", stream=stream)
    (first, second) = conversations
    answers = [first[-1][1], second[-1][1]]
    assert shown == f"<<< {answers[0]}\n{RULE}\n<<< <<< {answers[1]}\n{RULE}\n<<< "
    assert second[: len(first)] == first
    assert asked(conversations) == [[("user", "Hi")], [("user", "Hi"), ("user", "And?")]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nclear\nb\nquit\n", [[("user", "a")], [("user", "b")]]),
        ("a", [[("user", "a")]]),
        ("multi-line\na\nb#\nclear#\nc #x\nd# \nsingle-line#\nEXIT\n", [[("user", "a\nb")], [("user", "c #x\nd")]]),
        ("a\nreset-system\nBe brief.\nb\n", [[("user", "a")], [("system", "Be brief."), ("user", "b")]]),
        ("reset-system\nX\nreset-system\nDefault-System\nb\n", [[("user", "b")]]),
        ("reset-system\n\nb\n", [[("user", "b")]]),
        ("reset-system\n", []),
        ("multi-line\nnever ended\n", []),
        ("tool: 5\nb\n", [[("user", "b")]]),
        ("x " * 600 + "\nb\n", [[("user", "b")]]),
    ],
)
def test_commands(talk, text, expected):
    assert asked(talk(text)[1]) == expected


def test_prompts(talk):
    shown, _ = talk("reset-system\nX\nmulti-line\nreset-system#\nY#\nsingle-line#\n")
    assert shown == "<<< <<<[S] <<< <<<[M] <<<[MS] <<<[M] <<< "


def test_systems(talk):
    options = {"system": "Given."}
    assert asked(talk("a\nreset-system\n\nb\nreset-system\ndefault-system\nc\n", **options)[1]) == [
        [("system", "Given."), ("user", "a")],
        [("user", "b")],
        [("system", "Given."), ("user", "c")],
    ]


def test_errors_are_shown_and_forgotten(talk):
    shown, conversations = talk("a\n" + "x " * 600 + "\nb\n")
    assert "error: the prompt has" in shown and "`clear`" in shown
    assert asked(conversations)[1] == [("user", "a"), ("user", "b")]


def test_single_round_template_keeps_no_history(talk):
    _, conversations = talk("a\nreset-system\nb\n", template="generation")
    assert asked(conversations) == [[("user", "a")], [("user", "b")]]


class Interrupting(io.StringIO):
    """Raises KeyboardInterrupt, as Ctrl-C does, once after the given text was shown."""

    def __init__(self, after: str):
        super().__init__()
        self.after = after

    def write(self, text: str) -> int:
        if self.after and self.getvalue().endswith(self.after):
            self.after = ""
            raise KeyboardInterrupt
        return super().write(text)


def test_interrupt_during_an_answer_ends_the_answer(talk):
    # The second write after the prompt is a later piece of the answer: "begun " is shown at once by the flush rule.
    shown, conversations = talk("a\nb\n", out=Interrupting("begun "), response_prefix="begun ")
    assert [turns[-1][1].startswith("begun ") for turns in conversations] == [True, True]
    assert shown.count(RULE) == 2


def test_interrupt_at_the_prompt_ends_the_chat(talk):
    shown, conversations = talk("a\nb\n", out=Interrupting(RULE + "\n"))
    assert shown.endswith(RULE + "\n\n") and len(conversations) == 1
