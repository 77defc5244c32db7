"""A server that speaks the HTTP of a node of Ethereum Swarm (Bee), as far as dllm asks: /bytes and /chunks, get and post.

Addresses are made by the definition, a chunk at a time. `faults` makes it lie: (method, path) -> None, or another answer.
"""

import contextlib
import http.server
import json
import threading
import time

import numpy as np

from dllm.kernels import keccak

BATCH = "ab" * 32  # the batch of stamps that it knows


def split(data, store):
    """The address of a file; all its chunks, with their length in front, into `store`."""
    if len(data) <= 4096:
        payload = data
    else:
        size = 4096
        while 128 * size < len(data):
            size *= 128
        payload = b"".join(split(data[i : i + size], store) for i in range(0, len(data), size))
    return put(store, len(data).to_bytes(8, "little") + payload)


def put(store, chunk):
    """The address of a chunk, which is kept."""
    words, out = np.zeros((1, 4096), np.uint8), np.empty((1, 4), np.uint64)
    words[0, : len(chunk) - 8] = np.frombuffer(chunk[8:], np.uint8)
    keccak.addresses(out, words.view(np.uint64), np.frombuffer(chunk[:8], np.uint64))
    store[out.tobytes()] = chunk
    return out.tobytes()


def join(address, store):
    """The bytes of a file. Raises KeyError where a chunk is missing."""
    chunk = store[address]
    if int.from_bytes(chunk[:8], "little") <= 4096:
        return chunk[8:]
    return b"".join(join(chunk[i : i + 32], store) for i in range(8, len(chunk), 32))


class Drip:
    """An answer that comes byte by byte, so slowly that none of them is late."""

    def __init__(self, body, pause):
        self.body, self.pause = body, pause


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(("GET", self.path))
        if not self.lied("GET"):
            kind, address = self.path.split("/")[1:3]
            try:
                found = self.server.store[bytes.fromhex(address)]
                self.answer(200, found if kind == "chunks" else join(bytes.fromhex(address), self.server.store))
            except (KeyError, ValueError):
                self.answer(404, {"code": 404, "message": "Not Found"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(("POST", self.path))
        if self.lied("POST"):
            return
        stamp = self.headers.get("swarm-postage-batch-id")
        if stamp is None:
            self.answer(400, {"code": 400, "message": "invalid header params"})
        elif stamp != BATCH:
            self.answer(404, {"code": 404, "message": "batch with id not found"})
        else:
            made = (split if self.path == "/bytes" else lambda data, store: put(store, data))(body, self.server.store)
            self.answer(201, {"reference": made.hex()})

    def lied(self, method):
        lie = self.server.faults(method, self.path)
        if lie is not None:
            self.answer(*lie)
        return lie is not None

    def answer(self, status, body):
        data = body.body if isinstance(body, Drip) else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not isinstance(body, Drip):
            self.wfile.write(data)
            return
        with contextlib.suppress(OSError):
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                time.sleep(body.pause)

    def log_message(self, *_):
        pass


class Bee(http.server.ThreadingHTTPServer):
    """Its `store` has chunks by address, `asked` every question: (method, path)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.asked, self.faults = {}, [], lambda method, path: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def bee():
    """One that answers while this lasts."""
    with Bee() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
