"""From token numbers to text while they come: characters of several tokens, stop strings, where in the text a token begins."""

import codecs
import functools
from dataclasses import dataclass

import numpy as np

from ..inference.answering import prompt as ask_for_target
from ..inference.generation import start_tokens


@dataclass(frozen=True)
class Piece:
    """A token whose text may be shown."""

    token: object  # of the engine
    start: int  # characters of text before it


class Text:
    """The text of one stream of tokens.

    Parameters
    ----------
    decode : callable
        Token numbers -> bytes.
    stops : sequence of str
        The text ends before the first of these; none is empty.
    """

    def __init__(self, decode, stops=()):
        self.decode, self.stops, self.ended = decode, stops, False
        self.longest = max(map(len, stops), default=0)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.sent, self.held, self.free = 0, "", 0  # characters given out; text that is not; how much of it may be
        self.waiting = []  # (start, end, token)

    def begin(self, data):
        """Take in the bytes of a prompt at once, whose tokens nobody wants to be told of."""
        self.held += self.decoder.decode(data)
        self.free = len(self.held)

    def add(self, token):
        """Take in a token; one of the prompt ends nothing. Returns whether the text has ended."""
        if self.ended:
            return True
        start = self.sent + len(self.held)
        self.held += self.decoder.decode(self.decode([token.number]))
        unfinished = bool(self.decoder.getstate()[0])  # it ends within a character, and is shown with it
        self.waiting.append((start, self.sent + len(self.held) + unfinished, token))
        if token.prompt:
            self.free = len(self.held)
            return False
        found = [place for place in (self.held.find(stop, self.free) for stop in self.stops) if place >= 0]
        if found:
            self.held, self.free, self.ended = self.held[: min(found)], min(found), True
        else:
            self.free = max(self.free, len(self.held) - self._begun())
        return self.ended

    def _begun(self):
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(len(self.held) - self.free, self.longest - 1), 0, -1):
            tail = self.held[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0

    def take(self, final=False):
        """(text, pieces) that may be shown and were not yet. final : nothing more will come."""
        if final and not self.ended:
            self.held += self.decoder.decode(b"", final=True)
            self.free = len(self.held)
        text, self.held = self.held[: self.free], self.held[self.free :]
        self.sent, self.free = self.sent + len(text), 0
        if self.ended:
            ready = [entry for entry in self.waiting if entry[0] < self.sent]
            self.waiting = []
        elif final:
            ready, self.waiting = self.waiting, []
        else:
            count = next((place for place, entry in enumerate(self.waiting) if entry[1] > self.sent), len(self.waiting))
            ready, self.waiting = self.waiting[:count], self.waiting[count:]
        return text, [Piece(token, start) for start, _, token in ready]


@dataclass(frozen=True)
class Prompt:
    """tokens (n,) int64, n at least 1. blank: nothing was written, and the one token stands for a beginning."""

    tokens: object
    blank: bool

    def __len__(self):
        return 0 if self.blank else len(self.tokens)


class Vocabulary:
    """A tokenizer, for text that comes and goes in pieces."""

    def __init__(self, tokenizer):
        self.tokenizer, self.size, self.end = tokenizer, tokenizer.size, tokenizer.end
        self.decode = tokenizer.decode
        self.name = functools.cache(self._name)

    def prompt(self, given):
        """The Prompt of a text, or of token numbers. Raises UserError where the vocabulary lacks something.

        A text that is given to a model of pairs is a source.
        """
        if isinstance(given, str) and self.tokenizer.pairs:
            return Prompt(ask_for_target(self.tokenizer, self.tokenizer.encode(given.encode(), False)), False)
        if isinstance(given, str):
            return Prompt(start_tokens(self.tokenizer, given), not given)
        return Prompt(np.array(given, np.int64), False)

    def echo(self, prompt):
        """The bytes of a prompt, token by token."""
        return b"".join(self.decode([number]) for number in prompt.tokens[prompt.blank :].tolist())

    def _name(self, number):
        """A token's text by itself; of bytes that are no characters by themselves, their values, in OpenAI's form."""
        data = self.decode([number])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
