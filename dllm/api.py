"""Trained models and the metrics of runs in Python, for notebooks and scripts. One process, without MPI.

    import dllm

    model = dllm.load("runs/mine")
    print(model.generate("To be", tokens=100, seed=7))
    print(model.score("To be, or not to be").perplexity)
    x = model.embed(["a text", "another"])
    loss = dllm.metrics("runs/mine")["train"]["loss"]

What a user can mend is a dllm.UserError with one line. Results are those of the commands, to the bit.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from .data.tokenizer import is_behind_word
from .data.tokenizers import Tokenizer
from .errors import UserError
from .files import storage
from .inference.drawing import Drawing, sampling_from
from .inference.evaluation import perplexity
from .inference.generation import WINDOW, Sampling, choose, continuation, decode, source_tokens, start_tokens
from .inference.loaded_model import LoadedModel
from .inference.search import Beam
from .kernels.sample import Choice
from .kernels.types import Array
from .model.decoder import Decoder

EMBED_TOGETHER = 64  # texts that are read at the same time


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """How likely a text is to a model.

    Attributes
    ----------
    tokens : (n,) int64
        Token numbers of the text.
    logprobs : (n-1,) float64
        Natural logarithms of the probabilities of all tokens but the first, each given those before it.
    """

    tokens: Array
    logprobs: Array

    def __repr__(self) -> str:
        return f"<dllm score of {len(self.tokens)} tokens: loss {self.loss:.4f}, perplexity {self.perplexity:.2f}>"

    @property
    def loss(self) -> float:
        """The mean of -logprobs, in nats a token."""
        return float(-self.logprobs.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


class Model:
    """A trained model; `load` makes one.

    Attributes
    ----------
    name : str
        Of its folder.
    tokenizer : Tokenizer
    pairs : bool
        Whether it was trained on pairs of texts: then it answers sources, otherwise it continues texts.
    parameters : int
        How many it has.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.name: str = loaded.name
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.pairs: bool = loaded.tokenizer.pairs
        self.parameters: int = loaded.layout.parameters

    def __repr__(self) -> str:
        return f"<dllm model {self.name}: {self.parameters:,} parameters, {self._loaded.origin}>"

    def generate(
        self,
        prompt: str = "",
        tokens: int = 200,
        *,
        beam: int | None = None,
        **drawing: Unpack[Drawing],
    ) -> str:
        """The text that continues a prompt, as `dllm generate` prints it behind the prompt.

        Parameters
        ----------
        prompt : str
            "": the start of a line.
        tokens : int
            How many to generate.
        beam : int, optional
            Nothing is drawn: the likeliest text that a search finds which keeps so many.
        **drawing
            How tokens are drawn; formulas: kernels/sample.py and kernels/penalties.py.

            - temperature : float, default 0.8; 0: always the most likely token.
            - top_k : int, among the k most likely tokens; 0: among all.
            - top_p : float, among the most likely tokens that together have this probability (Holtzman et al. 2020).
            - min_p : float, among tokens at least so probable, times the probability of the most likely.
            - presence_penalty, frequency_penalty : float, taken from the logits of tokens that were drawn, once or each time.
            - repetition_penalty : float, more than 1: less of what was drawn or is in the prompt (Keskar et al. 2019).
            - logit_bias : mapping, a token's number or text to what is added to its logit, from -100 to 100.
            - best_of : int, so many texts are drawn, and the likeliest a token is taken.
            - seed : int, default 1; the same seed gives the same text.

        Raises
        ------
        UserError
            Where the model is one of pairs, or an argument is out of its range.
        TypeError
            Where there is no such option.
        """
        if self.pairs:
            raise UserError(f"{self.name} was trained on pairs: ask it by answer(source)")
        _check_range(tokens=(tokens, 1), beam=(beam, 1))
        if beam and drawing:
            raise UserError(f"beam takes the likeliest text and draws none: leave out {next(iter(drawing))}")
        sampling = sampling_from(drawing, self.tokenizer)
        return self._continue(start_tokens(self.tokenizer, prompt), tokens, sampling, beam, is_behind_word(prompt))

    def answer(self, source: str, tokens: int = 200, *, beam: int | None = None) -> str:
        """The target that a model of pairs gives to a source, as `dllm generate --source` prints it.

        Parameters
        ----------
        source : str
        tokens : int
            At most.
        beam : int, optional
            The likeliest target that a search finds which keeps so many; default: the most likely token each time.

        Raises
        ------
        UserError
            Where the model is not one of pairs, or an argument is out of its range.
        """
        if not self.pairs:
            raise UserError(f"{self.name} was not trained on pairs: let it continue a text by generate(prompt)")
        _check_range(tokens=(tokens, 1), beam=(beam, 1))
        return self._continue(source_tokens(self.tokenizer, source), tokens, Sampling(temperature=0), beam)

    def score(self, text: str) -> Score:
        """How likely a text is: log-probabilities of its tokens, loss and perplexity.

        Raises
        ------
        UserError
            Where the text has fewer than two tokens, or the model is one of pairs.
        """
        if self.pairs:
            raise UserError(f"{self.name} was trained on pairs: dllm evaluate {self.name} --pairs SRC TGT gives their loss")
        tokens = self._encode(text)
        if len(tokens) < 2:
            raise UserError(f"{text!r:.60} is too short to score: it takes two tokens at least, since the first has no score")
        decoder, slot = Decoder(self._loaded.model(WINDOW), 1), np.zeros(1, np.int64)
        logprobs = np.empty(len(tokens) - 1)
        for start in range(0, len(logprobs), WINDOW):
            given = tokens[start + 1 : start + WINDOW + 1]
            choice, rows = Choice(len(given)), np.arange(len(given))
            choice.given[:] = given
            decoder.read(tokens[start : start + len(given), None], slot)
            choose(decoder, choice, rows, rows)
            logprobs[start : start + len(given)] = choice.logprob
        return Score(tokens, logprobs)

    def embed(self, texts: str | Sequence[str]) -> Array:
        """The output of the top layer behind each text: (n,H) in the model's dtype; n is 1 for a single str.

        Raises
        ------
        UserError
            Where a text is empty.
        """
        rows = [self._encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if any(len(row) == 0 for row in rows):
            raise UserError("an empty text has no embedding: leave it out")
        decoder = Decoder(self._loaded.model(WINDOW), max(1, min(len(rows), EMBED_TOGETHER)))
        found: Array = np.empty((len(rows), self._loaded.config.hidden), self._loaded.dtype)
        for start in range(0, len(rows), EMBED_TOGETHER):
            part = rows[start : start + EMBED_TOGETHER]
            decoder.states[:] = 0
            decoder.read_texts(part, np.arange(len(part)))
            found[start : start + len(part)] = [decoder.top(slot) for slot in range(len(part))]
        return found

    def _encode(self, text: str) -> Array:
        """Token numbers (n,) int64 of a text that may go on."""
        return np.ascontiguousarray(self.tokenizer.encode(text.encode(), False), np.int64)

    def _continue(self, prompt: Array, tokens: int, sampling: Sampling, beam: int | None, behind: bool = False) -> str:
        found = continuation(self._loaded, prompt, tokens, sampling, Beam(width=beam) if beam else None)
        return "".join(text for _, text in decode(self.tokenizer, found, behind))


def load(path: str | os.PathLike[str], checkpoint: str = "best") -> Model:
    """Load a trained model.

    Parameters
    ----------
    path : path
        The folder of a run, or of a model made by `dllm export` or `dllm import`; or ipfs://CID, a str.
    checkpoint : "best" or "last"
        Of a run: which.

    Raises
    ------
    UserError
        Where there is no whole model.
    """
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint is {checkpoint!r}: it is 'best' or 'last'")
    loaded = LoadedModel.open(path, checkpoint == "best")
    for warning in loaded.warnings:
        warnings.warn(warning, stacklevel=2)
    return Model(loaded)


def metrics(run: str | os.PathLike[str]) -> dict[str, dict[str, Array]]:
    """What a run has measured so far: name -> array (lines,), or (lines,k) of what has k numbers a line, by kind of line.

    "train" has the lines of training: step, epoch, loss (nats a token), grad_norm, lr, tokens_per_second, ...; each split
    that was evaluated, such as "valid", has its own: step, tokens, loss, perplexity, ... A kind without lines is left out.
    Where a line lacks a number there is NaN; what is neither number nor text stays as it is, in an array of objects.

    Raises
    ------
    UserError
        Where `run` has no metrics.
    """
    path = pathlib.Path(run, "metrics.jsonl")
    try:
        text = storage.read_text(path, storage.LARGEST_METRICS)
    except UserError as error:
        raise UserError(f"{error}; is {run} the folder of a run?") from None
    kinds: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            kinds.setdefault(str(entry.get("split", "train")), []).append(entry)
        except (ValueError, AttributeError, RecursionError):
            if number == text.count("\n") + 1:  # the run is writing it
                continue
            raise UserError(f"{path} line {number} is not a line of metrics") from None
    return {kind: _columns(entries) for kind, entries in kinds.items()}


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, Array]:
    """name -> values of all entries."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: _column([entry.get(name) for entry in entries]) for name in names}


def _column(values: Iterable[Any]) -> Array:
    """An array of numbers or of texts, where values are alike, else of objects."""
    known = list(values)
    if all(value is None or isinstance(value, int | float) for value in known):
        numbers: Array = np.array([np.nan if value is None else value for value in known])
        return numbers
    lists = all(isinstance(value, list) for value in known) and len({len(value) for value in known}) == 1
    if lists or all(isinstance(value, str) for value in known):
        return np.array(known)
    objects: Array = np.empty(len(known), object)
    objects[:] = known
    return objects


def _check_range(**arguments: tuple[float | None, float]) -> None:
    """Raise UserError where an argument, name -> (value, the least that it may be), is too small; None is not given."""
    for name, (value, least) in arguments.items():
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{name} is {value}: it must be at least {least}")
