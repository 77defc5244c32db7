"""A small trustless gateway of IPFS, and a node's block/get, over blocks in memory, and ways in which they may fail."""

import contextlib
import http.server
import threading
import urllib.parse

from dllm.remote.cid import Cid
from dllm.remote.unixfs import blocks_of


class Gateway:
    """A server on loopback; entering its `with` starts it, leaving ends it.

    Attributes
    ----------
    blocks : dict
        Name -> bytes.
    answers : callable or None
        What answers a question instead: answers(handler, name), which may write whatever it likes to handler.wfile.
    asked : list
        (method, path, headers) of all questions.
    """

    def __init__(self, blocks=None, answers=None):
        self.blocks, self.answers, self.asked = dict(blocks or {}), answers, []

    @classmethod
    def of(cls, files, answers=None):
        """One that has the blocks of files (unixfs.blocks_of), and its `root`."""
        made = [(str(cid), block) for cid, block in blocks_of(files)]
        gateway = cls(made, answers)
        gateway.root = made[-1][0]
        return gateway

    def __enter__(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self):
                outer._answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _answer(self, handler):
        self.asked.append((handler.command, handler.path, dict(handler.headers)))
        parts = urllib.parse.urlsplit(handler.path)
        query = urllib.parse.parse_qs(parts.query)
        name = query["arg"][0] if "arg" in query else parts.path.rpartition("/")[2]
        with contextlib.suppress(ConnectionError):
            if self.answers:
                self.answers(handler, name)
            elif name in self.blocks:
                reply(handler, 200, self.blocks[name])
            else:
                reply(handler, 404, b"not here")


def reply(handler, status, body, **headers):
    """A plain answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def damaged(block):
    """A block with one bit flipped."""
    return bytes([block[0] ^ 1]) + block[1:]


def block_of(codec, data):
    """(name, bytes) of a block."""
    return str(Cid.of(codec, data)), data
