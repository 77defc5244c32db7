"""Reads seeded mutations of CAR files, of blocks with true names, and of a gateway's answers.

python mutated_ipfs.py FOLDER COUNT reads COUNT of each kind. It writes JSON: kind -> how many were read, how many refused; and
the memory that it took, in bytes.
"""

import contextlib
import json
import pathlib
import random
import resource
import signal
import socket
import sys
import threading

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from dllm.errors import UserError, line
from dllm.remote import car, ipfs
from dllm.remote.cid import DAG_PB, RAW, Cid
from dllm.remote.locate import fetch_all
from dllm.remote.tree import Tree
from dllm.remote.unixfs import blocks_of
from helpers.mutated_files import mutate

SECONDS = 20  # that one may take
FILES = {"a": b"abc" * 400, "b/c": b"text", "b/d/e": b"", "f": bytes(range(256)) * 8}


def files(folder):
    for name, content in FILES.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: folder / "files" / name for name in FILES}


def changed(data, seed):
    """The bytes with any damage, or with one byte that is another."""
    if seed % 3:
        return mutate(data, seed)[1]
    chance = random.Random(seed)
    place = chance.randrange(len(data))
    return (
        data[:place]
        + bytes([chance.choice([data[place] ^ 1 << chance.randrange(8), chance.randrange(256)])])
        + data[place + 1 :]
    )


def contents(get, root):
    """All that a tree holds."""
    tree = Tree(get, root)
    return {name: tree.read(name, 1 << 20) for name in tree.names}


class Cars:
    """A CAR file in which anything may have changed."""

    def __init__(self, folder):
        self.path, self.out = folder / "x.car", folder / "out"
        self.root = car.write(self.path, files(folder))
        self.data = self.path.read_bytes()

    def read(self, seed):
        self.path.write_bytes(changed(self.data, seed))
        blocks = car.CarFile(self.path)
        try:
            assert blocks.root != self.root or contents(blocks.get, self.root) == FILES
            contents(blocks.get, blocks.root)
        finally:
            blocks.close()


class Blocks:
    """Blocks whose names are right and whose words are not: what somebody who means harm can publish."""

    def __init__(self, folder):
        self.blocks = dict(blocks_of(files(folder)))
        leaf = Cid.of(RAW, b"x" * 300)
        self.blocks[leaf] = b"x" * 300
        part = b"\x12\x28\x0a\x24" + bytes(leaf) + b"\x12\x00"
        file = part * 3 + b"\x0a\x0e\x08\x02\x18\x84\x07" + b"\x20\xac\x02" * 3
        self.folders = [block for cid, block in self.blocks.items() if cid.codec == DAG_PB]
        self.folders.append(file)
        self.blocks[Cid.of(DAG_PB, file)] = file
        assert contents(self.get, Cid.of(DAG_PB, file)) == {"": b"x" * 900}
        self.out = folder / "made"

    def get(self, cid):
        """The block; of a name that was changed another one, so that more is read, in circles, too."""
        others = self.folders if cid.codec == DAG_PB else (b"", b"x" * 300)
        return self.blocks.get(cid) or others[cid.digest[0] % len(others)]

    def read(self, seed):
        block = changed(self.folders[seed // 3 % len(self.folders)], seed)
        root = Cid.of(DAG_PB, block)
        tree = Tree(lambda cid: block if cid == root else self.get(cid), root)
        if tree.names == [""]:
            tree.read("", 1 << 20)
        else:
            fetch_all(tree, self.out / str(seed), lambda size: None)
            assert {path.name for path in self.out.parent.iterdir()} == {"files", "made"}


class Answers:
    """Answers of a gateway, whole HTTP, in which anything may have changed."""

    def __init__(self, folder):
        self.block = b"abc" * 400
        self.cid = Cid.of(RAW, self.block)
        plain = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.ipld.raw\r\n"
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (self.block[:500], self.block[500:], b""))
        self.answers = [
            plain + b"Content-Length: 1200\r\nETag: x\r\n\r\n" + self.block,
            plain + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        ]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.now = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            peer, _ = self.listener.accept()
            with contextlib.suppress(OSError), peer:
                peer.recv(1 << 16)
                peer.sendall(self.now)

    def read(self, seed):
        self.now = changed(self.answers[seed // 3 % 2], seed)
        server = ipfs.Gateway(f"http://127.0.0.1:{self.listener.getsockname()[1]}", 5)
        assert ipfs.Blocks([server]).get(self.cid) == self.block


def main():
    folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    ends, before = {}, most()
    for kind in (Cars, Blocks, Answers):
        (folder / kind.__name__).mkdir()
        file, read, refused = kind(folder / kind.__name__), 0, 0
        for seed in range(count):
            signal.alarm(SECONDS)
            try:
                file.read(seed)
                read += 1
            except UserError as error:
                refused += line(error).count("\n") == 1
            except BaseException:
                print(f"{kind.__name__}, seed {seed}", file=sys.stderr)
                raise
        signal.alarm(0)
        ends[kind.__name__] = read, refused
    print(json.dumps([ends, most() - before]))


if __name__ == "__main__":
    main()
