"""Counts of units with noise, from which a vocabulary may be made that says little of any one line of text.

An example is a line of text, or a pair. It counts at most M of its distinct units, drawn at random, each once. To the counts of
a rank Gaussian noise is added, and what stays at or below a threshold is dropped, before anything leaves the rank. What comes
out is (epsilon, delta)-differentially private for an example that is there or not, with units and counts alike:

    sigma = sqrt(M) s  with  Phi(1 / 2s - epsilon s) - exp(epsilon) Phi(-1 / 2s - epsilon s) = delta / 2
    rho = 1 + sigma PhiInverse((1 - delta / 2)^(1 / M))

- Units that other examples have, too: an example moves their counts by at most sqrt(M) in the Euclidean norm, so noise of sigma
  makes them (epsilon, delta / 2)-private (Balle and Wang 2018, "Improving the Gaussian mechanism for differential privacy",
  Theorem 8).
- Units that this example alone has: t <= M counts of 1. None of them is above rho with probability Phi((rho - 1) / sigma)^t, at
  least 1 - delta / 2 (Gopi et al. 2020, "Differentially private set union", Theorem 5.1; its weights are 1 / sqrt(t), ours are
  1, so that the largest of its thresholds is that of t = M).

Both together: let A and B be the results without and with the example, G what B says of units that others have, and q the
probability that a unit of its own passes, at most delta / 2. For any set S of results, P(B in S) <= P(G in S) + q, which is at
most exp(epsilon) P(A in S) + delta. The other way, only results without such units matter. There P(B in S) = (1 - q) g with
g = P(G in S), and P(A in S) <= min(1, exp(epsilon) g + delta / 2). Whether exp(epsilon) g is below 1 or above, that is at most
exp(epsilon) (1 - q) g + delta.

Examples of different ranks are different ones, and whoever adds up what ranks have released looks at no text: the sum over
ranks has the same (epsilon, delta). Counts are whole numbers, and so is what is released: no low bits of the noise tell them.
"""

from __future__ import annotations

import functools
import math
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from ..kernels.types import Array

DELTA = 1e-6  # the probability that the promise of epsilon does not hold, at most
LEAST_EPSILON, LARGEST_EPSILON = 0.001, 100.0  # no count passes below; above it promises nothing: a factor of 1e43
UNITS_PER_EXAMPLE = 20
EXAMPLES = ("line", "pair", "sentence", "text")
MOST_UNITS = 1_000_000  # of an example
METHOD = "noise of Balle and Wang 2018, Theorem 8; threshold of Gopi et al. 2020, Theorem 5.1, with weights of 1"
NUMBERS = ("epsilon", "delta", "units_per_example", "sigma", "threshold")


@dataclass(frozen=True)
class PrivateCounting:
    """How to count privately. Each example counts at most `units_per_example` units."""

    epsilon: float
    units_per_example: int = UNITS_PER_EXAMPLE
    delta: float = DELTA
    # Which units of a long example count is no secret: the promise holds for any choice that looks at this example alone.
    _draw: random.Random = field(default_factory=random.Random, init=False, repr=False, compare=False)

    @functools.cached_property
    def sigma(self) -> float:
        """Standard deviation of the noise on a count."""
        return math.sqrt(self.units_per_example) * gaussian_sigma(self.epsilon, self.delta / 2)

    @functools.cached_property
    def threshold(self) -> float:
        """Noisy counts up to this are dropped."""
        # The upper tail of one unit, 1 - (1 - delta / 2)^(1 / M), with all its digits; 1 minus it would lose them.
        tail = -math.expm1(math.log1p(-self.delta / 2) / self.units_per_example)
        return 1 - self.sigma * NormalDist().inv_cdf(tail)

    def choose(self, units: Collection[str]) -> Collection[str]:
        """Those of an example's distinct units that count: all, or `units_per_example` of them, drawn at random."""
        if len(units) <= self.units_per_example:
            return units
        return self._draw.sample(tuple(units), self.units_per_example)

    def count(self, examples: Iterable[Collection[str]]) -> Counter[str]:
        """How many examples, each its distinct units, count a unit. These counts are exact: they must not leave the rank."""
        counts: Counter[str] = Counter()
        for units in examples:
            counts.update(self.choose(units))
        return counts

    def release(self, counts: Mapping[str, int]) -> dict[str, int]:
        """What may be told of exact counts: units whose noisy count is above the threshold, with it, rounded."""
        units = sorted(counts)  # they stand in `counts` as they came in the text, which nobody is to learn
        noisy = np.array([counts[unit] for unit in units], np.float64) + self.sigma * normals(len(units))
        told = np.flatnonzero(noisy > self.threshold)
        return {units[place]: round(noisy[place]) for place in told}

    def described(self, example: str) -> dict[str, Any]:
        """What the manifest of a corpus says. `example`: what one is, one of EXAMPLES."""
        return {"method": METHOD, **{name: getattr(self, name) for name in NUMBERS}, "example": example}


def check_described(value: Any) -> None:
    """Raise ValueError, TypeError or KeyError where a manifest's entry is not one of `described`."""
    numbers = [value[name] for name in NUMBERS]
    if not (all(isinstance(one, int | float) and 0 < one < math.inf for one in numbers) and value["example"] in EXAMPLES):
        raise ValueError("its private counts are not described")


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """The least standard deviation that makes a value of sensitivity 1 (epsilon, delta)-private, up to 1e-12 of it.

    Balle and Wang 2018, Theorem 8.
    """
    low = high = 1.0
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    while gaussian_delta(low, epsilon) <= delta:
        low /= 2
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    return high


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """The delta of Gaussian noise on a value of sensitivity 1: Phi(1 / 2s - e s) - exp(e) Phi(-1 / 2s - e s)."""
    near, far = 0.5 / sigma - epsilon * sigma, _phi(-0.5 / sigma - epsilon * sigma)
    # exp(e) alone may overflow, its product with Phi is below 1; where Phi is 0 to all digits, leaving it out is the safe side.
    return _phi(near) - (math.exp(epsilon + math.log(far)) if far > 0 else 0.0)


def normals(n: int) -> Array:
    """Standard normal numbers (n,), float64, of the system's entropy, never the same again (Box and Muller 1958)."""
    first, second = ((np.frombuffer(os.urandom(8 * n), np.uint64).astype(np.float64) + 0.5) * 2.0**-64 for _ in range(2))
    found: Array = np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)
    return found


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
