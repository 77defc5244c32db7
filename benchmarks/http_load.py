"""Streams over HTTP from all ranks of `dllm serve`, through nginx where it is there, beside the same engines without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from statistics import quantiles
from typing import Any

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
LIMIT = 120  # seconds for a server to begin, and to end
NGINX = """daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; proxy_http_version 1.1; proxy_read_timeout 600s; }} }} }}
"""


def http(options: argparse.Namespace) -> Measured:
    """Tokens a second of 64 streams over HTTP, through nginx where it is there, against the same engines alone."""
    columns = [("size, ranks", 20), ("engines alone", 30), ("HTTP", 30), ("ratio", 9), ("nginx", 30), ("ratio", 9)]
    columns += [("p50, p99 ms", 18)]
    table, data, groups = Table(f"Serving, {STREAMS} streams, {options.ranks} ranks, tokens/s", columns), {}, {}
    for name in options.sizes:
        folder, found = random_model(options.work / f"model-{name}", SIZES[name]), dict[str, list[float]]()
        add = lambda key, value, found=found: found.setdefault(key, []).append(value)
        for _ in range(options.rounds):
            add("engines", alone(name, options.ranks, options.seconds))
            with server(folder, options.ranks) as url, behind(url, options.work / "nginx") as proxied:
                for key, at in {"HTTP": url, "nginx": proxied}.items():
                    if at:
                        rate, gaps = asyncio.run(load(at, options.seconds))
                        add(key, rate)
                        add(f"{key} p50", 1000 * quantiles(gaps, n=100)[49])
                        add(f"{key} p99", 1000 * quantiles(gaps, n=100)[98])
        last = "nginx" if "nginx" in found else "HTTP"
        table.row(
            f"{name}, {options.ranks}", spread(found["engines"]), spread(found["HTTP"]), ratio(found["HTTP"], found["engines"]),
            spread(found["nginx"]) if "nginx" in found else "-", ratio(found[last], found["engines"]),
            f"{middle(found[f'{last} p50']):.1f}, {middle(found[f'{last} p99']):.1f}",
        )  # fmt: skip
        data[name] = found
        groups[name] = {key: middle(found[key]) for key in ("engines", "HTTP", "nginx") if key in found}
    return table, data, partial(bars, f"tokens/s, {STREAMS} streams", groups)


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


def alone(name: str, ranks: int, seconds: float) -> float:
    """Tokens a second of all ranks' engines side by side, each with its part of the streams, and no HTTP."""
    command = [sys.executable, "-m", "benchmarks.serve", name, str(STREAMS // ranks), str(seconds), "1", "fp32"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    return sum(last_json(job.communicate(timeout=LIMIT)[0])["tokens_per_second"] for job in jobs)


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
def behind(url: str, folder: pathlib.Path) -> Iterator[str | None]:
    """The address of an nginx before `url`; None: nginx is not there."""
    program = shutil.which("nginx")
    if program is None:
        yield None
        return
    folder.mkdir(exist_ok=True)
    port = int(url.rpartition(":")[2]) + 1
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, url=url))
    with subprocess.Popen([program, "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"]) as job:
        try:
            wait_for(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            job.terminate()
            job.wait(LIMIT)


async def load(url: str, seconds: float) -> tuple[float, list[float]]:
    """Tokens a second of all streams, and seconds between the tokens of each."""
    found: list[list[float]] = [[] for _ in range(STREAMS)]
    tasks = [asyncio.create_task(_stream(url, number, times)) for number, times in enumerate(found)]
    await asyncio.sleep(2 + seconds)  # the first two seconds warm up
    for task in tasks:
        task.cancel()
    failed = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Exception)]
    if failed:
        raise failed[0]
    end = max(times[-1] for times in found)
    counted = [[one for one in times if one > end - seconds] for times in found]
    gaps = [float(gap) for times in counted for gap in np.diff(times)]
    return sum(map(len, counted)) / seconds, gaps


async def _stream(url: str, number: int, times: list[float]) -> None:
    """Ask for one stream behind the other; when each token came is added to `times`."""
    host = url.removeprefix("http://")
    address, _, port = host.partition(":")
    while True:
        reader, writer = await asyncio.open_connection(address, int(port))
        wanted: dict[str, Any] = {"prompt": f"w{number}", "max_tokens": TOKENS, "stream": True, "seed": number}
        body = json.dumps(wanted).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        try:
            status = await reader.readline()
            if b" 200 " not in status:
                raise ConnectionError(f"{status!r} {await reader.read(1000)!r}")
            while data := await reader.read(1 << 16):
                times += [time.perf_counter()] * data.count(b"data: {")
        finally:
            writer.close()
