"""Ids to text, one by one: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from fledge.tokenizer.bpe import Tokenizer


class TextStream:
    """Turns ids into text, one by one, so that all pieces joined are the final text.

    The bytes of an unfinished character are held until they are valid UTF-8; bytes that never will be
    become U+FFFD. Text that may be the start of a stop string is held until that is decided; the text
    ends before the stop string that is complete first (of several complete at once, the longest).
    In the text of the first `min_tokens` ids none is looked for, and one before which the text would not
    be whole (by `is_whole`: what a constraint says) is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        is_whole: Callable[[str], bool] | None = None,
    ) -> None:
        self.text = ""  # what was handed out so far
        self.stopped = False  # whether a stop string was found: nothing more will come
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._is_whole = is_whole
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._decoded_characters: list[int] = []  # after each id

    def push(self, token_id: int) -> str:
        """Add an id; returns the text that is now certain, "" often."""
        if self.stopped:
            return ""
        decoded = self._decoder.decode(self._bytes(token_id))
        before = self._decoded_characters[-1] if self._decoded_characters else 0
        self._decoded_characters.append(before + len(decoded))
        return self._take(decoded)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_ids:  # control tokens have no text, markup (<tool_call>) has
            return self._tokenizer.decode([token_id], skip_special=True).encode()
        return self._tokenizer.token_bytes(token_id)

    def finish(self) -> str:
        """The rest of the text: nothing more will be pushed."""
        rest = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    @property
    def num_ids(self) -> int:
        """How many of the ids the text needs: all, unless a stop string cut it."""
        if not self.stopped:
            return len(self._decoded_characters)
        return bisect_left(self._decoded_characters, len(self.text)) + 1 if self.text else 0

    @property
    def num_certain(self) -> int:
        """How many of the ids have all their text handed out."""
        return bisect_right(self._decoded_characters, len(self.text))

    def _take(self, decoded: str) -> str:
        if len(self._decoded_characters) <= self._min_tokens:
            self.text += decoded
            return decoded
        self._held += decoded
        found = self._find()
        if found is not None:
            piece, self._held, self.stopped = self._held[:found], "", True
        else:
            kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - kept
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece

    def _find(self) -> int | None:
        """Where the stop string that ends the text begins in what is held."""
        spans = []
        for stop in self._stop:
            start = self._held.find(stop)
            while start >= 0:
                spans.append((start + len(stop), start))
                start = self._held.find(stop, start + 1)
        whole = self._is_whole
        return next((s for _, s in sorted(spans) if whole is None or whole(self.text + self._held[:s])), None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper start of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
