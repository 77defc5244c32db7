"""What every tokenizer does; tokenizers.py has those of text, sound_tokenizers.py those of sound."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels.types import Array
from .checked_tokens import checked_labels

Tokens = Sequence[int] | Array  # numbers of tokens, in a row


def is_behind_word(text: str) -> bool:
    """Whether a word that follows a text has to keep away from it: see Tokenizer.spell."""
    return text != "" and not text[-1].isspace()


class Tokenizer:
    """What every tokenizer does. `text_size` tokens are of text; `pairs`: there are `sep` and `end` too."""

    kind = ""
    unit = ""  # what is counted, in a word
    of_every_text: tuple[str, ...] = ()  # units that every text has: they say nothing of it, and need no counting
    exact = False  # takes bytes as they are; the others read text, which has neither byte-order marks nor CR LF
    fixed = False  # its tokens are known before any text: nothing is counted
    text_size = 0
    rate = 0  # samples a second of the sound that its tokens say; 0: they are of text
    bands = 0  # numbers of the frames that stand for tokens; 0: there are tokens
    pairs = False
    labels: tuple[str, ...] = ()  # what a model says of text, where it does; they are no tokens
    unknown: int | None = None  # the token that stands for what the vocabulary lacks

    @property
    def size(self) -> int:
        """The vocabulary size V."""
        return self.text_size + 2 * self.pairs

    @property
    def sep(self) -> int | None:
        """The token between a source and its target; None where there are no pairs."""
        return self.text_size if self.pairs else None

    @property
    def end(self) -> int | None:
        """The token behind a target, and before the next source; None where there are no pairs."""
        return self.text_size + 1 if self.pairs else None

    @staticmethod
    def count(data: bytes, end: bool = True) -> Counter[str]:
        """Counter of the units in `data`, bytes; `end` as in `encode`. Raises UnicodeDecodeError."""
        return Counter()

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        """The tokenizer of these counts with at most `size` tokens (0: as many as there are).

        unseen : other splits have units that the counts lack.
        """
        raise NotImplementedError

    @classmethod
    def warm_up(cls) -> None:
        """Load what `count` and `encode` need for much text."""

    def encode(self, data: bytes, end: bool = True) -> Array:
        """Token numbers of `data`, (n,) int64. `end`: the text ends here, it is not a piece of a longer one."""
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> bytes:
        """The bytes of token numbers; `sep` shows as a tab, `end` as a line's end."""
        if not self.pairs:
            return self.decode_text(tokens)
        shown = {self.sep: b"\t", self.end: b"\n"}
        groups = itertools.groupby(tokens, lambda token: shown.get(int(token)))
        return b"".join(self.decode_text(list(group)) if mark is None else mark * len([*group]) for mark, group in groups)

    def decode_text(self, tokens: Tokens) -> bytes:
        """The bytes of token numbers of text."""
        raise NotImplementedError

    def spell(self, token: int, behind: bool = False) -> tuple[bytes, bool]:
        """The bytes of one token more of a text, and whether it is a word that the next one has to keep away from.

        So the bytes of tokens, one behind the other, are those of all together, wherever the row is cut.

        behind : what was said of the token before; of a text that somebody else has written, `is_behind_word`
        """
        return self.decode([token]), False

    def spell_all(self, tokens: Tokens, behind: bool = False) -> tuple[bytes, bool]:
        """The same of tokens in a row."""
        parts = list[bytes]()
        for token in tokens:
            data, behind = self.spell(int(token), behind)
            parts.append(data)
        return b"".join(parts), behind

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict from which `load` makes the tokenizer again."""
        more: dict[str, Any] = {"pairs": True} if self.pairs else {"labels": [*self.labels]} if self.labels else {}
        return {"kind": self.kind, **self.vocabulary(), **more}

    def vocabulary(self) -> dict[str, Any]:
        """What `to_json` says of the tokens of text."""
        return {}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of what `to_json` gave; `load` is for a file that may be damaged."""
        tokenizer = cls.of_vocabulary(value)
        tokenizer.pairs = value.get("pairs", False) is True
        tokenizer.labels = checked_labels(value["labels"]) if "labels" in value else ()
        return tokenizer

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of what `vocabulary` said."""
        raise NotImplementedError
