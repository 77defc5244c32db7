"""The merges of byte-pair encoding, out of counts of words (Sennrich et al. 2016), as the `tokenizers` library finds them.

Again and again the pair of neighbours with the largest count becomes one symbol; of equal counts the pair with the smaller
numbers. Pairs wait in a heap, each with the words that it is in. A count that has fallen meanwhile is put right when its pair
comes to the top (lazily), so a merge costs what its words cost.
"""

import numpy as np

from .compile import kernel
from .types import Array

_MIX = np.uint64(0x9E3779B97F4A7C15)


@kernel
def _grown(array: Array, needed: int) -> Array:
    """An array with room for so many; what is there stays."""
    if needed <= array.size:
        return array
    more = np.empty(max(2 * array.size, needed), array.dtype)
    more[: array.size] = array
    return more


@kernel
def _slot(slots: Array, left: Array, right: Array, a: int, b: int) -> int:
    """The slot of a pair, or an empty one for it."""
    mask = np.uint64(slots.size - 1)
    value = ((np.uint64(a) << np.uint64(32)) | np.uint64(b)) * _MIX
    slot = (value ^ (value >> np.uint64(32))) & mask
    while slots[slot] >= 0 and (left[slots[slot]] != a or right[slots[slot]] != b):
        slot = (slot + np.uint64(1)) & mask
    return int(slot)


@kernel
def _rehashed(slots: Array, left: Array, right: Array, pairs: int) -> Array:
    """Slots with at least twice the room that the pairs take."""
    if 2 * (pairs + 1) <= slots.size:
        return slots
    larger = np.full(2 * slots.size, -1, np.int32)
    for pair in range(pairs):
        larger[_slot(larger, left, right, left[pair], right[pair])] = pair
    return larger


@kernel
def _is_before(counts: Array, pairs: Array, left: Array, right: Array, x: int, y: int) -> bool:
    """Whether entry x of the heap is to be merged before entry y."""
    if counts[x] != counts[y]:
        return counts[x] > counts[y]
    p, q = pairs[x], pairs[y]
    if left[p] != left[q]:
        return left[p] < left[q]
    return right[p] < right[q]


@kernel
def _up(heap: Array, at: int, counts: Array, pairs: Array, left: Array, right: Array) -> None:
    entry = heap[at]
    while at > 0:
        above = (at - 1) >> 1
        if not _is_before(counts, pairs, left, right, entry, heap[above]):
            break
        heap[at] = heap[above]
        at = above
    heap[at] = entry


@kernel
def _down(heap: Array, size: int, counts: Array, pairs: Array, left: Array, right: Array) -> None:
    entry, at = heap[0], 0
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _is_before(counts, pairs, left, right, heap[below + 1], heap[below]):
            below += 1
        if not _is_before(counts, pairs, left, right, heap[below], entry):
            break
        heap[at] = heap[below]
        at = below
    heap[at] = entry


@kernel
def _token_slot(slots: Array, texts: Array, starts: Array, a: int, b: int) -> int:
    """The slot of the token whose text is that of a and b together, or an empty one for it; b < 0: a's alone."""
    value = _MIX
    for part in (a, b):
        if part >= 0:
            for at in range(starts[part], starts[part + 1]):
                value = (value ^ np.uint64(texts[at])) * np.uint64(0x100000001B3)
    mask = np.uint64(slots.size - 1)
    slot = (value ^ (value >> np.uint64(32))) & mask
    while slots[slot] >= 0 and not _same_text(texts, starts, slots[slot], a, b):
        slot = (slot + np.uint64(1)) & mask
    return int(slot)


@kernel
def _same_text(texts: Array, starts: Array, token: int, a: int, b: int) -> bool:
    """Whether a token's text is that of a and b together."""
    if b < 0:
        return False
    length, first = starts[token + 1] - starts[token], starts[a + 1] - starts[a]
    if length != first + starts[b + 1] - starts[b]:
        return False
    for at in range(first):
        if texts[starts[token] + at] != texts[starts[a] + at]:
            return False
    same = True
    for at in range(first, length):
        same = same and texts[starts[token] + at] == texts[starts[b] + at - first]
    return same


@kernel
def find_merges(
    merged: Array, texts: Array, starts: Array, symbols: Array, begins: Array, counts: Array, size: int, longest: int
) -> tuple[int, Array]:
    """(How many merges there are, the texts of tokens): up to `size` tokens, or until no pair is left.

    merged (size,3) int64 : gets left, right and the token that they become, of each merge; one token may be had twice
    texts (bytes,) uint8, starts (size + 1,) int64 : where the text of each token lies; those of the alphabet are there
    symbols (n,) int32, begins (words + 1,) int64 : the words, symbols of the alphabet; changed
    counts (words,) int64 : how often each word is there
    longest : pairs of this length or more are not counted
    """
    words, tokens = counts.size, 0
    while tokens < size and starts[tokens + 1] > starts[tokens]:
        tokens += 1
    names = np.full(4 << np.int64(np.ceil(np.log2(size))), -1, np.int32)  # the tokens by their texts
    for token in range(tokens):
        names[_token_slot(names, texts, starts, token, -1)] = token
    stops = begins[1:].copy()
    slots, pairs = np.full(1 << 16, -1, np.int32), 0
    left, right = np.empty(1 << 15, np.int32), np.empty(1 << 15, np.int32)
    total, seen, fresh = np.zeros(1 << 15, np.int64), np.full(1 << 15, -1, np.int64), np.zeros(1 << 15, np.int64)
    news, news_word, new = np.empty(1 << 16, np.int32), np.empty(1 << 16, np.int32), 0
    places, used = np.empty(1 << 16, np.int32), 0  # the words of the entries of the heap
    heap, waiting = np.empty(1 << 15, np.int32), 0
    of_count, of_pair = np.empty(1 << 15, np.int64), np.empty(1 << 15, np.int32)
    of_start, of_stop, entries = np.empty(1 << 15, np.int64), np.empty(1 << 15, np.int64), 0
    done, a, b, token, first, last = 0, -1, -1, -1, 0, words
    step = np.int64(0)
    while True:
        # Of the words with the pair (a, b), or at first of all: pairs that go and come.
        new = 0
        for place in range(first, last):
            word = place if step == 0 else places[place]
            begin, stop, count = begins[word], stops[word], counts[word]
            read = write = begin
            while read < stop:
                joins = step > 0 and symbols[read] == a and read + 1 < stop and symbols[read + 1] == b
                for side in range(2):
                    # Neighbours: what was a pair before (change -1), and what is one now (change 1).
                    if step == 0:
                        if side == 1 or read + 1 >= stop:
                            continue
                        x, y = symbols[read], symbols[read + 1]
                        going, coming = False, True
                        u, v = x, y
                    elif not joins:
                        continue
                    elif side == 0:
                        if write == begin:
                            continue
                        u, v, x, y = symbols[write - 1], np.int32(a), symbols[write - 1], np.int32(token)
                        going = True
                        coming = starts[x + 1] - starts[x] + starts[token + 1] - starts[token] < longest
                    else:
                        if read + 2 >= stop:
                            continue
                        u, v, x, y = np.int32(b), symbols[read + 2], np.int32(token), symbols[read + 2]
                        going = True
                        coming = starts[y + 1] - starts[y] + starts[token + 1] - starts[token] < longest
                    for sign in range(2):
                        if (sign == 0 and not going) or (sign == 1 and not coming):
                            continue
                        p, q = (u, v) if sign == 0 else (x, y)
                        slot = _slot(slots, left, right, p, q)
                        pair = slots[slot]
                        if pair < 0:
                            pair = pairs
                            pairs += 1
                            slots[slot] = pair
                            left, right = _grown(left, pairs), _grown(right, pairs)
                            if total.size < left.size:
                                old = total.size
                                total, seen, fresh = _grown(total, pairs), _grown(seen, pairs), _grown(fresh, pairs)
                                total[old:], seen[old:], fresh[old:] = 0, -1, 0
                            left[pair], right[pair] = p, q
                            slots = _rehashed(slots, left, right, pairs)
                        total[pair] += count if sign == 1 else -count
                        if sign == 1 and seen[pair] != step * words + word:
                            seen[pair] = step * words + word
                            news, news_word = _grown(news, new + 1), _grown(news_word, new + 1)
                            news[new], news_word[new] = pair, word
                            fresh[pair] += 1
                            new += 1
                if joins:
                    symbols[write] = token
                    read += 2
                else:
                    symbols[write] = symbols[read]
                    read += 1
                write += 1
            stops[word] = write
        # Each pair that has come gets an entry in the heap, with the words in which it has.
        places = _grown(places, used + new)
        for at in range(new):
            pair = news[at]
            if fresh[pair] > 0:
                of_count, of_pair = _grown(of_count, entries + 1), _grown(of_pair, entries + 1)
                of_start, of_stop = _grown(of_start, entries + 1), _grown(of_stop, entries + 1)
                of_count[entries], of_pair[entries], of_start[entries], of_stop[entries] = total[pair], pair, used, used
                used += fresh[pair]
                fresh[pair] = -entries - 1
                if total[pair] > 0:
                    heap = _grown(heap, waiting + 1)
                    heap[waiting] = entries
                    waiting += 1
                    _up(heap, waiting - 1, of_count, of_pair, left, right)
                entries += 1
            entry = -fresh[pair] - 1
            places[of_stop[entry]] = news_word[at]
            of_stop[entry] += 1
        for at in range(new):
            fresh[news[at]] = 0
        # The next pair.
        while waiting > 0 and of_count[heap[0]] != total[of_pair[heap[0]]]:
            of_count[heap[0]] = total[of_pair[heap[0]]]
            _down(heap, waiting, of_count, of_pair, left, right)
        if waiting == 0 or of_count[heap[0]] < 1 or tokens >= size:
            return done, texts
        entry = heap[0]
        waiting -= 1
        heap[0] = heap[waiting]
        _down(heap, waiting, of_count, of_pair, left, right)
        a, b = left[of_pair[entry]], right[of_pair[entry]]
        first, last = of_start[entry], of_stop[entry]
        name = _token_slot(names, texts, starts, a, b)
        token = names[name]
        if token < 0:
            token = names[name] = tokens
            begin = starts[tokens]
            texts = _grown(texts, begin + longest + longest)
            for part in (a, b):
                for at in range(starts[part], starts[part + 1]):
                    texts[begin] = texts[at]
                    begin += 1
            tokens += 1
            starts[tokens] = begin
        merged[done, 0], merged[done, 1], merged[done, 2] = a, b, token
        done += 1
        if done == merged.shape[0]:
            return done, texts
        step += 1
