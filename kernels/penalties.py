r"""Logits that are changed before anything is drawn: bias, bans and penalties, of the few tokens that they are for.

    l_v += bias_v                                     OpenAI's logit_bias; -inf: v is banned
    l_v  = l_v / theta where l_v > 0, else l_v theta  of v in the prompt or generated (CTRL, Keskar et al. 2019)
    l_v -= frequency c_v + presence [c_v > 0]         c_v: how often v was generated (OpenAI)

A row without any such token costs nothing. Memory is 16 bytes for each row and each token that some row has changed.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .compile import kernel
from .types import Array

UNSEEN = -1  # the count of a token that is neither in the prompt nor generated
FEW = 4  # tokens of a row that there is room for from the start


class Wants(Protocol):
    """How a text wants its tokens drawn."""

    @property
    def temperature(self) -> float:
        """0: always the most likely token."""

    @property
    def top_k(self) -> int:
        """Among the k most likely; 0: among all."""

    @property
    def top_p(self) -> float:
        """Among the most likely that together have this probability (Holtzman et al. 2020)."""

    @property
    def min_p(self) -> float:
        """Among those at least so probable, times the probability of the most likely (Nguyen et al. 2024)."""

    @property
    def seed(self) -> int:
        """Modulo 2^64."""

    @property
    def logit_bias(self) -> Sequence[tuple[int, float]]:
        """(token, what is added to its logit)."""

    @property
    def banned(self) -> Sequence[int]:
        """Tokens that are never drawn."""

    @property
    def repetition_penalty(self) -> float:
        """theta, more than 0; 1: none."""

    @property
    def presence_penalty(self) -> float:
        """See above; 0: none."""

    @property
    def frequency_penalty(self) -> float:
        """See above; 0: none."""


class Changes:
    """Which tokens of each of some rows are changed. Arrays by rows:

    entries : (rows,) int64                           tokens of a row that are changed
    at, plus, count : (rows,C) int64, float32, int32  such a token, its bias, how often it was generated, or UNSEEN
    repetition, presence, frequency : (rows,) float64
    """

    def __init__(self, rows: int) -> None:
        self.entries = np.zeros(rows, np.int64)
        self.repetition, self.presence, self.frequency = np.ones(rows), np.zeros(rows), np.zeros(rows)
        kinds = np.int64, np.float32, np.int32
        self.at, self.plus, self.count = (np.zeros((rows, FEW), kind) for kind in kinds)
        self._places: list[dict[int, int] | None] = [None] * rows  # token -> column, of rows that count what is generated

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
        """What `change_logits` takes of all rows."""
        return self.entries, self.at, self.plus, self.count, self.repetition, self.presence, self.frequency

    def begin(self, row: int, wants: Wants, prompt: Array) -> None:
        """Let a row have the changes of a text that has only its prompt (n,) so far."""
        self.repetition[row], self.presence[row] = wants.repetition_penalty, wants.presence_penalty
        self.frequency[row] = wants.frequency_penalty
        bias = {token: value for token, value in wants.logit_bias if value} | dict.fromkeys(wants.banned, -np.inf)
        seen = np.unique(prompt).tolist() if wants.repetition_penalty != 1 else []
        tokens = list(dict.fromkeys([*bias, *seen]))
        number = len(tokens)
        self._make_room(number)
        self.entries[row] = number
        if number:
            self.at[row, :number], self.plus[row, :number] = tokens, [bias.get(token, 0.0) for token in tokens]
            self.count[row, :number] = np.where(np.isin(tokens, seen), 0, UNSEEN)
        penalised = (wants.repetition_penalty, wants.presence_penalty, wants.frequency_penalty) != (1, 0, 0)
        self._places[row] = dict(zip(tokens, range(number), strict=True)) if penalised else None

    def note(self, row: int, token: int) -> None:
        """A row was given a token: where it has penalties, this one counts once more."""
        places = self._places[row]
        if places is None:
            return
        place = places.setdefault(token, len(places))
        if place == self.entries[row]:
            self._make_room(place + 1)
            self.entries[row] = place + 1
            self.at[row, place], self.plus[row, place], self.count[row, place] = token, 0, UNSEEN
        self.count[row, place] = max(self.count[row, place], 0) + 1

    def _make_room(self, columns: int) -> None:
        have = self.at.shape[1]
        if columns > have:
            more = ((0, 0), (0, max(columns, 2 * have) - have))
            self.at, self.plus, self.count = (np.pad(one, more) for one in (self.at, self.plus, self.count))


@kernel
def change_logits(
    logits: Array, r: int, entries: Array, at: Array, plus: Array, count: Array, repetition: Array, presence: Array,
    frequency: Array,
) -> None:  # fmt: skip
    """Change logits (V,) float32 as row r of a Changes says."""
    for i in range(entries[r]):
        value = np.float64(logits[at[r, i]]) + plus[r, i]
        if count[r, i] >= 0:
            value = value / repetition[r] if value > 0 else value * repetition[r]
        if count[r, i] > 0:
            value -= frequency[r] * count[r, i] + presence[r]
        logits[at[r, i]] = value


def changed_reference(logits: Array, wants: Wants, prompt: Sequence[int], generated: Sequence[int]) -> Array:
    """The same of all tokens (V,), float64, from the equations."""
    values, tokens = np.array(logits, np.float64), np.arange(len(logits))
    for token, bias in wants.logit_bias:
        values[token] += bias
    values[list(wants.banned)] = -np.inf
    theta = np.where(np.isin(tokens, [*prompt, *generated]), wants.repetition_penalty, 1.0)
    values = np.where(values > 0, values / theta, values * theta)
    counts = np.bincount(np.array(generated, np.int64), minlength=len(logits))
    return values - wants.frequency_penalty * counts - wants.presence_penalty * (counts > 0)
