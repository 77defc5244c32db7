"""Runs Python with little memory and little time: what takes more of either fails."""

import pathlib
import subprocess
import sys

from helpers.launch import environment

START = """
import pathlib, resource, sys
def limit(memory):
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
"""


def limited(code, *arguments, seconds, cwd=None):
    """The CompletedProcess of `code`, which calls limit(bytes) when its imports are done. Fails after `seconds`."""
    words = [sys.executable, "-c", START + code, *map(str, arguments)]
    env = environment({"PYTHONPATH": pathlib.Path(__file__).parents[1]})
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False)
