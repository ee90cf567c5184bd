"""Conversations to answers: `Engine` joins model, tokenizer, template and sampling."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_swift.data.encode import OverLength, encode_prompt, stop_ids, stop_strings
from megatron_swift.data.template import Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Conversation, Message
from megatron_swift.infer.answer import Answer, Stops
from megatron_swift.infer.kv_cache import CachedDecoder
from megatron_swift.infer.sampling import Sampling, choose, random_stream
from megatron_swift.models.decoder import Decoder
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the user decides, under the names of the parameters. system and response_prefix None: the template's own."""

    sampling: Sampling
    seed: int = 42
    max_new_tokens: int | None = None
    stop_words: tuple[str, ...] = ()
    system: str | None = None
    response_prefix: str | None = None
    max_length: int | None = None
    truncation: str | None = None


class Engine:
    """Answers conversations with a model. An answer depends on its conversation, its number and the options alone."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: Template, options: EngineOptions) -> None:
        self.model, self.tokenizer, self.template, self.options = model, tokenizer, template, options
        self.max_positions = model.cfg.max_position_embeddings
        prefix = options.response_prefix
        self.response_prefix = template.response_prefix if prefix is None else prefix
        self.stops = Stops(
            ids=frozenset(stop_ids(template, tokenizer)),
            cut=tuple(stop_strings(template, tokenizer)),
            kept=tuple(word for word in options.stop_words if word),
        )
        self._warned = False

    def begin(self, messages: Sequence[Message] | Conversation, *, number: int, system: str | None = None) -> Answer:
        """An empty answer to the conversation's last question.

        number : answers of one number draw the same random numbers. system : instead of the options' one.
        DataError where the conversation cannot be answered or is too long for the model; OverLength (a DataError) where
        it is longer than max_length and such prompts are to be dropped.
        """
        system = self.options.system if system is None else system
        prompt = encode_prompt(
            self.template, self.tokenizer, messages, system=system, response_prefix=self.response_prefix
        )
        prompt = self._fit(prompt)
        return Answer(
            prompt,
            limit=self._limit(len(prompt)),
            number=number,
            decode=self.tokenizer.decode,
            stops=self.stops,
            prefix=self.response_prefix,
        )

    def _fit(self, prompt: list[int]) -> list[int]:
        if not prompt:
            raise DataError("the prompt is empty", do="write a question")
        longest, truncation = self.options.max_length, self.options.truncation
        if longest is not None and len(prompt) > longest:
            what = f"the prompt has {len(prompt)} tokens, more than --max_length {longest}"
            if truncation == "delete":
                raise OverLength(what)
            if truncation not in ("left", "right"):
                raise DataError(
                    what, do="shorten it, raise --max_length, or choose --truncation_strategy left or right"
                )
            prompt = prompt[-longest:] if truncation == "left" else prompt[:longest]
        if len(prompt) >= self.max_positions:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the model knows {self.max_positions} positions",
                why="nothing would be left for the answer",
                do="shorten it, or use --max_length with --truncation_strategy left",
            )
        return prompt

    def _limit(self, prompt: int) -> int:
        left, wanted = self.max_positions - prompt, self.options.max_new_tokens
        if wanted is not None and wanted > left and not self._warned:
            self._warned = True
            get_logger().warning(
                "--max_new_tokens %d is lowered to %d: the model knows %d positions and the prompt takes %d",
                *(wanted, left, self.max_positions, prompt),
            )
        return left if wanted is None else min(wanted, left)

    def steps(self, answers: Sequence[Answer]) -> Iterator[None]:
        """Let the answers grow together, and yield after each token, until all have ended."""
        growing = list(answers)
        streams = [random_stream(self.options.seed, answer.number) for answer in growing]
        with CachedDecoder(self.model) as cached:
            logits = cached.prefill([answer.prompt for answer in growing])
            seen = self._seen(growing, logits)
            while True:
                tokens = self._next(logits, seen, streams)
                for answer, token in zip(growing, tokens.tolist(), strict=True):
                    answer.push(token)
                kept = [number for number, answer in enumerate(growing) if not answer.finish]
                yield
                if not kept:
                    return
                if len(kept) < len(growing):
                    growing, streams = [growing[i] for i in kept], [streams[i] for i in kept]
                    index = torch.tensor(kept, device=tokens.device)
                    tokens = tokens[index]
                    seen = None if seen is None else seen[index]
                    cached.keep(kept)
                logits = cached.step(tokens)

    def run(self, answers: Sequence[Answer]) -> None:
        """Let the answers grow together until all have ended."""
        for _ in self.steps(answers):
            pass

    def stream(self, answer: Answer) -> Iterator[str]:
        """The answer's text in pieces, each as soon as it may be shown."""
        for _ in self.steps([answer]):
            if piece := answer.take():
                yield piece

    def _seen(self, answers: Sequence[Answer], logits: Tensor) -> Tensor | None:
        """The tokens of the prompts, bool [batch, vocabulary]; None where no penalty needs them."""
        if self.options.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row, answer in zip(seen, answers, strict=True):
            row[torch.tensor(answer.prompt, device=logits.device)] = True
        return seen

    def _next(self, logits: Tensor, seen: Tensor | None, streams: Sequence[random.Random]) -> Tensor:
        sampling = self.options.sampling
        scores = sampling.scores(logits, seen)
        tokens = choose(scores, None if sampling.greedy else [stream.random() for stream in streams])
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens
