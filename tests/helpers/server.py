"""A server for tests: real ranks, a free port, clients that reach any of them."""

import json
import pathlib
import re
import threading
import time

import httpx

from dllm.engines.requests import Finished
from helpers.launch import ULFM, Job, flavour

LIMIT = 60  # seconds, of any wait
TESTS = pathlib.Path(__file__).parents[1]
SURVIVES = flavour() == "openmpi"


class Server(Job):
    """`dllm serve MODEL` on some ranks, by mpirun; keep: by its own launcher instead. Entering its `with` waits for it.

    model : of one model, or of several
    spied : a new folder, where helpers.spy writes what MPI is given
    """

    def __init__(self, model, *options, ranks=2, keep=False, token=None, timeout=200, spied=None):
        models = model if isinstance(model, list) else [model]
        words = ["-m", "dllm", "serve", *models, "--port", 0, *options, *(["-n", ranks] if keep else [])]
        if spied:
            spied.mkdir()
            words = ["-m", "helpers.spy", spied, "dllm.serve", *words[3:]]
        super().__init__(
            0 if keep else ranks,
            *words,
            timeout=timeout,
            env={"PYTHONPATH": TESTS} | (ULFM if SURVIVES else {}) | ({"DLLM_TOKEN": token} if token else {}),
        )
        self.size, self.headers = ranks, {"Authorization": f"Bearer {token}"} if token else {}

    def __enter__(self):
        self.url = self.wait_for_url()
        self.until(lambda: len(self.alive()) == self.size, "ranks that know each other")
        return self

    def wait_for_url(self, after=0):
        """The address that the server has printed, of its start number `after`."""
        found = lambda: re.findall(r"^dllm: .* at (http://\S+),", self.out, re.MULTILINE)
        self.until(lambda: len(found()) > after, "server")
        return found()[after]

    def health(self):
        """/health of any rank, once one answers."""
        end = time.monotonic() + 10
        while True:
            try:
                return httpx.get(f"{self.url}/health", headers=self.headers, timeout=5).json()
            except httpx.TransportError:
                assert time.monotonic() < end, f"nobody answers\n{self}"
                time.sleep(0.05)

    def alive(self):
        """rank -> pid of those that are well, as any of them sees it."""
        return {entry["rank"]: entry["pid"] for entry in self.health()["ranks"] if entry["state"] == "ok"}

    def complete(self, prompt="To be", **body):
        return httpx.post(f"{self.url}/v1/completions", json={"prompt": prompt, **body}, headers=self.headers, timeout=60)

    def log(self, event="request"):
        """Lines of the log, dicts."""
        lines = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


def texts(response):
    """The texts of an answer, by index."""
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


class Collected:
    """Takes what an engine delivers: `events` of each stream, in order."""

    def __init__(self):
        self.events, self.calls, self.changed = {}, [], threading.Condition()

    def __call__(self, news):
        with self.changed:
            self.calls.append(news)
            for stream, event in news:
                self.events.setdefault(stream, []).append(event)
            self.changed.notify_all()

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, LIMIT), "nothing came"

    def ended(self, stream):
        return isinstance(self.events.get(stream, [None])[-1], Finished)

    def whole(self, *streams):
        """Events of streams that have ended."""
        self.wait(lambda: all(map(self.ended, streams)))
        return [self.events[stream] for stream in streams]
