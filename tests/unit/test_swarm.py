"""dllm/remote/{chunks,swarm}.py: addresses by the definition, files and folders to and from a server that speaks Bee's HTTP,
and what becomes of answers that are damaged, missing, late or made to harm.
"""

import contextlib
import io
import random
import time
import tracemalloc

import msgspec
import numpy as np
import pytest
from helpers.bee_server import BATCH, Drip, bee, split
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config import StorageConfig
from dllm.errors import UserError
from dllm.kernels import keccak
from dllm.remote import chunks, locate, swarm

CHUNK, PIECE = chunks.CHUNK, chunks.PIECE
BYTES = np.random.default_rng(7).bytes(3 * PIECE + CHUNK + 1)
EMPTY = "b34ca8c22b9e982354f9c7f50b470d66db428d880c8a904d5fe4ec9713171526"
FILES = {"config.toml": b"x = 1\n", "empty": b"", "parts/0/a": BYTES[:CHUNK], "parts/1": BYTES[: 2 * PIECE + 1]}
LIMIT = 0.5  # seconds that the server has in tests of slow ones


@pytest.fixture(scope="module")
def server():
    with bee() as server:
        yield server


@pytest.fixture
def node(server, monkeypatch):
    """The server, empty and honest, and settings that name it."""
    server.store.clear()
    server.asked.clear()
    server.faults = lambda method, path: None
    monkeypatch.setenv(swarm.BEE, server.url)
    monkeypatch.setenv(swarm.STAMP, BATCH)
    return server


def storage(**changes):
    return StorageConfig(**{"timeout": 20.0, **changes})


def publish(folder, files=FILES):
    """The URL of a folder that is published; its files are made in `folder`."""
    paths = {}
    for name, data in files.items():
        paths[name] = folder / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(data)
    return f"swarm://{swarm.node(storage()).publish(paths)}"


def refused(call, *words):
    """The one line that a call is refused with; it has all the words."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    assert [word for word in words if word not in line] == [], line
    return line


# addresses

PIECES = [0, 1, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 8192, 8193, 127 * 4096 + 5, PIECE - 1, PIECE, PIECE + 1]


@pytest.mark.parametrize("size", [*PIECES, PIECE + 4096, PIECE + 4097, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE + 4097])
def test_a_file_has_the_address_of_the_definition(size, tmp_path):
    store = {}
    expected = split(BYTES[:size], store)
    (tmp_path / "file").write_bytes(BYTES[:size])
    assert chunks.reference_of(tmp_path / "file") == expected.hex()
    found = list(chunks.parts(io.BytesIO(BYTES[:size])))
    assert b"".join(part.data for part in found if not part.inner) == BYTES[:size]
    assert {part.address: part.data for part in found if part.inner}.items() <= store.items()


@pytest.mark.parametrize("count", [128 * 128, 128 * 128 + 1, 128 * 129, 129 * 128 + 1, 2 * 128 * 128 + 1])
def test_a_file_of_three_levels_of_addresses_is_the_definition_s(count, monkeypatch):
    """With chunks of zeros, of which few differ: `count` of them and a byte."""
    known = {}

    def piece_address(data):
        if len(data) not in known:
            known[len(data)] = split(data, {})
        return known[len(data)]

    monkeypatch.setattr(chunks, "piece_address", piece_address)
    *_, last = chunks.parts(Zeros(count * CHUNK + 1))

    def define(size):
        """The address of so many zeros, each size once."""
        if size not in known:
            part = chunks.part_of(size)
            below = [define(min(part, size - first)) for first in range(0, size, part)]
            known[size] = split(bytes(size), {}) if size <= CHUNK else chunks.chunk_address(size, b"".join(below))
        return known[size]

    assert last.address == define(count * CHUNK + 1)


class Zeros(io.RawIOBase):
    """A file of so many zeros."""

    def __init__(self, size):
        self.left = size

    def read(self, most=-1):
        self.left -= (got := min(most, self.left))
        return bytes(got)


@given(size=st.integers(1, 1 << 40))
@settings(deadline=None)
def test_parts_of_a_file_are_full_but_for_the_last(size):
    if size <= CHUNK:
        return
    part = chunks.part_of(size)
    payload = bytes(32 * -(-size // part))
    sizes = [length for _, length in chunks.parts_below(size, payload)]
    assert sum(sizes) == size
    assert set(sizes[:-1]) <= {part}
    assert 0 < sizes[-1] <= part
    assert 2 <= len(sizes) <= 128
    assert len(bin(part // CHUNK)) % 7 == 3  # CHUNK times a power of 128


# there and back


def test_a_folder_comes_back_as_it_was(node, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = publish(tmp_path / "out")
    folder = locate.open_folder(url, storage())
    assert sorted(folder.names) == sorted(FILES)
    assert folder.size == sum(map(len, FILES.values()))
    assert {name: folder.read(name, 1 << 21) for name in FILES} == FILES
    whole = locate.local_copy(url, storage())
    assert {str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*") if path.is_file()} == FILES
    assert locate.open_folder(f"{url}/parts", storage()).names == ["0/a", "1"]
    part = locate.open_folder(f"{url}/parts/0/a", storage())
    assert part.names == [""]
    assert part.read("", CHUNK) == FILES["parts/0/a"]
    refused(lambda: part.read("", CHUNK - 1), "4,096 bytes")
    refused(lambda: locate.open_folder(f"{url}/part", storage()), "has no 'part'")
    refused(lambda: folder.read("other", 9), "no file 'other'")


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, PIECE, PIECE + 1, 2 * PIECE + CHUNK, len(BYTES)])
def test_a_file_alone_comes_back_as_it_was_and_is_asked_for_once(size, node, tmp_path):
    (tmp_path / "file").write_bytes(BYTES[:size])
    url = f"swarm://{swarm.node(storage()).publish({'': tmp_path / 'file'})}"
    folder = locate.open_folder(url, storage())
    node.asked.clear()
    told = []
    folder.fetch("", tmp_path / "again", moved=told.append)
    assert (tmp_path / "again").read_bytes() == BYTES[:size]
    assert sum(told) == size
    assert len(set(node.asked)) == len(node.asked)
    assert len(node.asked) <= 2 + size // PIECE + 1
    refused(lambda: locate.open_folder(f"{url}/x", storage()), "is a file")


def test_the_reference_of_a_folder_depends_on_names_and_bytes_alone(node, tmp_path):
    other = dict(reversed(FILES.items()))
    assert publish(tmp_path / "one") == publish(tmp_path / "two", other)
    assert publish(tmp_path / "three", {**FILES, "empty": b"1"}) != publish(tmp_path / "one")


def test_memory_is_bounded_whatever_the_size(node, tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(16 << 20)
    tracemalloc.start()
    try:
        assert chunks.reference_of(tmp_path / "large") == swarm.node(storage()).publish({"": tmp_path / "large"})
        ours = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ours < 6 << 20  # pieces, here and at the server


# refusals

ADDRESS = "cd" * 32


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("swarm://", ["no URL"]),
        (f"swarm://{ADDRESS[:-1]}", ["no reference", "64 hexadecimal"]),
        (f"swarm://{ADDRESS}0", ["no reference", "64 hexadecimal"]),
        (f"swarm://{ADDRESS * 2}", ["encrypted"]),
        (f"swarm://{'xy' * 32}", ["no reference"]),
        (f"swarm://0x{ADDRESS}", ["no reference"]),
        (f"swarm://{ADDRESS}/%ff", ["no text"]),
        (f"swarm://{ADDRESS}", [ADDRESS, "404"]),
        (f"swarm://{EMPTY.upper()}", [EMPTY, "404"]),
    ],
)
def test_urls_that_name_nothing(url, words, node):
    refused(lambda: locate.open_folder(url, storage()), *words)


def test_addresses_of_nodes_and_stamps(node, monkeypatch):
    refused(lambda: swarm.Bee("http://192.0.2.1:1633", 1.0), "https://", "192.0.2.1")
    refused(lambda: swarm.Bee("http://bee:1633", 1.0), "https://")
    refused(lambda: swarm.Bee("localhost:1633", 1.0), "address")
    swarm.Bee("https://192.0.2.1", 1.0)
    for stamp in ("", "ab", "xy" * 32, BATCH + "\n"):
        monkeypatch.setenv(swarm.STAMP, stamp)
        refused(lambda: swarm.node(storage()), swarm.STAMP, "64 hexadecimal")
    monkeypatch.delenv(swarm.BEE)
    refused(lambda: swarm.node(storage()), swarm.BEE, "storage.bee")
    assert swarm.Bee(storage(bee=node.url).bee, 1.0).name == node.url


def test_what_a_node_says_to_a_stamp_is_shown(node, tmp_path, monkeypatch):
    monkeypatch.setenv(swarm.STAMP, "cd" * 32)
    refused(lambda: publish(tmp_path), "404: batch with id not found")
    monkeypatch.setenv(swarm.STAMP, f"0x{BATCH.upper()}")
    node.faults = lambda method, path: (402, {"message": "batch is overissued\n\x1b[2J"})
    refused(lambda: publish(tmp_path), "402: batch is overissued\\u000a\\u001b[2J")
    node.faults = lambda method, path: (502, b"<html>" * 5000)
    refused(lambda: publish(tmp_path), "answers 502")


def test_a_node_that_names_what_it_takes_otherwise_is_not_believed(node, tmp_path):
    for answer in ({"reference": ADDRESS}, {"reference": 7}, {}, [], {"reference": ADDRESS * 1000}):
        node.faults = lambda method, path: (201, answer)
        refused(lambda: publish(tmp_path), "gives the reference")


@contextlib.contextmanager
def within(seconds):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def test_a_node_that_is_down_slow_or_drips(node, tmp_path):
    url = publish(tmp_path)
    with within(5):
        refused(lambda: locate.open_folder(url, storage(bee="http://127.0.0.1:9", timeout=LIMIT)), "127.0.0.1:9")
    node.faults = lambda method, path: time.sleep(2 * LIMIT)
    with within(LIMIT + 2):
        refused(lambda: locate.open_folder(url, storage(timeout=LIMIT)), f"within {LIMIT:g} s")
    node.faults = lambda method, path: (200, Drip(bytes(CHUNK), LIMIT / 4))
    with within(LIMIT + 2):
        refused(lambda: locate.open_folder(url, storage(timeout=LIMIT)), f"within {LIMIT:g} s")


def test_every_chunk_that_is_damaged_or_missing_is_named(node, tmp_path):
    url = publish(tmp_path, {"file": BYTES[: PIECE + 2 * CHUNK + 1]})
    folder = locate.open_folder(url, storage())
    inner = [address for address, chunk in node.store.items() if int.from_bytes(chunk[:8], "little") > CHUNK]
    assert len(inner) == 3  # the root of the file, and those of its two pieces
    for address in [*inner, *list(node.store)[:3], *list(node.store)[-4:]]:
        chunk = node.store[address]
        for damaged in (bytes([*chunk[:-1], chunk[-1] ^ 1]), chunk[:-1], chunk + b"\0", b"", None):
            if damaged is None:
                del node.store[address]
            else:
                node.store[address] = damaged
            if address.hex() == url.removeprefix("swarm://"):
                continue  # which is open already
            refused(lambda: folder.fetch("file", tmp_path / "new"), node.url)
            assert not (tmp_path / "new").exists()
            assert not list(tmp_path.glob(".*.tmp"))
        node.store[address] = chunk
    folder.fetch("file", tmp_path / "new")


# folders made to harm


def served(node, data):
    """Opens what is in `data` as a folder."""
    return locate.open_folder(f"swarm://{split(data, node.store).hex()}", storage())


def index(*names, **changes):
    """An index whose names nobody has checked."""
    entry = {"reference": EMPTY, "size": 0, **changes}
    return msgspec.json.encode({"format": "dllm-folder-1", "files": dict.fromkeys(sorted(names), entry)})


BAD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    "/etc/x",
    "a//b",
    "a/",
    "a/../b",
    "a/./b",
    "a\nb",
    "a\0",
    "\u202ex",
    "x" * 256,
    "a/" * 600 + "a",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_folder_with_a_name_that_leads_elsewhere(name, node):
    data = index(name)
    assert data.startswith(swarm.BEGINNING)
    refused(lambda: served(node, data), "no list of files")


def test_folders_that_are_not_as_dllm_writes_them(node):
    assert served(node, index("a", "b")).names == ["a", "b"]
    good = index("a", "b").decode()
    one = good[len(swarm.BEGINNING) : good.index("}") + 1]
    for data in [
        good.replace('"b"', '"a"'),  # twice
        good.replace('"a"', '"c"'),  # out of order
        good.replace(":0", ":00"),
        good.replace(":0", ":-1"),
        good.replace(":0", f":{1 << 41}"),
        good.replace(":0", ":1e3"),
        good.replace(EMPTY, EMPTY[:-1]),
        good.replace(EMPTY, EMPTY.upper()),
        good.replace(EMPTY, EMPTY + "\\n"),
        good + " ",
        good[:-1],
        good.replace('"size"', '"x":1,"size"'),
        good[:-1] + ',"x":1}',
        swarm.BEGINNING.decode() + "[" * 100_000,
        swarm.BEGINNING.decode() + f"{one}}}}}".replace('"a"', '"\\ud800"'),
        index("a", "a/b").decode(),
        index(*map(str, range(swarm.MOST_FILES + 1))).decode(),
    ]:
        assert data != good
        refused(lambda: served(node, data.encode()), "no list of files")
    refused(lambda: served(node, swarm.BEGINNING + bytes(swarm.LARGEST_INDEX)), "it may have 16,777,216")


def test_a_size_that_is_not_that_of_the_file(node):
    split(BYTES[:100], node.store)
    reference = split(BYTES[:100], {}).hex()
    folder = served(node, index("a", reference=reference, size=99))
    refused(lambda: folder.read("a", 1 << 20), "100 bytes", "says 99")
    folder = served(node, index("a", reference=reference, size=101))
    refused(lambda: folder.read("a", 1 << 20), "100 bytes", "says 101")


def chunk(node, span, payload):
    """The reference of a chunk that says what it wants, kept by the server."""
    address = chunks.chunk_address(span, payload)
    node.store[address] = span.to_bytes(8, "little") + payload
    return address


def test_trees_that_are_none(node):
    leaf = split(BYTES[:CHUNK], node.store)
    cases = [
        (2 * CHUNK, leaf),  # too few addresses
        (2 * CHUNK, leaf * 3),
        (2 * CHUNK, leaf + leaf[:-1]),
        (5, b"four"),
        (1 << 41, leaf * 2),
        ((1 << 63) + 2 * CHUNK, leaf * 2),  # as Bee marks what is stored with redundancy
        (PIECE + 1, leaf + leaf),  # the first part is not as long as it should be
        (PIECE + CHUNK, split(BYTES[:PIECE], node.store) + split(BYTES[:1], node.store)),
    ]
    for span, payload in cases:
        address = chunk(node, span, payload).hex()
        refused(lambda: locate.open_folder(f"swarm://{address}", storage()).read("", 1 << 42), node.url)
    deep = chunk(node, 128 * PIECE + 1, leaf + leaf)  # where a chunk of addresses should be
    refused(lambda: locate.open_folder(f"swarm://{deep.hex()}", storage()), "bytes at", f"{128 * PIECE:,}")


def test_a_file_of_a_terabyte_made_of_a_few_chunks_is_refused_by_its_size(node, tmp_path):
    part, address = CHUNK, split(bytes(CHUNK), node.store)
    while part < 1 << 40:
        count = min(128, (1 << 40) // part)
        address, part = chunk(node, part * count, address * count), part * count
    folder = locate.open_folder(f"swarm://{address.hex()}", storage())
    assert folder.size == 1 << 40
    refused(lambda: folder.read("", 1 << 20), "1,099,511,627,776 bytes")
    refused(lambda: folder.fetch("", tmp_path / "x", most=1 << 30), "1,099,511,627,776 bytes")


@pytest.mark.parametrize("name", [b"mantaray:0.1", b"mantaray:0.2"])
def test_folders_of_bee_s_own_are_named(name, node):
    key = random.Random(1).randbytes(32)
    version = bytes(one ^ other for one, other in zip(keccak.keccak256_reference(name)[:31], key, strict=False))
    refused(lambda: served(node, key + version + bytes(65)), "/bzz", "dllm publish")
