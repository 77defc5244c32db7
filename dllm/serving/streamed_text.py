"""From token numbers to text while they come: characters of several tokens, stop strings, where in the text a token begins."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.tokenizers import Tokenizer
from ..inference.generation import source_prompt, start_tokens
from ..kernels.types import Array
from .requests import Token


@dataclass(frozen=True)
class PlacedToken:
    """A token whose text may be shown, and where in the text it begins."""

    token: Token
    start: int  # characters of text before it


class Detokenizer:
    """The text of one stream of tokens, as far as it may be shown.

    Parameters
    ----------
    decode : callable
        Token numbers -> bytes.
    stops : sequence of str
        The text ends before the first of these; none is empty.

    Attributes
    ----------
    ended : bool
        Whether a stop string has come.
    """

    def __init__(self, decode: Callable[[list[int]], bytes], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops, self.ended = decode, stops, False
        self._longest = max(map(len, stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent, self._held, self._free = 0, "", 0  # characters given out; text that is not; how much of it may be
        self._waiting: list[tuple[int, int, Token]] = []  # (start, end, token)

    def begin(self, data: bytes) -> None:
        """Take in the bytes of a prompt at once, whose tokens nobody wants to have shown."""
        self._held += self._decoder.decode(data)
        self._free = len(self._held)

    def add(self, token: Token) -> bool:
        """Take in a token; one of the prompt ends nothing. Returns whether the text has ended."""
        if self.ended:
            return True
        start = self._sent + len(self._held)
        self._held += self._decoder.decode(self.decode([token.number]))
        unfinished = bool(self._decoder.getstate()[0])  # it ends within a character, and is shown with it
        self._waiting.append((start, self._sent + len(self._held) + unfinished, token))
        if token.prompt:
            self._free = len(self._held)
            return False
        found = [place for place in (self._held.find(stop, self._free) for stop in self.stops) if place >= 0]
        if found:
            self._held, self._free, self.ended = self._held[: min(found)], min(found), True
        else:
            self._free = max(self._free, len(self._held) - self._begun())
        return self.ended

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(len(self._held) - self._free, self._longest - 1), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0

    def flush(self, final: bool = False) -> tuple[str, list[PlacedToken]]:
        """The text and the tokens that may be shown and were not yet. final : nothing more will come."""
        if final and not self.ended:
            self._held += self._decoder.decode(b"", final=True)
            self._free = len(self._held)
        text, self._held = self._held[: self._free], self._held[self._free :]
        self._sent, self._free = self._sent + len(text), 0
        if self.ended:
            ready = [entry for entry in self._waiting if entry[0] < self._sent]
            self._waiting = []
        elif final:
            ready, self._waiting = self._waiting, []
        else:
            count = next((place for place, entry in enumerate(self._waiting) if entry[1] > self._sent), len(self._waiting))
            ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return text, [PlacedToken(token, start) for start, _, token in ready]


@dataclass(frozen=True)
class Prompt:
    """What a stream begins with."""

    tokens: Array  # (n,) int64, n at least 1
    blank: bool  # nothing was written, and the one token stands for a beginning

    def __len__(self) -> int:
        return 0 if self.blank else len(self.tokens)


class Vocabulary:
    """A tokenizer, for text that comes and goes in parts.

    Attributes
    ----------
    size : int
        Tokens there are.
    end : int or None
        The token that ends a target; None: there are no pairs.
    decode : callable
        Token numbers -> bytes.
    name : callable
        Token number -> its text by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.size, self.end = tokenizer, tokenizer.size, tokenizer.end
        self.decode: Callable[[list[int]], bytes] = tokenizer.decode
        self.name = functools.cache(self._name)

    def prompt(self, given: str | list[int]) -> Prompt:
        """The Prompt of a text, or of token numbers. Raises UserError where the vocabulary lacks something.

        A text that is given to a model of pairs is a source.
        """
        if isinstance(given, str) and self.tokenizer.pairs:
            return Prompt(source_prompt(self.tokenizer, given), False)
        if isinstance(given, str):
            return Prompt(start_tokens(self.tokenizer, given), not given)
        return Prompt(np.array(given, np.int64), False)

    def source(self, given: str | list[int]) -> Prompt:
        """The Prompt of a source that is read as a whole. Raises UserError where the vocabulary lacks something."""
        tokens = self.tokenizer.encode(given.encode(), False) if isinstance(given, str) else np.array(given, np.int64)
        return Prompt(tokens, False)

    def target(self, given: str) -> Prompt:
        """The same of a target, without its end."""
        return Prompt(self.tokenizer.encode(given.encode(), False), False)

    def echo(self, prompt: Prompt) -> bytes:
        """The bytes of a prompt, token by token."""
        return b"".join(self.decode([number]) for number in prompt.tokens[prompt.blank :].tolist())

    def _name(self, number: int) -> str:
        """A token's text by itself; of bytes that are no characters by themselves, their values, in OpenAI's form."""
        data = self.decode([number])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
