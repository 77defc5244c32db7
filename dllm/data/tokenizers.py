"""Text as bytes to token numbers and back: byte, char, word and byte-level BPE.

A tokenizer is built from counts of units (characters, words or pre-tokens), so that ranks can count their own text and
merge counts; text itself never has to travel. Round trips are exact for byte and bpe, and for char where every character
is known.

To add one: a class with the methods of Tokenizer (tokenizer.py), its name in KINDS, its line in the help of prepare.py.
`encode` sees a text in pieces that are cut behind a line or white space. What `spell` says of single tokens, one behind the
other, must be the text of all together.

For pairs of texts every tokenizer has two tokens more, behind those of text: `sep` between source and target, `end` behind the
target. They have no spelling, so that no text is ever encoded as one of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.types import Array
from .checked_tokens import LONGEST_TOKEN, MOST_TOKENS, check_tokens, checked_merges
from .pretokens import BLOCK, Pretokens, find_merges, letters
from .sound_tokenizers import MelTokenizer, MulawTokenizer
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import Tokens

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
FEW = 1 << 22  # pre-tokens of which the library builds a vocabulary sooner than our kernel is compiled


class UnknownUnitError(UserError):
    """A unit that a vocabulary lacks."""

    def __init__(self, unit: str, kind: str, size: int) -> None:
        super().__init__(f"{unit!r} is not in the vocabulary of {size} {kind}s; use text of the same corpus")
        self.kind, self.size = kind, size

    def within(self, place: str) -> UserError:
        """The error that names a place instead of the unit: a text may be private, and a message is seen by others."""
        return UserError(
            f"{place} has a {self.kind} that is not among the vocabulary's {self.size}, which has no {UNKNOWN}; "
            "use text of the same corpus, or a vocabulary of bytes or of bpe"
        )


class ByteTokenizer(Tokenizer):
    """256 tokens; any file at all."""

    kind, exact, fixed, text_size = "byte", True, True, 256

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        if size not in (0, 256):
            raise UserError(f"--vocab-size {size}: the byte tokenizer has 256 tokens; leave the option out")
        return cls()

    def encode(self, data: bytes, end: bool = True) -> Array:
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode_text(self, tokens: Tokens) -> bytes:
        return np.asarray(tokens, np.uint8).tobytes()

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        return cls()


class UnitTokenizer(Tokenizer):
    """A list of units in which a unit's place is its number; `<unk>` stands for the others where it is in the list."""

    def __init__(self, units: list[str]) -> None:
        self.units, self.text_size = units, len(units)
        self.numbers = {unit: number for number, unit in enumerate(units)}
        self.unknown = self.numbers.get(UNKNOWN)

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        ranked = sorted((unit for unit in counts if len(unit) <= LONGEST_TOKEN), key=lambda unit: (-counts[unit], unit))
        if (size and len(ranked) > size) or unseen or len(ranked) < len(counts):
            ranked = [UNKNOWN, *(unit for unit in ranked if unit != UNKNOWN)]
        ranked = ranked[: size or None]
        if len(ranked) > MOST_TOKENS:
            raise UserError(f"the text has {len(ranked):,} {cls.kind}s: keep the most frequent {MOST_TOKENS:,} by --vocab-size")
        return cls(ranked)

    def _missing(self, unit: str) -> UnknownUnitError:
        return UnknownUnitError(unit, self.unit, self.text_size)

    def vocabulary(self) -> dict[str, Any]:
        return {"units": self.units}

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        units = value["units"]
        if not isinstance(units, list):
            raise TypeError("its units are no list")
        check_tokens(units)
        return cls(units)


class CharTokenizer(UnitTokenizer):
    """One token a Unicode character."""

    kind = unit = "char"
    of_every_text = ("\n",)

    def __init__(self, units: list[str]) -> None:
        super().__init__(units)
        self._table = np.full(0x110000, -1 if self.unknown is None else self.unknown, np.int64)
        for unit, number in self.numbers.items():
            if len(unit) == 1:
                self._table[ord(unit)] = number
        self._bytes = [unit.encode() for unit in units]

    @staticmethod
    def count(data: bytes, end: bool = True) -> Counter[str]:
        found = np.bincount(np.frombuffer(data.decode().encode("utf-32-le"), np.uint32))
        return Counter({chr(point): int(found[point]) for point in np.flatnonzero(found)})

    def encode(self, data: bytes, end: bool = True) -> Array:
        points = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        tokens = self._table[points]
        if (tokens < 0).any():
            raise self._missing(chr(points[np.argmax(tokens < 0)]))
        return tokens

    def decode_text(self, tokens: Tokens) -> bytes:
        return b"".join(self._bytes[token] for token in tokens)


class WordTokenizer(UnitTokenizer):
    """Words between white space, and one `<eos>` a line, which is predicted too, as the published figures count."""

    kind = unit = "word"
    of_every_text = (END_OF_LINE,)

    @staticmethod
    def count(data: bytes, end: bool = True) -> Counter[str]:
        return Counter(WordTokenizer._words(data, end))

    @staticmethod
    def _words(data: bytes, end: bool) -> Iterator[str]:
        lines = data.decode().split("\n")
        last = lines.pop()
        for line in lines:
            yield from line.split()
            yield END_OF_LINE
        yield from last.split()
        if end and last:
            yield END_OF_LINE

    def encode(self, data: bytes, end: bool = True) -> Array:
        numbers, unknown = self.numbers, self.unknown
        tokens = [numbers.get(word, unknown) for word in self._words(data, end)]
        if unknown is None and None in tokens:
            raise self._missing(next(word for word in self._words(data, end) if word not in numbers))
        return np.array(tokens, np.int64)

    def decode_text(self, tokens: Tokens) -> bytes:
        words = [self.units[token] for token in tokens]
        return "".join("\n" if word == END_OF_LINE else word + " " for word in words).replace(" \n", "\n").encode()

    def spell(self, token: int, behind: bool = False) -> tuple[bytes, bool]:
        if token >= self.text_size or self.units[token] == END_OF_LINE:
            return self.decode([token]), False
        return (" " * behind + self.units[token]).encode(), True


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, GPT-2's bytes) by the `tokenizers` library."""

    kind, unit = "bpe", "piece"
    DEFAULT_SIZE = 4096

    fast_from = 1 << 16  # bytes of text from which kernels are worth their start

    def __init__(self, model: Any) -> None:
        self._model, self.text_size = model, model.get_vocab_size()
        self._pretokens = Pretokens(self._splitter(), lambda texts: [one.ids for one in model.encode_batch_fast(texts)])

    @classmethod
    def warm_up(cls) -> None:
        cls._counter().count("warm")
        cls.fast_from = 1

    @staticmethod
    def _blank() -> Any:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        blank = Library(models.BPE())
        blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        blank.decoder = decoders.ByteLevel()
        return blank

    @staticmethod
    @functools.cache
    def _splitter() -> Any:
        return BPETokenizer._blank().pre_tokenizer

    @staticmethod
    @functools.cache
    def _counter() -> Pretokens:
        return Pretokens(BPETokenizer._splitter())

    @staticmethod
    def count(data: bytes, end: bool = True) -> Counter[str]:
        if len(data) >= BPETokenizer.fast_from:
            return BPETokenizer._counter().count(data.decode())
        counts: Counter[str] = Counter()
        split = BPETokenizer._splitter()
        for text in _blocks(data.decode()):
            counts.update(text[start:stop] for _, (start, stop) in split.pre_tokenize_str(text))
        return counts

    @classmethod
    def build(cls, counts: Mapping[str, int], size: int, unseen: bool = False) -> Tokenizer:
        from tokenizers import models, pre_tokenizers, trainers

        size = size or cls.DEFAULT_SIZE
        if size < 256:
            raise UserError(f"--vocab-size {size}: bpe needs at least 256, one token for each byte")
        if size > MOST_TOKENS // 4:
            raise UserError(f"--vocab-size {size}: bpe has at most {MOST_TOKENS // 4:,} tokens")
        model, alphabet = cls._blank(), sorted(pre_tokenizers.ByteLevel.alphabet())
        if sum(counts.values()) > FEW:
            model.model = models.BPE(*find_merges(counts, size, LONGEST_TOKEN))
            return cls(model)
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=LONGEST_TOKEN
        )
        units = itertools.chain.from_iterable(itertools.repeat(unit, counts[unit]) for unit in sorted(counts))
        model.train_from_iterator(iter(lambda: list(itertools.islice(units, 10000)), []), trainer)
        return cls(model)

    def encode(self, data: bytes, end: bool = True) -> Array:
        if len(data) >= self.fast_from:
            return self._pretokens.encode(data.decode())
        parts = self._model.encode_batch_fast(list(_blocks(data.decode())))
        return np.array([number for part in parts for number in part.ids], np.int64)

    def decode_text(self, tokens: Tokens) -> bytes:
        return b"".join(self._pieces[token] for token in tokens)

    @property
    def _pieces(self) -> list[bytes]:
        if not hasattr(self, "_cached_pieces"):
            byte_of = letters()
            names = [self._model.id_to_token(number) for number in range(self.text_size)]
            self._cached_pieces = [bytes(byte_of[letter] for letter in name) for name in names]
        return self._cached_pieces

    def vocabulary(self) -> dict[str, Any]:
        return {"model": json.loads(self._model.to_str())}

    @classmethod
    def of_vocabulary(cls, value: Mapping[str, Any]) -> Tokenizer:
        from tokenizers import Tokenizer as Library

        parts = json.loads(cls._blank().to_str())  # text is split as `_blank` does
        model = value["model"]["model"]
        parts["model"] |= {"vocab": model["vocab"], "merges": checked_merges(model["vocab"], model["merges"])}
        if parts["model"] | model != parts["model"] | {"merges": model["merges"]}:
            raise ValueError("it is no byte-level BPE")
        return cls(Library.from_str(json.dumps(parts)))


def _blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """`text` in blocks that end with a line; the library's time grows faster than the length of what it gets."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + size)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop


KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, WordTokenizer, BPETokenizer, MulawTokenizer, MelTokenizer)
}

OF_SOUND = (MulawTokenizer.kind, MelTokenizer.kind)  # they read recordings


def load(value: Mapping[str, Any], source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a dict made by `to_json`. Raises UserError that names `source`, the file it came from.

    Every number below `size` must be a token's, so that no text encodes to one beyond.
    """
    try:
        tokenizer = KINDS[value["kind"]].from_json(value)
        tokenizer.decode(range(tokenizer.size))
        return tokenizer
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        why = f": {error}" if type(error) in (ValueError, TypeError) else ""
        raise UserError(f"{source} holds no tokenizer that this version knows{why:.200}; prepare the data anew") from None
