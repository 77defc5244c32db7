"""Clients that ask all the time, while ranks come and go."""

import json
import pathlib
import threading
import time

import httpx

CLIENTS, TOKENS = 64, 100


class Clients:
    """Some clients that ask for the same few texts again and again, on new connections, streaming."""

    def __init__(self, server, count=CLIENTS):
        self.url, self.over = server.url, threading.Event()
        self.done, self.failed = [], []  # (seed, text); (begun, ended, rank or None: before the answer began, error)
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _run(self, number):
        seed = number % 4
        while not self.over.is_set():
            rank, begun = None, time.monotonic()
            body = {"prompt": "To be", "max_tokens": TOKENS, "seed": seed, "stream": True}
            try:
                with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=30) as answer:
                    rank = int(answer.headers["x-dllm-rank"])
                    lines = [line for line in answer.iter_lines() if line]
                    assert lines[-1] == "data: [DONE]"
                    self.done.append((seed, "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])))
            except httpx.TransportError as error:
                self.failed.append((begun, time.monotonic(), rank, error))

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in self.threads)


def is_gone(pid):
    """Whether a process has ended, with all its threads, so that its sockets are closed; it may still be a zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(list(pathlib.Path(f"/proc/{pid}/task").iterdir())) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True
