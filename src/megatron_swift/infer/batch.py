"""A data set answered: batches of prompts in, result lines and a measure of speed out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from megatron_swift.data.encode import OverLength
from megatron_swift.data.types import Conversation
from megatron_swift.infer.answer import Answer
from megatron_swift.infer.engine import Engine
from megatron_swift.infer.questions import LeftOut, Question
from megatron_swift.infer.results import ResultFile, as_json
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

RULE = "-" * 50
_PROGRESS_SECONDS = 10.0


@dataclass
class Totals:
    """What was done so far. matches: answers equal to their labels; labelled: answers that have labels."""

    num_samples: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    runtime: float = 0.0
    labelled: int = 0
    matches: int = 0

    def add(self, question: Question, answer: Answer) -> None:
        """Count one answer."""
        self.num_samples += 1
        self.num_prompt_tokens += len(answer.prompt)
        self.num_generated_tokens += answer.num_tokens
        if question.labels is not None:
            self.labelled += 1
            self.matches += answer.text.strip() == question.labels.strip()

    def line(self, *, accuracy: bool) -> str:
        """The closing line, ms-swift's names; seconds and tokens are those of generation, without loading."""
        seconds = max(self.runtime, 1e-9)
        shown = {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_samples": self.num_samples,
            "runtime": round(self.runtime, 3),
            "samples/s": round(self.num_samples / seconds, 3),
            "tokens/s": round(self.num_generated_tokens / seconds, 3),
        }
        if accuracy:
            shown["acc"] = round(self.matches / max(self.labelled, 1), 6)
        return f"[rank0] {json.dumps(shown)}"


def answer_all(
    engine: Engine,
    questions: Sequence[Question],
    *,
    batch_size: int,
    stream: bool,
    out: TextIO,
    results: ResultFile,
) -> Totals:
    """Answer the questions in order, `batch_size` at a time; each batch is on file before the next one begins.

    stream : show every question, label and answer on `out`. Prompts are all encoded first, so that one that cannot be
    answered is a DataError naming its file and line before anything is generated.
    """
    totals = Totals()
    pairs = _begin(engine, questions)
    started = said = time.monotonic()
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        if stream:
            for question, answer in batch:
                _show(engine, question, answer, out)
        else:
            engine.run([answer for _, answer in batch])
        for question, answer in batch:
            totals.add(question, answer)
            results.write(
                {
                    "response": answer.text,
                    "labels": question.labels,
                    "logprobs": None,
                    "finish_reason": answer.finish,
                    "messages": as_json(question.messages, answer.text),
                }
            )
        totals.runtime = time.monotonic() - started
        if time.monotonic() - said > _PROGRESS_SECONDS and not stream:
            said = time.monotonic()
            get_logger().info("infer: %d of %d rows answered", totals.num_samples, len(pairs))
    return totals


def _begin(engine: Engine, questions: Sequence[Question]) -> list[tuple[Question, Answer]]:
    pairs, left_out = [], LeftOut()
    for number, question in enumerate(questions):
        try:
            pairs.append((question, engine.begin(Conversation(question.messages, question.tools), number=number)))
        except OverLength as error:
            left_out.add(f"{question.where}: {error.what}")
        except DataError as error:
            raise DataError(f"{question.where}: {error.what}", why=error.why, do=error.do) from error
    left_out.report()
    if not pairs:
        raise DataError("no row is left to answer", why=left_out.first)
    return pairs


def _show(engine: Engine, question: Question, answer: Answer, out: TextIO) -> None:
    out.write(f"[QUERY] {question.messages[-1].content}\n")
    if question.labels is not None:
        out.write(f"[LABELS] {question.labels}\n")
    out.write("[RESPONSE] ")
    out.flush()
    for piece in engine.stream(answer):
        out.write(piece)
        out.flush()
    out.write(f"\n{RULE}\n")
    out.flush()
