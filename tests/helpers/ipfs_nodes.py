"""Real nodes of IPFS: Kubo, which has no HTTP here, and js-ipfs with its RPC. .ci/tools brings them to DLLM_TEST_IPFS."""

import base64
import json
import os
import pathlib
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import threading

import httpx

PARTS = pathlib.Path(os.environ.get("DLLM_TEST_IPFS") or "/nonexistent")
HERE = pathlib.Path(__file__).parent
START = 120  # seconds; a busy machine takes 30


def missing():
    """Why there are no nodes, or ""."""
    if not (PARTS / "node_modules/ipfs-core").is_dir() or not (PARTS / "venv/bin/python").exists():
        return "needs real nodes of IPFS: run .ci/tools FOLDER, then DLLM_TEST_IPFS=FOLDER"
    return "" if shutil.which("node") else "needs Node.js"


def script(folder, name):
    """A copy of a script beside the packages that it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / name, folder / name)
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PARTS / "node_modules")
    return folder / name


class Process:
    """A process that says lines of JSON and is told lines. Leaving its `with` kills it."""

    def __init__(self, *words, log):
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=log.parent,  # where Kubo puts a log of its own
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=lambda: [self._lines.put(line) for line in self.process.stdout], daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def line(self, seconds):
        """The next line. Fails where there is none in time."""
        try:
            return self._lines.get(timeout=seconds).strip()
        except queue.Empty:
            raise AssertionError(f"nothing said within {seconds} s\n{self.log.read_text()[-3000:]}") from None

    def json(self, seconds):
        """The next line of JSON."""
        while not (line := self.line(seconds)).startswith("{"):
            pass
        return json.loads(line)

    def tell(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self):
        self.process.kill()
        self.process.wait(20)
        self._reader.join(20)


class JsNode(Process):
    """js-ipfs. url: of its RPC."""

    def __init__(self, folder, name):
        super().__init__("node", script(folder, "js_node.mjs"), folder / name, log=folder / f"{name}.log")
        self.repo = folder / name
        said = self.json(START)
        self.url, self.address = said["url"], said["address"]

    def call(self, what, seconds=60, **arguments):
        """The answer of its RPC."""
        answer = httpx.post(f"{self.url}/api/v0/{what}", params=arguments, timeout=seconds)
        answer.raise_for_status()
        return answer

    def connect(self, other):
        self.call("swarm/connect", arg=other.address)

    def stop(self):
        """It takes connections and answers nobody."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)


class Kubo(Process):
    """Kubo 0.22 in a private network of the folder; blocks: those that it has from the start."""

    def __init__(self, folder, name, blocks=()):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "swarm.key").exists():
            (folder / "swarm.key").write_text(f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(32)}\n")
        for cid, block in blocks:
            path = folder / f"{name}-blocks" / place(cid)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(block)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.repo = folder / name
        super().__init__(PARTS / "venv/bin/python", HERE / "kubo_node.py", self.repo, port, log=folder / f"{name}.log")
        said = self.json(START)
        self.address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{said['id']}"

    def do(self, *words, seconds=60):
        """What one of its functions returns."""
        self.tell(json.dumps([str(word) for word in words]))
        return self.json(seconds)["result"]

    def blocks(self):
        """Where its blocks lie, by place."""
        return {str(path.relative_to(self.repo / "blocks")): path for path in (self.repo / "blocks").rglob("*.data")}


def place(cid):
    """Where Kubo's flatfs has a block: next-to-last/2 of the multihash in base32."""
    name = base64.b32encode(bytes(cid)[2:]).decode().rstrip("=")
    return f"{name[-3:-1]}/{name}.data"
