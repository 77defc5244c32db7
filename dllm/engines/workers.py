"""What each kind of model that reads sources does with a batch of them, step by step.

What a source gets does not depend on the others of its batch, to the bit: every element of a product is a sum over k in one
order (gemm.py), all else is done a row at a time, and what is behind a source's end does not count. `Finished.found` has

    targets that a search has found    (ended, logprob, score) of each, (3,n) float64; tokens (k,) int64 of each, the best first
    of a target that is given          the log-probability of each of its tokens and of its end, (n+1,) float64
    of a tagger                        the likeliest label at each token, (n,1) int64, and its probability, (n,1) float64
    of a classifier                    the likeliest labels, the first of them first, (1,k) int64, and theirs, (1,k) float64
    what is said in a recording        labels, (k,) int64
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..inference.generation import banned
from ..inference.search import Beam, steps
from ..inference.speech import BEAMS
from ..kernels.ctc import beam_search, log_probabilities
from ..kernels.softmax import IGNORE
from ..kernels.team import Team
from ..kernels.types import Array
from ..model.base import Model
from ..model.batch import Batch
from ..model.ctc import Ctc
from ..model.encoder_model import Classifier, EncoderModel
from ..model.seq2seq import Seq2Seq
from ..model.source_decoder import Kept, SourceDecoder
from .requests import Event, Finished, SourceRequest, Stream, Token

LANES = 64  # sources of a batch at most
MOST_LABELS = 100  # that are said of a text, of more the likeliest
BLOCK = 1 << 22  # logits of labels that are in memory at a time, as far as a step allows
NOT_FINITE = "the model gave numbers that are not finite"
News: TypeAlias = list[tuple[int, Event]]  # what has happened to which source of a batch


class Servable(Protocol):
    """What makes the model that a worker works with: a LoadedModel of inference/loaded_model.py, or whatever else can."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""

    def network(self, window: int, lanes: int, team: Team) -> Model:
        """A Model with parameters."""


class Worker(ABC):
    """One kind of model at work.

    Parameters
    ----------
    source : Servable
        Makes the model.
    rows : int
        Tokens or frames that the sources of a batch have at most, filled up to the longest.
    slots : int
        Texts that are written at a time at most.
    threads : int
    precision : "fp32", "bf16" or "int8"
        Of what writes texts; sources are read as the model is.
    """

    def __init__(self, source: Servable, rows: int, slots: int, threads: int, precision: str = "fp32") -> None:
        self.tokenizer, lanes = source.tokenizer, min(LANES, slots)
        window = -(-rows // lanes)
        self.rows, self.lanes, self.end = window * lanes, lanes, self.tokenizer.end
        self.vocabulary = 0
        self._make(source.network(window, lanes, Team(threads)), slots, precision)

    @abstractmethod
    def _make(self, model: Model, slots: int, precision: str) -> None:
        """Keep the model. Raises UserError where it is of another kind."""

    @abstractmethod
    def check(self, request: SourceRequest) -> None:
        """Raise ValueError where that is nothing for this model. From any thread."""

    @abstractmethod
    def run(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        """What happens to each stream, step by step. One that has ended meanwhile wants nothing more.

        Between two steps another `run` may go on, where this one's state is kept and restored.

        Raises ArithmeticError where the model's numbers are not finite.
        """

    @abstractmethod
    def fits(self, request: SourceRequest, found: Sequence[Array]) -> bool:
        """Whether that can be the `found` of a request: another rank has said it."""

    @abstractmethod
    def example(self) -> list[SourceRequest]:
        """Requests that reach every kernel."""

    def together(self, request: SourceRequest) -> Hashable:
        """Equal for requests that can be in one batch."""
        return None

    def keep(self) -> Any:
        """What the `run` under way needs to go on when another was in between; of a single step nothing."""
        return None

    def restore(self, kept: Any) -> None:  # what keeps nothing has nothing to restore
        """Let the `run` that has this from `keep` be the one under way."""

    def warm_up(self) -> None:
        """Run every kernel once: all are compiled then, or loaded from the cache."""
        for request in self.example():
            for _ in self.run([Stream(request, lambda news: None, lambda stream: None)]):
                pass


class Targets(Worker):
    """Writes targets of sources, or says how probable given ones are."""

    def _make(self, model: Model, slots: int, precision: str) -> None:
        if not isinstance(model, Seq2Seq) or self.tokenizer.sep is None or self.tokenizer.end is None:
            raise UserError(f"targets are of models of kind seq2seq, not of {model.config.kind}")
        self.decoder = SourceDecoder(model, slots, self.tokenizer.sep, precision)
        self.never = banned(self.tokenizer)
        self.vocabulary = model.vocabulary

    def check(self, request: SourceRequest) -> None:
        for tokens in (request.source, request.target):
            if tokens is not None and tokens.size:
                _check_tokens(tokens, self.vocabulary)

    def together(self, request: SourceRequest) -> Hashable:
        if request.target is not None:
            return "given"
        return (request.beams, request.best, request.max_tokens) if request.beams > 1 else "greedy"

    def keep(self) -> Kept:
        return self.decoder.keep()

    def restore(self, kept: Kept) -> None:
        self.decoder.restore(kept)

    def run(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        first = streams[0].request
        work = self._score if first.target is not None else self._search if first.beams > 1 else self._follow
        try:
            yield from work(streams)
        except UserError as error:
            raise ArithmeticError(str(error)) from None

    def _follow(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        """The most likely token each time, told as it comes."""
        rows = np.arange(len(streams))  # the stream of each row
        counts = np.zeros(len(streams), np.int64)
        self.decoder.begin([stream.request.source for stream in streams])
        most = 1 + len(self.never) + max(stream.request.logprobs or 0 for stream in streams)
        while len(rows):
            tokens, logprobs = self.decoder.choose(min(most, self.vocabulary))
            news: News = []
            going, taken = np.zeros(len(rows), bool), np.zeros(len(rows), np.int64)
            for row, number in enumerate(rows.tolist()):
                pairs = [*zip(tokens[row].tolist(), logprobs[row].tolist(), strict=True)]
                token, logprob = next(pair for pair in pairs if pair[0] not in self.never)
                wanted = streams[number].request
                news.append((number, Token(token, logprob, pairs[: wanted.logprobs or 0])))
                counts[number] += 1
                taken[row], going[row] = token, token != self.end and counts[number] < wanted.max_tokens
                if not going[row]:
                    news.append((number, Finished("length")))
            yield news
            going &= [not streams[number].ended for number in rows.tolist()]
            rows = rows[going]
            if len(rows):
                self.decoder.advance(np.flatnonzero(going), taken[going])

    def _search(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        first = streams[0].request
        beam = Beam(width=first.beams, best=first.best)
        sources = [stream.request.source for stream in streams]
        work = steps(self.decoder, sources, first.max_tokens, beam, self.end, self.never)
        while True:
            try:
                next(work)
            except StopIteration as done:
                every = done.value
                break
            yield []
        news: News = []
        for number, found in enumerate(every):
            facts = np.array([[one.ended, one.logprob, one.score] for one in found], np.float64).T
            news.append((number, Finished("length", found=(facts, *(np.array(one.tokens, np.int64) for one in found)))))
        yield news

    def _score(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        assert self.end is not None
        given_ones = [stream.request.target for stream in streams if stream.request.target is not None]
        targets = [np.append(target, self.end).astype(np.int64) for target in given_ones]
        longest, rows = max(map(len, targets)), np.arange(len(streams))
        given = np.array([[*target, *[self.end] * (longest - len(target))] for target in targets])
        found = np.zeros(given.shape)
        self.decoder.begin([stream.request.source for stream in streams])
        for step in range(longest):
            found[:, step] = self.decoder.logprobs(given[:, step])
            if step < longest - 1:
                self.decoder.advance(rows, given[:, step])
            yield []
        yield [(row, Finished("length", found=(found[row, : len(targets[row])],))) for row in rows.tolist()]

    def fits(self, request: SourceRequest, found: Sequence[Array]) -> bool:
        if request.target is not None:
            return len(found) == 1 and _are_numbers(found[0], (len(request.target) + 1,))
        if request.beams == 1:
            return not found
        texts = found[1:]
        return (
            len(texts) <= request.best
            and len(found) > 0
            and _are_numbers(found[0], (3, len(texts)))
            and all(_are_below(text, self.vocabulary, request.max_tokens) for text in texts)
        )

    def example(self) -> list[SourceRequest]:
        two = np.zeros(2, np.int64)
        return [
            SourceRequest(source=two, max_tokens=2),
            SourceRequest(source=two, max_tokens=2, beams=min(2, self.lanes)),
            SourceRequest(source=two, target=two),
        ]


class Labels(Worker):
    """Says labels of tokens, or of a text."""

    def _make(self, model: Model, slots: int, precision: str) -> None:
        if not isinstance(model, EncoderModel):
            raise UserError(f"labels are said by taggers and classifiers, not by a model of kind {model.config.kind}")
        self.model, self.whole = model, isinstance(model, Classifier)
        self.vocabulary, self.features, self.labels = model.vocabulary, model.config.features, model.config.labels
        self.end = None  # no text is written
        self.said = min(MOST_LABELS, self.labels) if self.whole else 1  # labels of each text, or token

    def check(self, request: SourceRequest) -> None:
        if request.source.ndim != 1 + (self.features > 0):
            raise ValueError("the model reads frames" if self.features else "the model reads tokens")
        if self.features:
            _check_frames(request.source, self.features)
        else:
            _check_tokens(request.source, self.vocabulary)

    def run(self, streams: Sequence[Stream[SourceRequest]]) -> Iterator[News]:
        inputs, lengths = _side_by_side([stream.request.source for stream in streams])
        yield [
            (lane, Finished("length", found=found) if found else Finished("error", NOT_FINITE))
            for lane, found in enumerate(self._say(inputs, lengths))
        ]

    def _say(self, inputs: Array, lengths: Array) -> list[tuple[Array, ...]]:
        """What is found of each lane; () where its numbers are not finite, which spoil no other's."""
        (S, B), k = inputs.shape[:2], self.said
        steps = 1 if self.whole else S
        self._read(inputs, lengths, steps)
        labels, probable, finite = np.zeros((steps, B, k), np.int64), np.zeros((steps, B, k)), np.ones((steps, B), bool)
        block = max(1, BLOCK // (B * self.labels))
        for first in range(0, steps, block):
            some = slice(first, min(first + block, steps))
            logits = self.model.logits(some.start, some.stop)
            finite[some] = np.isfinite(logits).all(axis=2)
            logits[~finite[some]] = 0
            order = np.argsort(-logits, axis=2, kind="stable")[..., :k] if k > 1 else logits.argmax(axis=2)[..., None]
            labels[some], probable[some] = order, np.take_along_axis(np.exp(log_probabilities(logits)), order, axis=2)
        return [
            (labels[:length, lane].copy(), probable[:length, lane].copy()) if finite[:length, lane].all() else ()
            for lane, length in enumerate(lengths.tolist())
        ]

    def _read(self, inputs: Array, lengths: Array, steps: int) -> None:
        """Take a batch in, of which something is said at so many steps."""
        B = inputs.shape[1]
        nothing = np.zeros((0, B, 0), self.model.dtype)
        self.model.forward(Batch(inputs, np.full((steps, B), IGNORE), lengths), nothing, nothing)

    def fits(self, request: SourceRequest, found: Sequence[Array]) -> bool:
        if len(found) != 2:
            return False
        labels, probable = found
        shape = 1 if self.whole else len(request.source), self.said
        possible = _are_numbers(probable, shape) and bool((probable >= 0).all() and (probable <= 1).all())
        return possible and labels.shape == shape and _are_below(labels.reshape(-1), self.labels, labels.size)

    def example(self) -> list[SourceRequest]:
        source = np.zeros((2, self.features), np.float32) if self.features else np.zeros(2, np.int64)
        return [SourceRequest(source=source)]


class Transcripts(Labels):
    """Writes down what is said."""

    def fits(self, request: SourceRequest, found: Sequence[Array]) -> bool:
        return len(found) == 1 and _are_below(found[0], self.labels, len(request.source))

    def _say(self, inputs: Array, lengths: Array) -> list[tuple[Array, ...]]:
        assert isinstance(self.model, Ctc)
        self._read(inputs, lengths, 1)
        found = list[tuple[Array, ...]]()
        for lane, length in enumerate(lengths.tolist()):
            logits = np.ascontiguousarray(self.model.output.logits[:length, lane])
            finite = bool(np.isfinite(logits).all())  # a search among others need not end
            found.append((np.array(beam_search(log_probabilities(logits), BEAMS)[0], np.int64),) if finite else ())
        return found


def _side_by_side(sources: Sequence[Array]) -> tuple[Array, Array]:
    """Sources (S,B), or (S,B,F) of frames, filled up with zeros, and their lengths (B,)."""
    lengths = np.array([len(source) for source in sources])
    inputs = np.zeros((int(lengths.max()), len(sources), *sources[0].shape[1:]), sources[0].dtype)
    for lane, source in enumerate(sources):
        inputs[: len(source), lane] = source
    return inputs, lengths


def _are_numbers(array: Array, shape: tuple[int, ...]) -> bool:
    return array.shape == shape and array.dtype == np.float64 and bool(np.isfinite(array).all())


def _are_below(array: Array, most: int, length: int) -> bool:
    """Whether these are at most so many numbers from 0 to most - 1."""
    whole = array.ndim == 1 and array.dtype == np.int64 and len(array) <= length
    return whole and bool(((array >= 0) & (array < most)).all())


def _check_tokens(tokens: Array, vocabulary: int) -> None:
    if tokens.ndim != 1 or tokens.dtype != np.int64 or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"tokens are numbers from 0 to {vocabulary - 1}")


def _check_frames(frames: Array, features: int) -> None:
    if frames.dtype != np.float32 or frames.shape[1] != features or not np.isfinite(frames).all():
        raise ValueError(f"frames are {features} numbers each")
