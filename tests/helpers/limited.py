"""Runs Python with little memory and little time: what takes more of either fails."""

import json
import pathlib
import subprocess
import sys

from helpers.launch import environment

MEMORY = 300 << 20  # bytes that a refusal may take
SECONDS = 5  # that it may take; none takes a tenth of that where nothing else runs
START = """
import pathlib, resource, sys
def limit(memory):
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
"""
REFUSE = """
import json, resource, signal
from dllm import api, cli, config
from dllm.comm import topology
from dllm.data import tokenizer_files
from dllm.files import storage
from dllm.launching import mpirun
from dllm.runs import marks, ownership, run_folder

READERS = {
    "configuration": config.load_toml,
    "run": lambda path: run_folder.read_settings(pathlib.Path(path).parent),
    "hosts": mpirun.read_hosts,
    "edges": lambda path: topology._read(path, 2),
    "json": lambda path: storage.read_json(path, ["x"]),
    "tokenizer": lambda path: tokenizer_files.load_tokenizer(pathlib.Path(path).parent),
    "metrics": lambda path: api.metrics(pathlib.Path(path).parent),
    "owner": lambda path: ownership.owner(pathlib.Path(path).parent),
    "resize": lambda path: marks.take_resize_request(pathlib.Path(path).parent),
    "set": lambda path: config.from_dict(config.parse_settings(json.loads(pathlib.Path(path).read_text()))),
}
limit(int(sys.argv[1]))
for kind, path in json.loads(sys.argv[2]):
    signal.alarm(int(sys.argv[3]))  # ends a process that hangs, even in C
    code = cli.run(lambda words: print(kind, "gave", repr(READERS[kind](path))[:60], file=sys.stderr) or 0)
    print(code, flush=True)
    signal.alarm(0)
"""


def limited(code, *arguments, seconds, cwd=None):
    """The CompletedProcess of `code`, which calls limit(bytes) when its imports are done. Fails after `seconds`."""
    words = [sys.executable, "-c", START + code, *map(str, arguments)]
    env = environment({"PYTHONPATH": pathlib.Path(__file__).parents[1]})
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False)


def refusals(cases, memory=MEMORY, seconds=SECONDS):
    """What each of (kind of reader, path or settings) gives on standard error, a line; and their exit codes."""
    words = [(kind, str(path)) for kind, path in cases]
    done = limited(REFUSE, memory, json.dumps(words), seconds, seconds=60 + seconds * len(words))
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases), done.stderr
    return list(zip(lines, map(int, done.stdout.split()), strict=True))
