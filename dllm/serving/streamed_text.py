"""From token numbers to text while they come: characters of several tokens, stop strings, where in the text a token begins."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from ..data.tokenizer import is_behind_word
from ..data.tokenizers import Tokenizer
from ..engines.requests import Token
from ..inference.generation import never_drawn, source_prompt, start_tokens
from ..kernels.types import Array

Spell: TypeAlias = Callable[[int, bool], tuple[bytes, bool]]


class PlacedToken(NamedTuple):
    """A token whose text may be shown, and where in the text it begins."""

    token: Token
    start: int  # characters of text before it
    behind: bool  # a word is right before it, see Tokenizer.spell


class Detokenizer:
    """The text of one stream of tokens, as far as it may be shown.

    Parameters
    ----------
    spell : callable
        Of a Tokenizer: token number, whether a word is right before it -> bytes, whether a word is right behind them.
    stops : sequence of str
        The text ends before the first of these; none is empty.
    behind : bool
        Whether a word is right before the text.
    places : bool
        Whether somebody wants to know the tokens; else `flush` gives text alone.

    Attributes
    ----------
    ended : bool
        Whether a stop string has come.
    """

    def __init__(self, spell: Spell, stops: Sequence[str] = (), behind: bool = False, places: bool = True) -> None:
        self.spell, self.stops, self.ended, self.behind = spell, stops, False, behind
        self._plain, self._bytes = not (stops or places), list[bytes]()  # all text may be shown at once; bytes of it
        self._longest = max(map(len, stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent, self._held, self._free = 0, "", 0  # characters given out; text that is not; how much of it may be
        self._waiting: list[tuple[int, int, Token, bool]] = []  # (start, end, token, behind)

    def begin(self, data: bytes, behind: bool) -> None:
        """Take in the bytes of a prompt at once, whose tokens nobody wants to have shown. behind : a word is at their end"""
        self._held += self._decoder.decode(data)
        self._free, self.behind = len(self._held), behind

    def add(self, token: Token) -> bool:
        """Take in a token; one of the prompt ends nothing. Returns whether the text has ended."""
        if self.ended:
            return True
        behind = self.behind
        data, self.behind = self.spell(token.number, behind)
        if self._plain:
            self._bytes.append(data)
            return False
        start = self._sent + len(self._held)
        self._held += self._decoder.decode(data)
        unfinished = bool(self._decoder.getstate()[0])  # it ends within a character, and is shown with it
        self._waiting.append((start, self._sent + len(self._held) + unfinished, token, behind))
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
        if self._plain:
            text, self._held = self._held + self._decoder.decode(b"".join(self._bytes), final), ""
            self._bytes.clear()
            return text, []
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
        return text, [PlacedToken(token, start, behind) for start, _, token, behind in ready]


@dataclass(frozen=True)
class Prompt:
    """What a stream begins with."""

    tokens: Array  # (n,) int64, n at least 1
    before: int = 0  # tokens at its beginning that nobody wrote: what stands for a beginning, or frames a source
    after: int = 0  # the same at its end
    behind: bool = False  # it ends with a word, and another one has to keep away from it

    def __len__(self) -> int:
        return len(self.tokens) - self.before - self.after

    @property
    def written(self) -> list[int]:
        """The tokens that somebody wrote."""
        tokens: list[int] = self.tokens[self.before : len(self.tokens) - self.after].tolist()
        return tokens


class Vocabulary:
    """A tokenizer, for text that comes and goes in parts.

    Attributes
    ----------
    size : int
        Tokens there are.
    end : int or None
        The token that ends a target; None: there are no pairs.
    spell : callable
        See Tokenizer.
    name : callable
        Token number, whether a word is right before it -> its text by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.size, self.end = tokenizer, tokenizer.size, tokenizer.end
        self.spell: Spell = tokenizer.spell
        self.name = functools.cache(self._name)

    def prompt(self, given: str | list[int]) -> Prompt:
        """The Prompt of a text, or of token numbers. Raises UserError where the vocabulary lacks something.

        A text that is given to a model of pairs is a source.
        """
        if isinstance(given, str) and self.tokenizer.pairs:
            return Prompt(source_prompt(self.tokenizer, given), 1, 1)
        tokens = self._tokens(given)
        if not len(tokens):
            return Prompt(start_tokens(self.tokenizer, ""), 1)
        behind = is_behind_word(given) if isinstance(given, str) else self.spell(given[-1], False)[1]
        return Prompt(tokens, behind=behind)

    def source(self, given: str | list[int]) -> Prompt:
        """The Prompt of a source that is read as a whole. Raises UserError where the vocabulary lacks something."""
        return Prompt(self._tokens(given))

    def target(self, given: str) -> Prompt:
        """The same of a target, without its end."""
        return Prompt(self._tokens(given))

    def ended(self, target: Prompt) -> list[int]:
        """The tokens of a target and its end."""
        assert self.end is not None
        return [*target.written, self.end]

    def never_drawn(self, bias: Sequence[tuple[int, float]]) -> tuple[int, ...]:
        """Tokens that no text has whose request does not name them by a bias."""
        return never_drawn(self.tokenizer, bias)

    def names(self, tokens: Iterable[int]) -> list[str]:
        """The texts of tokens in a row, each by itself."""
        found, behind = list[str](), False
        for token in tokens:
            found.append(self.name(token, behind))
            behind = self.spell(token, behind)[1]
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens in a row; bytes that are no characters become U+FFFD."""
        return self.tokenizer.spell_all(tokens)[0].decode(errors="replace")

    def _tokens(self, given: str | list[int]) -> Array:
        return self.tokenizer.encode(given.encode(), False) if isinstance(given, str) else np.array(given, np.int64)

    def _name(self, number: int, behind: bool) -> str:
        """Of bytes that are no characters by themselves their values, in OpenAI's form."""
        data, _ = self.spell(number, behind)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
