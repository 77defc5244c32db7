r"""Drawing tokens from logits: temperature, the k most likely, the nucleus (Holtzman et al. 2020), those that are not too far
behind the most likely (min_p, Nguyen et al. 2024), for all rows in one call.

    l_v = z_v + b_v                     logits of a row          log p_v = l_v - m - log sum_w exp(l_w - m),  m = max l
    q_v ~ exp((l'_v - m') / temperature)      l' changed as penalties.py says, m' = max l'
                                              cut to top_k and to q_v >= min_p max q, then to top_p of what is left

Tokens are ordered by l, the larger first, of equal ones the lower number. top_p keeps the shortest prefix of that order that
holds at least top_p of the probability. temperature 0 takes the first.

A row's uniform number comes from a counter (dropout.py): Philox at counter (position, 0, 0, 0), key seed. So what is drawn
depends on the row and its own parameters alone, to the bit, wherever the row stands and whoever draws it.

Nothing is sorted. Without cuts, sums by blocks of tokens say in which block the number falls. For cuts the order is one of
64-bit keys, a logit's bits over the token's, and the place of a cut is found by halving the range of the keys, which
touches fewer of them each time. What cannot be within a cut is left out beforehand: for top_k what is below the k-th largest
of the maxima of some columns, for top_p the tail that even together has too little probability.

What is told of a token is log p: the model's own, whatever was changed or cut before it was drawn. A row without any finite
largest logit, or with NaN, gives token -1 and NaN.
"""

import math

import numpy as np

from .activations import exp_rows
from .compile import kernel
from .dropout import philox
from .gemm import width
from .penalties import Changes, Wants, change_logits
from .team import Team
from .types import Array, Real

BAD = -1  # the token of a row that has no distribution
BLOCK = 1024  # tokens whose sum is kept, a multiple of LANES
LANES = 16  # float32 of a vector
COLUMNS = 1024  # of a row, whose maxima bound the k-th largest logit; where k is more all tokens are looked at


class Choice:
    """What each of some rows wants, and what it got. Arrays (rows,), to be read and written by rows.

    temperature, top_p, min_p : float64        top_k : int64, 0: all
    changes : Changes                   of logits, before a token is drawn
    seed, position : uint64             of the uniform number
    given : int64                       not -1: nothing is drawn, this token's probability is told
    wanted : int64                      most likely tokens to tell, at most `most`
    token : int64                       drawn or given
    logprob : float64                   of it, nats, without temperature or cuts
    tokens, logprobs : (rows,most)      the most likely, -1 behind the last
    """

    def __init__(self, rows: int, most: int = 0) -> None:
        def make(kind: type[np.generic], value: float, *shape: int) -> Array:
            return np.full((rows, *shape), value, kind)

        self.temperature, self.top_p, self.min_p = make(np.float64, 1), make(np.float64, 1), make(np.float64, 0)
        self.top_k, self.given = make(np.int64, 0), make(np.int64, -1)
        self.seed, self.position = make(np.uint64, 0), make(np.uint64, 0)
        self.wanted, self.tokens, self.logprobs = make(np.int64, 0), make(np.int64, -1, most), make(np.float64, np.nan, most)
        self.token, self.logprob = make(np.int64, BAD), make(np.float64, np.nan)
        self.arrays = (
            self.token, self.logprob, self.tokens, self.logprobs, self.temperature, self.top_k, self.top_p, self.min_p,
            self.seed, self.position, self.given, self.wanted,
        )  # fmt: skip
        self.changes = Changes(rows)

    def begin(self, row: int, wants: Wants, prompt: Array) -> None:
        """Have a row draw as a text wants it, from its first token behind its prompt (n,) on."""
        self.temperature[row], self.top_k[row], self.top_p[row] = wants.temperature, wants.top_k, wants.top_p
        self.min_p[row], self.seed[row], self.position[row] = wants.min_p, wants.seed % 2**64, 0
        self.changes.begin(row, wants, prompt)


class Scratch:
    """Memory for `threads` threads that draw from V tokens each."""

    def __init__(self, V: int, threads: int = 1) -> None:
        padded = -(-V // LANES) * LANES
        self.logits, self.e = (np.zeros((threads, padded), np.float32) for _ in range(2))
        self.keys, self.other = (np.zeros((threads, padded), np.uint64) for _ in range(2))


def draw(choice: Choice, rows: Array, z: Array, b: Array, scratch: Scratch, team: Team) -> None:
    """Fill token, logprob, tokens and logprobs of rows of a Choice.

    Parameters
    ----------
    rows : (N,) int64
        The row of `choice` for each row of z.
    z : (ceil(V/R),N,R)
        Logits without bias; what lies beyond column V does not count.
    b : (V,)
    """
    N = len(rows)

    def work(part: int) -> None:
        first, last = N * part // team.size, N * (part + 1) // team.size
        memory = scratch.logits[part], scratch.e[part], scratch.keys[part], scratch.other[part]
        if first < last:
            draw_rows(*choice.arrays, *choice.changes.arrays, rows, z, b, *memory, first, last)

    work(0) if team.size == 1 else team.run(work)


@kernel
def draw_rows(
    token: Array, logprob: Array, tokens: Array, logprobs: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array,
    seed: Array, position: Array, given: Array, wanted: Array, entries: Array, at: Array, plus: Array, count: Array,
    repetition: Array, presence: Array, frequency: Array, rows: Array, z: Array, b: Array, logits: Array, e: Array, keys: Array,
    other: Array, first: int, last: int,
) -> None:  # fmt: skip
    """Rows first to last - 1 of `draw`."""
    V, R = b.size, width(z)
    sums = np.zeros((V + BLOCK - 1) // BLOCK, np.float64)
    maxima = np.empty(COLUMNS, np.float32)
    for n in range(first, last):
        r = rows[n]
        tokens[r, :], logprobs[r, :] = BAD, np.nan
        token[r], logprob[r] = BAD, np.nan
        take_logits(logits, z, n, b)
        largest = largest_of(logits)
        total = weigh(e, sums, logits, largest, 1.0)
        if not (total > 0 and total < np.inf):
            continue
        log_total = math.log(total) + np.float64(largest)
        told = min(wanted[r], tokens.shape[1], V)
        if told > 0:
            keep_largest(keys, other, maxima, logits, V, told)
            keys[:told] = np.sort(keys[:told])[::-1]
            for i in range(told):
                tokens[r, i] = token_of(keys[i])
                logprobs[r, i] = np.float64(logits[tokens[r, i]]) - log_total
        chosen = given[r]
        if chosen < 0:
            if entries[r] > 0:
                change_logits(logits, r, entries, at, plus, count, repetition, presence, frequency)
                largest = largest_of(logits)
                if not (largest > -np.inf and largest < np.inf):
                    continue
            if temperature[r] == 0:
                chosen = 0
                while logits[chosen] != largest:
                    chosen += 1
            else:
                if temperature[r] != 1 or entries[r] > 0:
                    total = weigh(e, sums, logits, largest, 1 / temperature[r])
                u = uniform(seed[r], position[r])
                if 0 < top_k[r] < V or top_p[r] < 1 or min_p[r] > 0:
                    chosen = draw_within(keys, other, maxima, logits, e, V, top_k[r], top_p[r], min_p[r], total, u)
                else:
                    chosen = draw_from_all(e, sums, total, V, u)
        own = np.float32(z[chosen // R, n, chosen % R] + b[chosen])
        token[r], logprob[r] = chosen, np.float64(own) - log_total


@kernel
def take_logits(logits: Array, z: Array, n: int, b: Array) -> None:
    """logits (Vp,) = row n of z + b, -inf beyond V."""
    R, V = width(z), b.size
    for panel in range(V // R):
        for j in range(R):
            logits[panel * R + j] = z[panel, n, j] + b[panel * R + j]
    for v in range(V // R * R, V):
        logits[v] = z[v // R, n, v % R] + b[v]
    logits[V:] = -np.inf


@kernel
def largest_of(logits: Array) -> float:
    """The largest of logits (Vp,)."""
    most = np.full(LANES, -np.inf, np.float32)
    for first in range(0, logits.size, LANES):
        for j in range(LANES):
            most[j] = logits[first + j] if logits[first + j] > most[j] else most[j]
    return most.max()


@kernel
def weigh(e: Array, sums: Array, logits: Array, largest: float, factor: Real) -> float:
    """e (Vp,) = exp((logits - largest) factor); sums of each BLOCK. Returns the sum of all, NaN where some logit is."""
    zero, column = np.zeros(1, np.float32), np.zeros((2, LANES), np.float32)
    factor = np.float32(min(factor, 1e30))  # so that 0 times it is 0
    for v in range(logits.size):
        e[v] = (logits[v] - largest) * factor
    total = 0.0
    for block in range(sums.size):
        column[:] = 0
        for v in range(block * BLOCK, min(e.size, (block + 1) * BLOCK), LANES):
            exp_rows(False, e.ctypes.data + 4 * v, zero.ctypes.data, column.ctypes.data, column.ctypes.data + 4 * LANES)
        sums[block] = 0
        for j in range(LANES):
            sums[block] += column[1, j]
        total += sums[block]
    return total


@kernel
def uniform(seed: np.uint64, position: np.uint64) -> float:
    """A number in [0,1) of 53 bits."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    zero = np.uint64(0)
    one, other, _, _ = philox(position & low, position >> half, zero, zero, seed & low, seed >> half)
    return np.float64((one << np.uint64(21)) | (other >> np.uint64(11))) * 2.0**-53


@kernel
def draw_from_all(e: Array, sums: Array, total: float, V: int, u: float) -> int:
    """The token where the running sum of e passes u total."""
    rest, block = u * total, 0
    while block < sums.size - 1 and rest >= sums[block]:
        rest -= sums[block]
        block += 1
    chosen = -1
    for v in range(block * BLOCK, min(V, (block + 1) * BLOCK)):
        if e[v] > 0:
            chosen = v  # the last possible one, where rounding leaves some rest
            if rest < e[v]:
                return chosen
            rest -= e[v]
    while chosen < 0:  # a block of zeros, reached by rounding: the last token before it
        block -= 1
        for v in range(block * BLOCK, (block + 1) * BLOCK):
            if e[v] > 0:
                chosen = v
    return chosen


@kernel
def draw_within(
    keys: Array, other: Array, maxima: Array, logits: Array, e: Array, V: int, top_k: int, top_p: float, min_p: float,
    total: float, u: float,
) -> int:  # fmt: skip
    """The same among the top_k most likely that are not below min_p, of these among the most likely that hold top_p."""
    bits, count = logits.view(np.uint32), 0
    if 0 < top_k < V:
        keep_largest(keys, other, maxima, logits, V, top_k)
        for i in range(top_k):
            if e[token_of(keys[i])] >= np.float32(min_p):  # of the largest it is exp(0)
                keys[count] = keys[i]
                count += 1
    else:
        # all that are below the second have less than 1 - top_p together
        least = min_p if min_p > 0 else 0.999 * (1 - top_p) * total / V
        for v in range(V):
            if e[v] >= np.float32(least):
                keys[count] = key_of(bits[v], v)
                count += 1
    if 0 < top_k < V or min_p > 0:
        total = 0.0
        for i in range(count):
            total += e[token_of(keys[i])]
    if top_p < 1:
        count, total = keep_nucleus(keys, other, e, count, top_p * total)
    rest, chosen = u * total, -1
    for i in range(count):
        weight = e[token_of(keys[i])]
        if weight > 0:
            chosen = token_of(keys[i])  # the last possible one, where rounding leaves some rest
            if rest < weight:
                break
            rest -= weight
    return chosen


@kernel
def keep_nucleus(keys: Array, other: Array, e: Array, count: int, wanted: float) -> tuple[int, float]:
    """Of `count` keys bring to the front the fewest of the largest whose e add up to `wanted`. Returns how many, their sum."""
    inside, sure, unsure = 0, 0.0, count  # keys[:inside] are within for certain, the cut is among the next `unsure`
    while unsure > 1:
        upper = split_in_the_middle(keys, other, inside, inside + unsure)
        part = 0.0
        for i in range(inside, inside + upper):
            part += e[token_of(keys[i])]
        if sure + part >= wanted:
            unsure = upper
        else:
            sure, inside, unsure = sure + part, inside + upper, unsure - upper
    return inside + 1, sure + e[token_of(keys[inside])]


@kernel
def keep_largest(keys: Array, other: Array, maxima: Array, logits: Array, V: int, k: int) -> None:
    """Bring the keys of the k tokens that come first to the front of keys, in no order."""
    bits, least, columns = logits.view(np.uint32), np.float32(-np.inf), maxima.size
    if k <= columns < V:  # k columns have a maximum that is at least the k-th largest of them, so k tokens have
        maxima[:] = logits[:columns]
        for first in range(columns, V - columns + 1, columns):
            for j in range(columns):
                maxima[j] = logits[first + j] if logits[first + j] > maxima[j] else maxima[j]
        bits_of_maxima = maxima.view(np.uint32)
        for j in range(columns):
            keys[j] = key_of(bits_of_maxima[j], j)
        keep_first(keys, other, columns, k)
        least = np.float32(np.inf)
        for j in range(k):
            least = min(least, maxima[token_of(keys[j])])
    count = 0
    for v in range(V):
        if logits[v] >= least:
            keys[count] = key_of(bits[v], v)
            count += 1
    keep_first(keys, other, count, k)


@kernel
def keep_first(keys: Array, other: Array, count: int, k: int) -> None:
    """Bring the k largest of `count` keys to the front, in no order."""
    inside, unsure = 0, count
    while inside < k < inside + unsure:
        upper = split_in_the_middle(keys, other, inside, inside + unsure)
        if inside + upper <= k:
            inside, unsure = inside + upper, unsure - upper
        else:
            unsure = upper


@kernel
def split_in_the_middle(keys: Array, other: Array, first: int, last: int) -> int:
    """Bring those of keys[first:last] that are in the upper half of their range to the front. Returns how many they are."""
    least = most = keys[first]
    for i in range(first + 1, last):
        least, most = min(least, keys[i]), max(most, keys[i])
    middle = most - (most - least) // np.uint64(2)
    upper, lower = first, 0
    for i in range(first, last):
        key = keys[i]
        if key >= middle:
            keys[upper] = key
            upper += 1
        else:
            other[lower] = key
            lower += 1
    for i in range(lower):
        keys[upper + i] = other[i]
    return upper - first


@kernel
def key_of(bits: np.uint32, token: int) -> np.uint64:
    """An integer that is the larger the earlier a token comes in the order; bits (uint32) of its logit."""
    sign = np.uint32(0x80000000)
    if bits == sign:  # -0
        bits = np.uint32(0)
    ordered = ~bits if bits & sign else bits | sign
    return (np.uint64(ordered) << np.uint64(32)) | np.uint64(0xFFFFFFFF - token)


@kernel
def token_of(key: np.uint64) -> int:
    """The token of a key."""
    return np.int64(0xFFFFFFFF) - np.int64(key & np.uint64(0xFFFFFFFF))  # type: ignore[return-value]  # a kernel has one kind of int


def probabilities_reference(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """What `draw` draws from: the probability of every token (V,), float64, by sorting."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    weight = np.exp((logits[order] - logits[order[0]]) / temperature)
    weight[top_k or len(order) :] = 0
    weight[weight < min_p] = 0
    before = np.cumsum(weight) - weight
    weight[1:][before[1:] >= top_p * weight.sum()] = 0
    found = np.zeros(len(order))
    found[order] = weight / weight.sum()
    return found
