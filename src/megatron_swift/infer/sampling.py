"""From logits to the next token. The filters and their order are those of transformers: penalty, temperature, top_k, top_p."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEFAULT_TOP_K = 50  # of transformers, where generation_config.json names none


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: always the likeliest. top_k 0, top_p 1, repetition_penalty 1: off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @staticmethod
    def settle(
        generation: Mapping[str, Any],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """The user's values (None: not given) over those of generation_config.json.

        Without a temperature of the user's, a model whose do_sample is not true takes the likeliest token.
        """

        def pick(given: float | None, name: str, default: float) -> float:
            value = generation.get(name) if given is None else given
            return default if value is None else value

        if temperature is None and not generation.get("do_sample"):
            temperature = 0.0
        return Sampling(
            temperature=float(pick(temperature, "temperature", 1.0)),
            top_k=int(pick(top_k, "top_k", DEFAULT_TOP_K)),
            top_p=float(pick(top_p, "top_p", 1.0)),
            repetition_penalty=float(pick(repetition_penalty, "repetition_penalty", 1.0)),
        )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    def describe(self) -> str:
        """One phrase for the start-up line."""
        penalty = f", repetition_penalty {self.repetition_penalty:g}" if self.repetition_penalty != 1 else ""
        if self.greedy:
            return f"greedy{penalty}"
        return f"temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}{penalty}"

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The filtered logits, -inf where a token is ruled out. logits float32 [batch, vocabulary].

        seen : bool [batch, vocabulary], the tokens of prompt and answer; may be None without a penalty.
        """
        if self.repetition_penalty != 1:
            assert seen is not None
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.greedy:
            return logits
        logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        return keep_top_p(logits, self.top_p) if self.top_p < 1 else logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of seen tokens divided by the penalty where positive, multiplied where negative (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all tokens below the k-th likeliest; those that tie with it stay."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out the unlikeliest tokens whose probabilities add up to 1 - p or less; the likeliest stays."""
    ordered, order = logits.sort(descending=False)
    out = ordered.softmax(-1).cumsum(-1) <= 1 - p
    out[..., -1] = False
    return logits.masked_fill(out.scatter(-1, order, out), float("-inf"))


def choose(scores: Tensor, uniforms: Sequence[float] | None) -> Tensor:
    """One token per row: int64 [batch]. None takes the likeliest; otherwise the inverse distribution at each number in [0, 1).

    The sum is in float64, so that no token of probability 0 is ever taken and the vocabulary's size does not matter.
    """
    if uniforms is None:
        return scores.argmax(-1)
    sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = sums[:, -1:]
    wanted = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * total
    wanted = wanted.minimum(total.nextafter(torch.zeros_like(total)))  # the product may round up to the total
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1)


def random_stream(seed: int, number: int) -> random.Random:
    """Random numbers of answer `number`: they do not depend on the device or on what is generated beside it."""
    return random.Random(f"{seed}/{number}")
