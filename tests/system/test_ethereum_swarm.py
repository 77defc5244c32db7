"""Ethereum Swarm with its own packages (npm): references as bee-js and bmt-js make them, and what each of us wrote read by the
other, through a server that speaks Bee's HTTP and hashes with bee-js. No real Bee node can run here.

DLLM_TEST_NPM is a folder node_modules with @ethersphere/bee-js 9.8.1 and @fairdatasociety/bmt-js 2.1.0.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import model_folders
from helpers.launch import environment

from dllm.remote import chunks

MODULES = os.environ.get("DLLM_TEST_NPM", "")
PACKAGES = ("@ethersphere/bee-js", "@fairdatasociety/bmt-js")
SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "bee.cjs"
STAMP = "ab" * 32
CHUNK, PIECE = chunks.CHUNK, chunks.PIECE

pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="there is no node (Node.js)"),
    pytest.mark.skipif(
        not all((pathlib.Path(MODULES) / name).is_dir() for name in PACKAGES) or not MODULES,
        reason="needs packages of npm: run .ci/tools FOLDER, then DLLM_TEST_NPM=FOLDER/node_modules",
    ),
]


def bee(*words):
    """Lines that the packages' program writes, each as its words."""
    done = subprocess.run(["node", SCRIPT, MODULES, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


@contextlib.contextmanager
def serving():
    """The process and the address of a server that answers as a Bee node does."""
    with subprocess.Popen(["node", SCRIPT, MODULES, "serve"], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()
            process.wait(20)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What is fetched goes elsewhere than to the user's cache, where the kernels stay."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def dllm(url, *words, code=0):
    """What a command writes to standard output, or where `code` is not 0 to standard error."""
    env = environment({"DLLM_BEE": url, "DLLM_BEE_STAMP": STAMP})
    done = subprocess.run(
        [sys.executable, "-m", "dllm", *map(str, words)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    model_folders.make(folder)
    return folder


def test_references_are_those_of_bee_js_and_bmt_js(tmp_path):
    sizes = [0, 1, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 8191, 8193, 127 * CHUNK + 5, PIECE - 1, PIECE, PIECE + 1]
    sizes += [PIECE + CHUNK, PIECE + CHUNK + 1, 2 * PIECE + CHUNK]
    data = np.random.default_rng(3).bytes(max(sizes))
    paths = [tmp_path / str(size) for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(data[:size])
    ours = [chunks.reference_of(path) for path in paths]
    assert bee("hash", *paths) == [[reference, reference] for reference in ours]


def test_references_of_large_files_are_those_of_bee_js():
    """Of zeros, which bee-js need not hash again and again: around 128 x 128 chunks, where a level begins."""
    counts = [128 * 128 - 1, 128 * 128, 128 * 128 + 1, 129 * 128, 129 * 128 + 1, 2 * 128 * 128]
    ours = []
    for count in counts:
        *_, last = chunks.parts(io.BytesIO(bytes(count * CHUNK + 1)))
        ours.append([last.address.hex()])
    assert bee("zeros", *counts) == ours


def test_bee_js_reads_what_is_published_and_we_read_what_it_uploads(model, tmp_path):
    (model / "README.md").write_bytes(np.random.default_rng(4).bytes(PIECE + CHUNK + 1))
    with serving() as (process, url):
        *_, published = dllm(url, "publish", model, "--to", "swarm").split()
        index = tmp_path / "index"
        bee("download", url, published.removeprefix("swarm://"), index)
        files = contents(model)
        entries = references(index)
        assert list(entries) == sorted(files)
        (tmp_path / "theirs").mkdir()
        bee("download", url, *(word for name in files for word in (entries[name], tmp_path / "theirs" / name)))
        assert contents(tmp_path / "theirs") == contents(model)

        large = tmp_path / "large"
        large.write_bytes(np.random.default_rng(5).bytes(3 * PIECE + 7))
        [theirs], [folder] = bee("upload", url, STAMP, large, index)
        assert f"swarm://{folder}" == published
        dllm(url, "fetch", f"swarm://{theirs}", "--out", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == large.read_bytes()
        dllm(url, "fetch", published, "--out", tmp_path / "folder")
        assert contents(tmp_path / "folder") == contents(model)

        words = "--prompt", "bcd", "--tokens", 20, "--seed", 1
        assert dllm(url, "generate", published, *words) == dllm(url, "generate", model, *words)
        process.kill()
        process.wait(20)
        line = dllm(url, "fetch", published, "--out", tmp_path / "gone", code=2)
        assert line.count("\n") == 1
        assert url in line
        assert not (tmp_path / "gone").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def references(index):
    """The reference of each file that an index names."""
    return {name: entry["reference"] for name, entry in json.loads(index.read_bytes())["files"].items()}
