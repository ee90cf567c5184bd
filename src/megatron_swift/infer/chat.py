"""The conversation at the terminal: commands, history, and answers shown while they grow."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO

from megatron_swift.data.types import Message
from megatron_swift.infer.batch import RULE
from megatron_swift.infer.engine import Engine
from megatron_swift.infer.results import ResultFile, as_json
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

HELP = (
    "Input `exit` or `quit` to exit the conversation.",
    "Input `multi-line` to switch to multi-line input mode: an input then ends with `#` at the end of a line. "
    "Input `single-line` to switch back.",
    "Input `reset-system` to reset the system and clear the history; `default-system` as the new system restores the default.",
    "Input `clear` to clear the history.",
)
TOOL = "tool:"


class Chat:
    """One conversation after another between `source` (lines) and the model, shown on `out`.

    Each answered turn is written to `results`. Ctrl-C during an answer ends that answer, at the prompt the chat.
    """

    def __init__(self, engine: Engine, *, source: TextIO, out: TextIO, results: ResultFile, stream: bool) -> None:
        self.engine, self.source, self.out, self.results, self.stream = engine, source, out, results, stream
        self.history: list[Message] = []
        self.system: str | None = None  # None: the options' or the template's
        self.multi_line = False
        self.turns = 0

    def run(self) -> None:
        """Talk until exit, quit or the end of the input."""
        for line in HELP:
            get_logger().info(line)
        try:
            while (text := self._read("")) is not None and self._handle(text):
                pass
        except KeyboardInterrupt:
            self._say("\n")

    def _handle(self, text: str) -> bool:
        """Obey or answer one input; False ends the chat."""
        command = text.strip().lower()
        if command in ("exit", "quit"):
            return False
        if command == "clear":
            self.history = []
        elif command == "multi-line":
            self.multi_line = True
        elif command == "single-line":
            self.multi_line = False
        elif command == "reset-system":
            return self._reset_system()
        elif command:
            self._answer(text)
        return True

    def _reset_system(self) -> bool:
        if self.engine.template.system_prefix is None:
            get_logger().warning(
                "the template '%s' has no place for a system prompt: nothing is reset", self.engine.template.name
            )
            return True
        system = self._read("S")
        if system is None:
            return False
        self.system = None if system.strip().lower() == "default-system" else system.strip()
        self.history = []
        return True

    def _answer(self, text: str) -> None:
        if text[: len(TOOL)].lower() == TOOL:
            question = Message("tool_response", text[len(TOOL) :].strip())
        else:
            question = Message("user", text)
        messages = [*self.history, question]
        try:
            answer = self.engine.begin(messages, number=self.turns, system=self.system)
        except DataError as error:
            self._say(f"{error.block()}\n")
            if self.history:
                self._say("(`clear` starts a new conversation)\n")
            return
        self.turns += 1
        # A second Ctrl-C while the first one is being handled ends the chat.
        try:
            for piece in self.engine.stream(answer):
                if self.stream:
                    self._say(piece)
        except KeyboardInterrupt:
            answer.end("interrupted")
        self._say((answer.take() if self.stream else answer.text) + f"\n{RULE}\n")
        system = self.engine.options.system if self.system is None else self.system
        opening = [Message("system", system)] if system else []
        self.results.write(
            {
                "response": answer.text,
                "finish_reason": answer.finish,
                "messages": as_json([*opening, *messages], answer.text),
            }
        )
        if self.engine.template.single_round:
            self.history = []
        elif answer.text:
            self.history = [*messages, Message("assistant", answer.text)]
        else:
            get_logger().warning("the answer is empty: this turn is not kept in the conversation")

    def _read(self, mode: str) -> str | None:
        """The next input without its line end; None at the end of the source. mode "S" asks for a system prompt."""
        letters = ("M" if self.multi_line else "") + mode
        prompt = f"<<<[{letters}] " if letters else "<<< "
        if not self.multi_line:
            return self._line(prompt)
        lines: list[str] = []
        while (line := self._line("" if lines else prompt)) is not None:
            lines.append(line)
            if line.rstrip().endswith("#"):
                lines[-1] = line.rstrip()[:-1]
                return "\n".join(lines)
        return None

    def _line(self, prompt: str) -> str | None:
        if self.source is sys.stdin and self.source.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing for input())
            try:
                return input(prompt)
            except EOFError:
                return None
        self._say(prompt)
        line = self.source.readline()
        return line.rstrip("\r\n") if line else None

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
