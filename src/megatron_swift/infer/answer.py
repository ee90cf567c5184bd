"""One answer while it grows: tokens to text, where it ends, and which part of it may be shown already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Scripts written without spaces, with their punctuation: each character is shown at once.
_CJK = ((0x2E80, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x20000, 0x323AF))
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    ids   : tokens, never part of the text.
    cut   : texts of the template, cut off together with what follows.
    kept  : the user's stop words, which stay as the answer's end.
    """

    ids: frozenset[int]
    cut: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class Answer:
    """The answer to one prompt.

    prompt   : its tokens.  limit : longest answer in tokens.  number : which random stream it draws from.
    prefix   : how the reply was begun for the model; the text begins with it.
    text     : what was generated so far, in whole characters.  num_tokens : how many tokens, a stop token included.
    finish   : "" while it grows, then "stop" or "length".
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        number: int,
        decode: Callable[[Sequence[int]], str],
        stops: Stops,
        prefix: str = "",
    ) -> None:
        assert limit > 0, limit
        self.prompt, self.limit, self.number, self.stops = list(prompt), limit, number, stops
        self.text, self.finish, self.num_tokens = prefix, "", 0
        self.ids: list[int] = []
        self._decode = decode
        self._own = len(prefix)  # where the model's own text begins
        self._shown = 0
        # Text is decoded in windows: ids[_context:_done] is text already, and decides how the next token joins it.
        self._context = self._done = 0

    def push(self, token: int) -> None:
        """Take the model's next token."""
        assert not self.finish
        self.num_tokens += 1
        if token in self.stops.ids:
            self.end("stop")
            return
        self.ids.append(token)
        self._grow(last=False)
        if not self.finish and self.num_tokens == self.limit:
            self.end("length")

    def end(self, reason: str) -> None:
        """End the answer here; what waited for the rest of a character is shown as it is."""
        self._grow(last=True)
        self.finish = self.finish or reason

    def take(self) -> str:
        """The text to show next: up to the last space, line break or CJK character, everything once the answer has ended."""
        end = len(self.text) if self.finish else self._breaking_point(len(self.text) - self._held_back())
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _grow(self, *, last: bool) -> None:
        before = self._decode(self.ids[self._context : self._done])
        after = self._decode(self.ids[self._context :])
        if after.endswith(_INCOMPLETE) and not last:
            return
        start = len(self.text)
        self.text += after[len(before) :]
        self._context, self._done = self._done, len(self.ids)
        self._stop_at_text(start)

    def _stop_at_text(self, start: int) -> None:
        """End at the first stop text that reaches into the text from `start` on."""
        ends = []
        for words, kept in ((self.stops.cut, False), (self.stops.kept, True)):
            for word in words:
                at = self.text.find(word, max(start - len(word) + 1, self._own))
                if at >= 0:
                    ends.append((at, at + len(word) if kept else at))
        if ends:
            self.text = self.text[: min(ends)[1]]
            self.finish = "stop"

    def _held_back(self) -> int:
        """Characters at the end that may turn out to be the beginning of a text that is cut off."""
        longest = 0
        for word in self.stops.cut:
            for size in range(min(len(word) - 1, len(self.text)), longest, -1):
                if self.text.endswith(word[:size]):
                    longest = size
                    break
        return longest

    def _breaking_point(self, end: int) -> int:
        for at in range(end, self._shown, -1):
            if self.text[at - 1] in " \n" or _is_cjk(self.text[at - 1]):
                return at
        return self._shown


def _is_cjk(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CJK)
