"""Streams over HTTP from all ranks of `dllm serve`, through nginx where it is there, beside the same engines without HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPResponse
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np

from dllm import config
from dllm.data.tokenizers import WordTokenizer
from dllm.files import safetensors
from dllm.inference import model_folder
from dllm.kernels.team import Team
from dllm.model import torch_weights
from dllm.model.layout import Layout

from .results import Measured, Table, bars, middle, ratio, spread
from .runs import last_json, on_ranks
from .serve import Random
from .sizes import SIZES, Size

STREAMS = 64
TOKENS = 4096  # of a stream, behind which the next one comes
WORD = b" w"  # with which each token of these models begins, and nothing else of an event has
LIMIT = 120  # seconds for a server to begin, and to end
NGINX = """daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; proxy_http_version 1.1; proxy_read_timeout 600s; }} }} }}
"""


class Load(NamedTuple):
    """What streams got, and what it cost."""

    rate: float  # tokens a second of all
    gaps: list[float]  # seconds between events of a stream
    between: list[float]  # seconds between tokens of a stream: 0 between those of one event
    cost: dict[str, float]  # whose -> microseconds of processors a token


def http(options: argparse.Namespace) -> Measured:
    """Tokens a second of 64 streams over HTTP, through nginx where it is there, against the same engines alone.

    The client reads with what is left of the same processors; so its cost and that of nginx, which a server does not have
    where they are elsewhere, count here against HTTP. Costs are microseconds of processors a token.
    """
    columns = [("size, ranks", 20), ("engines alone", 30), ("HTTP", 30), ("HTTP ratio", 12)]
    columns += [("nginx", 30), ("nginx ratio", 13), ("events p50, p99 ms", 20), ("tokens p50, p99 ms", 20)]
    columns += [(f"{whose} us", 11) for whose in ("engines", "ranks", "nginx", "client")]
    table, data, groups = Table(f"Serving, {STREAMS} streams, {options.ranks} ranks, tokens/s", columns), {}, {}
    for name in options.sizes:
        folder, found = random_model(options.work / f"model-{name}", SIZES[name]), dict[str, list[float]]()
        for _ in range(options.rounds):
            for key, value in once(name, folder, options).items():
                found.setdefault(key, []).append(value)
        last = "nginx" if "nginx" in found else "HTTP"
        shown = lambda key, found=found: f"{middle(found[key]):.1f}" if key in found else "-"
        table.row(
            f"{name}, {options.ranks}", spread(found["engines"]), spread(found["HTTP"]), ratio(found["HTTP"], found["engines"]),
            spread(found.get("nginx", [])), ratio(found.get("nginx", []), found["engines"]),
            *(f"{shown(f'{last} {of} p50')}, {shown(f'{last} {of} p99')}" for of in ("events", "tokens")),
            shown("engines us"), *(shown(f"{last} {whose} us") for whose in ("ranks", "nginx", "client")),
        )  # fmt: skip
        data[name] = found
        groups[name] = {key: middle(found[key]) for key in ("engines", "HTTP", "nginx") if key in found}
    return table, data, partial(bars, f"tokens/s, {STREAMS} streams", groups)


def once(name: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, float]:
    """One round: what was measured of the engines alone, over HTTP, and through nginx."""
    found = alone(name, options.ranks, options.seconds)
    with server(folder, options.ranks) as url, behind(url, options.work / "nginx") as (proxied, pids):
        with urllib.request.urlopen(f"{url}/health", timeout=LIMIT) as answer:
            ranks = [entry["pid"] for entry in json.load(answer)["ranks"]]
        for key, at, watched in ("HTTP", url, {}), ("nginx", proxied, pids):
            if at:
                check(at)
                load = streams(at, options.seconds, {"ranks": ranks, **watched})
                found[key] = load.rate
                for of, gaps in ("events", load.gaps), ("tokens", load.between):
                    points = quantiles(gaps, n=100)
                    found |= {f"{key} {of} p50": 1000 * points[49], f"{key} {of} p99": 1000 * points[98]}
                found |= {f"{key} {whose} us": cost for whose, cost in load.cost.items()}
    return found


def random_model(folder: pathlib.Path, size: Size) -> pathlib.Path:
    """A model folder of a size with random parameters and made-up words."""
    settings = config.from_dict({"model": {"embedding": size.hidden, "hidden": size.hidden, "layers": size.layers}})
    tokenizer = WordTokenizer([f"w{number}" for number in range(size.vocabulary)])
    layout = Layout(settings.model, size.vocabulary, np.float32)
    vector = Random(size).model(1, 1, Team(1)).theta
    stored = torch_weights.encode(torch_weights.read_vector(layout, vector), "fp32")
    packed = safetensors.pack(stored)
    facts = model_folder.describe(settings, tokenizer, "fp32", packed) | {"imported": "random numbers"}
    model_folder.write(folder, packed, tokenizer, facts)
    return folder


def alone(name: str, ranks: int, seconds: float) -> dict[str, float]:
    """Tokens a second and the cost of all ranks' engines side by side, each with its part of the streams, and no HTTP."""
    command = [sys.executable, "-m", "benchmarks.serve", name, str(STREAMS // ranks), str(seconds), "1", "fp32", "0", "wait"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, **pipes) for _ in range(ranks)]
    for job in jobs:
        job.stdout.readline()  # it is ready
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    found = [last_json(job.communicate(timeout=LIMIT)[0]) for job in jobs]
    rate = sum(one["tokens_per_second"] for one in found)
    cost = sum(one["processor_seconds"] / one["seconds"] for one in found)
    return {"engines": rate, "engines us": 1e6 * cost / rate}


@contextlib.contextmanager
def server(folder: pathlib.Path, ranks: int) -> Iterator[str]:
    """The address of `dllm serve` on some ranks; it ends behind the `with`."""
    options = ["--port", "0", "--threads", "1", "--slots", str(STREAMS), "--max-tokens", str(TOKENS)]
    words = list(map(str, on_ranks(ranks, "dllm.serve", folder, *options)))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        try:
            assert job.stdout is not None
            for line in job.stdout:
                if address := re.search(r" at (http://\S+),", line):
                    wait_for(address[1])
                    yield address[1]
                    break
            else:
                sys.exit("dllm serve has ended")
        finally:
            job.terminate()
            job.wait(LIMIT)


def wait_for(url: str) -> None:
    """Return once somebody listens there. Raises OSError after LIMIT seconds."""
    host, _, port = url.removeprefix("http://").partition(":")
    end = time.monotonic() + LIMIT
    while True:
        try:
            return socket.create_connection((host, int(port)), 1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def behind(url: str, folder: pathlib.Path) -> Iterator[tuple[str | None, dict[str, list[int]]]]:
    """The address of an nginx before `url`, and its process; None: nginx is not there."""
    program = shutil.which("nginx")
    if program is None:
        yield None, {}
        return
    folder.mkdir(exist_ok=True)
    port = int(url.rpartition(":")[2]) + 1
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, url=url))
    with subprocess.Popen([program, "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"]) as job:
        try:
            wait_for(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}", {"nginx": [job.pid]}
        finally:
            job.terminate()
            job.wait(LIMIT)


@dataclass
class Watched:
    """A stream that is read, and the next one once it has ended."""

    number: int
    socket: socket.socket
    times: list[float] = field(default_factory=list)  # of each event
    counts: list[int] = field(default_factory=list)  # its tokens


def streams(url: str, seconds: float, pids: dict[str, list[int]]) -> Load:
    """What all streams get, and what it costs: as little as can be here, since the server shares the processors."""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_ones:
        found = [Watched(number, ask(url, number, TOKENS)) for number in range(STREAMS)]
        open_ones.callback(lambda: [one.socket.close() for one in found])
        for one in found:
            selector.register(one.socket, selectors.EVENT_READ, one)
        _read(selector, url, time.perf_counter() + 2)  # warms up
        before = spent(pids)
        begin = time.perf_counter()
        _read(selector, url, begin + seconds)
        took, after = time.perf_counter() - begin, spent(pids)
    gaps, between, tokens = list[float](), list[float](), 0
    for one in found:
        first = bisect(one.times, begin)
        waits = np.diff(one.times[max(0, first - 1) :]).tolist()
        gaps += waits
        tokens += sum(one.counts[first:])
        for gap, count in zip(waits, one.counts[-len(waits) :], strict=False):
            between += [gap, *[0.0] * (count - 1)]
    return Load(tokens / took, gaps, between, {name: 1e6 * (after[name] - before[name]) / tokens for name in after})


def _read(selector: selectors.BaseSelector, url: str, end: float) -> None:
    """Read what comes until then."""
    while (now := time.perf_counter()) < end:
        for key, _ in selector.select(end - now):
            one: Watched = key.data
            data = one.socket.recv(1 << 13)
            if not data:
                selector.unregister(one.socket)
                one.socket.close()
                one.socket = ask(url, one.number, TOKENS)
                selector.register(one.socket, selectors.EVENT_READ, one)
            elif count := data.count(WORD):
                one.times.append(time.perf_counter())
                one.counts.append(count)
            elif not data.startswith(b"HTTP/1.1 200 ") and b"data: [DONE]" not in data:
                raise ConnectionError(repr(data[:1000]))


def spent(pids: dict[str, list[int]]) -> dict[str, float]:
    """Seconds of processors that processes have used, and this one, the client. Linux alone tells it of others."""
    if sys.platform != "linux":
        return {}
    clock = lambda pid: time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3) of a process
    return {name: sum(map(clock, found)) for name, found in pids.items()} | {"client": time.process_time()}


def ask(url: str, number: int, tokens: int, stream: bool = True) -> socket.socket:
    """A connection that has asked for a text."""
    host = url.removeprefix("http://")
    address, _, port = host.partition(":")
    wanted: dict[str, Any] = {"prompt": f"w{number}", "max_tokens": tokens, "stream": stream, "seed": number}
    body = json.dumps(wanted).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((address, int(port)), LIMIT)
    connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    return connection


def check(url: str) -> None:
    """What is counted are the tokens: a stream, read event by event, is the whole text to the byte. Exits where it is not."""
    texts = list[str]()
    for streamed in (True, False):
        with ask(url, 1, 100, streamed) as connection, HTTPResponse(connection) as response:
            response.begin()
            data = response.read()
        lines = re.findall(rb"^data: ({.*)$", data, re.MULTILINE) if streamed else [data]
        texts.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))
        if data.count(WORD) != 100:
            sys.exit(f"100 tokens were asked for, {data.count(WORD)} counted")
    if texts[0] != texts[1]:
        sys.exit("a stream is not the whole text")
