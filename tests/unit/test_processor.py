"""What a process makes of the processor: which products bfloat16 takes, leave to use AMX and its refusal, hidden features,
and a cache of kernels that another machine has filled.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest
from helpers.seccomp import DENY
from test_amx import skipped

from dllm.kernels import processor

AMX = {"amx-tile", "amx-bf16", "amx-int8"}
FACTS = """
import json
from dllm.kernels import compile, processor
print(json.dumps({"amx": processor.AMX, "bf16": processor.BF16, "facts": processor.facts(), "cache": str(compile.CACHE)}))
"""
# A product of whole numbers, by whatever is best here.
PRODUCT = """
from dllm.kernels import gemm, processor
import numpy as np, test_tiles
a, b, c, expected = test_tiles.operands(33, 2, 3)
if processor.BF16:
    gemm.multiply(c, 0, a, 0, b, 33, 32, False)
else:
    a, b = (np.random.default_rng(1).integers(-3, 4, shape).astype(np.float32) for shape in ((3, 33, 16), (3, 48, 16)))
    gemm.multiply(c, 0, a, 0, b, 33, 48, False)
    expected = test_tiles.matrix(a) @ test_tiles.matrix(b)
np.testing.assert_array_equal(test_tiles.matrix(c), expected)
"""
REFUSE = f"""{DENY}
deny(158, 1, argument=0, value=0x1023)  # arch_prctl: EPERM
assert libc.syscall(158, 0x1023, 18) == -1 and ctypes.get_errno() == 1
"""
EMULATED = "from helpers import amx_emulator; amx_emulator.install()\n"


def told(program, home=None, **environment):
    """What a process of its own prints, one line of JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    if home is not None:
        environment |= {"XDG_CACHE_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("features", "amx", "maker", "expected"),
    [
        (AMX | {"avx512bf16"}, True, "GenuineIntel", "amx"),
        (AMX | {"avx512bf16"}, False, "GenuineIntel", ""),  # without leave
        ({"avx512bf16"}, False, "GenuineIntel", ""),
        ({"avx512f", "avx512bf16"}, False, "AuthenticAMD", "avx512_bf16"),
        ({"avx512bf16"}, False, "AuthenticAMD", ""),  # whose vectors are hidden
        ({"avx512f"}, False, "AuthenticAMD", ""),
        (AMX | {"avx512bf16"}, True, "AuthenticAMD", "amx"),
        ({"avx512bf16"}, False, "HygonGenuine", ""),
        ({"avx512bf16"}, False, "", ""),
        (set(), False, "", ""),
    ],
)
def test_bfloat16_takes_the_fastest_products_and_none_slower_than_those_of_float32(monkeypatch, features, amx, maker, expected):
    monkeypatch.setattr(processor, "HIDDEN", frozenset())
    assert processor.bf16_products(features, amx, maker) == expected
    monkeypatch.setattr(processor, "HIDDEN", frozenset({"full-rate-bf16"}))
    assert processor.bf16_products(features, amx, maker) == ("amx" if amx else "")


def test_leave_for_tiles_is_asked_of_linux_where_the_processor_has_them(monkeypatch):
    asked = []

    class Linux:
        def __init__(self, answer):
            self.syscall = lambda *numbers: (asked.append([number.value for number in numbers]), answer)[1]

    for answer, permitted in ((0, True), (-1, False)):
        monkeypatch.setattr(processor.ctypes, "CDLL", lambda name, answer=answer: Linux(answer))
        assert processor.tiles_permitted(AMX) == permitted
    assert asked == [[158, 0x1023, 18]] * 2
    for features in (set(), {"amx-tile"}, {"amx-bf16"}, {"avx512bf16"}):
        assert not processor.tiles_permitted(features)
    monkeypatch.setattr(processor.sys, "platform", "darwin")
    assert not processor.tiles_permitted(AMX)
    assert len(asked) == 2


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="not Linux on x86-64")
def test_refused_leave_and_hidden_features_mean_the_next_best():
    """Refused by a filter of system calls, as a container's is, on whatever processor."""
    plain, refused = told(FACTS), told(REFUSE + PRODUCT + FACTS)
    best = lambda hidden: processor.bf16_products(processor.FEATURES - hidden, False, processor.vendor())
    assert plain["amx"] == processor.AMX
    assert not refused["amx"]
    assert refused["bf16"] == best(set())
    assert (refused["cache"] == plain["cache"]) == (not processor.AMX)
    caches = {plain["cache"]}
    for hidden in ("amx-tile", "amx-bf16", "amx-tile,full-rate-bf16", "amx-tile,avx512bf16"):
        found = told(FACTS, DLLM_HIDE_FEATURES=hidden)
        assert not found["amx"]
        assert found["bf16"] == ("" if "full-rate" in hidden else best({*hidden.split(",")}))
        caches.add(found["cache"])
    assert len(caches) == 1 + processor.BF16_INSTRUCTIONS + processor.AMX


def test_the_name_of_the_cache_holds_the_size_of_the_second_level_cache():
    program = """
from dllm.kernels import processor
processor.L2 = {}
from dllm.kernels import compile
print('"' + compile.CACHE.name + '"')
"""
    assert len({told(program.format(size)) for size in (1 << 20, 2 << 20)}) == 2


@pytest.mark.slow
@pytest.mark.skipif(skipped() is not None, reason=str(skipped()))
def test_a_process_without_tiles_takes_no_code_of_one_with_tiles_from_the_same_home(tmp_path):
    with_tiles = told(EMULATED + PRODUCT + FACTS, tmp_path)
    assert with_tiles["amx"]
    assert with_tiles["bf16"] == "amx"
    without = told(PRODUCT + FACTS, tmp_path)  # by tiles it would end by SIGILL
    assert not without["amx"]
    assert without["facts"] != with_tiles["facts"]
    assert without["cache"] != with_tiles["cache"]
    for one in (with_tiles, without):
        assert list(pathlib.Path(one["cache"]).rglob("*.nbc"))
