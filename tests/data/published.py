"""Conversations of our own and the published tokenizers and chat templates to compare with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(os.environ.get("TOKENIZERS") or "/tmp/tokenizers")
DATE = "05 Mar 2025"  # of datetime.date(2025, 3, 5)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place — now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}
CALLS = [
    {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}},
    {"name": "clock", "arguments": {}},
]
RESPONSES = ['{"sky": "grey"}', '{"hour": 7}']

QUERIES = ["Why is the sky blue?\n", "Und jetzt auf Deutsch: was ist 1 + 1 ?", "第三个问题 🙂"]
REPLIES = ["Because of Rayleigh scattering.", "Zwei.\n\n- eins\n- eins", "好的,没问题 👍"]
THOUGHTS = [
    "<think>\nThe user asks\nabout the sky.\n</think>\n\n",
    "<think>\nrechnen\n</think>\n\n",
    "<think>\n嗯\n</think>\n\n",
]
SYSTEM = "You answer briefly.\nAlways."


class Case(NamedTuple):
    """A template of ours beside the published one in a folder of FOLDER. thinks: its replies may begin with a thought."""

    template: str
    folder: str
    thinks: bool = False


CASES = (
    Case("qwen2_5", "Qwen2.5-Instruct"),
    Case("qwen3", "Qwen3", thinks=True),
    Case("llama3", "Llama-3-Instruct"),
    Case("llama3_2", "Llama-3.1-Instruct"),
    Case("deepseek_r1", "DeepSeek-R1-Distill-Qwen"),
    Case("deepseek_r1", "DeepSeek-R1-Distill-Llama"),
)


def folder(name: str) -> Path:
    """A published tokenizer's folder; the test is skipped where it is absent."""
    path = FOLDER / name
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"{path} is absent: bash ../shared/assets/get_tokenizers.sh {FOLDER}")
    return path


def chat(
    rounds: int, *, system: str | None = None, thinking: bool = False, open_end: bool = False
) -> list[dict[str, Any]]:
    """A conversation in the form that transformers takes; open_end: without its last reply."""
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for number in range(rounds):
        turns.append({"role": "user", "content": QUERIES[number]})
        thought = THOUGHTS[number] if thinking else ""
        turns.append({"role": "assistant", "content": thought + REPLIES[number]})
    return turns[:-1] if open_end else turns


class Reference:
    """transformers' own tokenizer of a folder."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(path))

    def ids(self, turns: list[dict[str, Any]], *, reply: bool = False, **options: Any) -> list[int]:
        """The tokens of the published template, its text tokenised as one."""
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=reply, date_string=DATE, **options
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Recorded:
    """A tokenizer that knows only the texts recorded from a published one, for machines that do not have that.

    It has the part of `data.tokenizer.Tokenizer` that encoding uses; a text that was not recorded is a KeyError.
    """

    folder = "recorded"
    adds_bos = False

    def __init__(self, record: dict[str, Any]) -> None:
        self.texts: dict[str, list[int]] = record["texts"]
        self.bos_token_id, self.eos_token_id = record["bos"], record["eos"]

    def encode(self, text: str) -> list[int]:
        return self.texts[text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.texts[text] for text in texts]


class Spy:
    """A tokenizer that remembers what it encoded, to make a record of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.texts[text] = self.tokenizer.encode(text)
        return self.texts[text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def golden_conversations(case: Case) -> list[tuple[str, list[dict[str, Any]], str, list[dict[str, Any]] | None]]:
    """(name, messages, loss_scale, tools) of what is recorded for a template; the last reply is to be trained."""
    found: list[tuple[str, list[dict[str, Any]], str, list[dict[str, Any]] | None]] = []
    for rounds, system in ((1, None), (1, SYSTEM), (3, SYSTEM)):
        for loss_scale in ("default", "last_round", "all"):
            name = f"{rounds}-{'system' if system else 'plain'}-{loss_scale}"
            found.append((name, stripped(case, chat(rounds, system=system)), loss_scale, None))
    if case.thinks:
        found.append(("3-thinking-last_round", chat(3, thinking=True), "last_round", None))
    if case.template in AGENT_OF:
        found.append(("tools-default", stripped(case, tool_chat(case)), "default", [WEATHER, CLOCK]))
    return found


AGENT_OF = {"qwen2_5": "hermes", "qwen3": "hermes", "llama3_2": "llama3"}


def tool_chat(case: Case, *, calls: int = 2) -> list[dict[str, Any]]:
    """A question, calls of tools in one turn (one for Llama, whose template takes no more), responses, and a reply."""
    calls = 1 if AGENT_OF.get(case.template) == "llama3" else calls
    thought = THOUGHTS[1] if case.thinks else ""
    made = [{"type": "function", "function": call} for call in CALLS[:calls]]
    turns: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUERIES[0]}]
    turns.append({"role": "assistant", "content": thought, "tool_calls": made})
    turns += [{"role": "tool", "content": response} for response in RESPONSES[:calls]]
    turns.append({"role": "assistant", "content": (THOUGHTS[2] if case.thinks else "") + REPLIES[2]})
    return turns


def stripped(case: Case, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Llama's templates strip what they are given, ours do not: the same text for both."""
    if not case.template.startswith("llama"):
        return turns
    return [{**turn, "content": turn["content"].strip()} for turn in turns]
