"""Ten thousand damaged CAR files, blocks and answers of gateways: read as they are, or refused in a line; in little memory."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers import mutated_ipfs
from helpers.launch import environment

MEMORY = 100 << 20  # bytes


@pytest.mark.parametrize("count", [60, pytest.param(3400, marks=pytest.mark.slow)])
def test_mutations_are_read_or_refused(tmp_path, count):
    words = [sys.executable, mutated_ipfs.__file__, tmp_path, count]
    env = environment({"PYTHONPATH": pathlib.Path(__file__).parents[1]})
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ends, memory = json.loads(done.stdout)
    assert set(ends) == {"Cars", "Blocks", "Answers"}
    for kind, (read, refused) in ends.items():
        assert read + refused == count
        assert refused > count // 10, kind
        assert read > 0 or kind == "Cars"  # there a change is seen wherever it is
    assert memory < MEMORY
