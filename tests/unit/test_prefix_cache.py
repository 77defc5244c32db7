"""States behind prefixes: which are kept, which are found, and for whom."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.engines.prefix_cache import OVERHEAD, PrefixCache
from dllm.engines.requests import Request

STATE = np.zeros(10, np.float32)
SIZE = STATE.nbytes + OVERHEAD


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=6)), max_size=60), st.integers(0, 8))
def test_the_cache_keeps_what_was_used_last_and_finds_the_longest_prefix(steps, room):
    cache, known = PrefixCache(room * SIZE + 5), {}  # known: in order of use
    for number, (put, tokens) in enumerate(steps):
        array, key = np.array(tokens, np.int64), tuple(tokens)
        if put:
            cache.put(b"", array, STATE + number)
            if tokens and room:
                known[key] = known.pop(key, number)
                while len(known) > room:
                    del known[next(iter(known))]
        else:
            prefixes = [key[:length] for length in range(len(key), 0, -1) if key[:length] in known]
            length, state = cache.find(b"", array)
            assert length == (len(prefixes[0]) if prefixes else 0)
            if prefixes:
                assert state[0] == known[prefixes[0]]
                known[prefixes[0]] = known.pop(prefixes[0])
        assert cache.bytes == len(known) * SIZE <= cache.limit


def test_the_cache_finds_nothing_that_was_kept_with_another_salt():
    cache, tokens = PrefixCache(10 * SIZE), np.arange(5)
    salts = [b"", b"a", b"b", b"a" * 64]
    for number, salt in enumerate(salts):
        assert cache.find(salt, tokens) == (0, None)
        cache.put(salt, tokens, STATE + number)
    for number, salt in enumerate(salts):
        assert cache.find(salt, tokens)[1][0] == number
    assert cache.hits == len(salts)
    with pytest.raises(ValueError, match="64 bytes"):
        Request(prompt=[1], salt=bytes(65))
