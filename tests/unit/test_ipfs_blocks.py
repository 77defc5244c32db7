"""CIDs, UnixFS and CAR: known names, trees that come back whole, and blocks made to harm that are refused."""

import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.errors import UserError
from dllm.remote import car, unixfs
from dllm.remote.cid import DAG_PB, RAW, Cid, read_varint, varint
from dllm.remote.tree import DEEPEST, FIRST_PARTS, Tree
from dllm.remote.unixfs import LARGEST_BLOCK, LEAF, WIDTH, blocks_of

KNOWN = {  # in every implementation of IPFS
    "empty folder": "bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354",
    "empty file": "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
    "of version 0": "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn",  # the empty folder
}


def message(number, value):
    """A field of protobuf: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def data(kind, *fields):
    return message(1, message(1, kind) + b"".join(message(number, value) for number, value in fields))


def link(cid, name=b"", size=0):
    return message(2, message(1, bytes(cid)) + message(2, name) + message(3, size))


EMPTY = Cid.of(RAW, b"")


def folder(*names, target=EMPTY):
    return b"".join(link(target, name) for name in names) + data(1)


class Store(dict):
    """Blocks by CID, as `Tree` asks for them."""

    def put(self, codec, block):
        cid = Cid.of(codec, block)
        self[cid] = block
        return cid

    def get(self, cid):
        if cid not in self:
            raise UserError(f"no block {cid}")
        return self[cid]

    def tree(self, block):
        return Tree(self.get, self.put(DAG_PB, block))


def write(folder, files):
    for name, content in files.items():
        path = folder / name if name else folder / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: folder / (name or "file") for name in files}


def test_known_names_are_made(tmp_path):
    assert [str(cid) for cid, _ in blocks_of({})] == [KNOWN["empty folder"]]
    assert [str(cid) for cid, _ in blocks_of(write(tmp_path, {"": b""}))] == [KNOWN["empty file"]]
    assert str(Cid.parse(KNOWN["of version 0"])) == KNOWN["empty folder"]


@pytest.mark.parametrize(
    "text",
    ["", "b", "x", "Qm", "Q" * 46, "Qm" + "l" * 44, KNOWN["empty file"].upper(), KNOWN["empty file"][:-1],
     KNOWN["empty file"][:-1] + "v", KNOWN["empty file"] + "a", "bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy",
     "zdj7Wd8AMwqnhJGQCbFxBVodGSBG84TM7Hs1rcJuQMwTyfEDS", "b" + "a" * 10_000, "bafkreié"],
)  # fmt: skip
def test_what_is_no_cid_is_refused(text):
    with pytest.raises(UserError, match="is not a CID"):
        Cid.parse(text)


@given(st.integers(0, 2**63 - 1))
def test_numbers_come_back(number):
    assert read_varint(varint(number), 0) == (number, len(varint(number)))


names = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1, max_size=8)
paths = st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map("/".join)


def trees(contents):
    """Files by name, none of them a folder of another."""

    def apart(files):
        return {a: data for a, data in files.items() if not any(b.startswith(f"{a}/") for b in files)}

    return st.dictionaries(paths, contents, max_size=6).map(apart)


@settings(max_examples=60, deadline=None)
@given(trees(st.binary(max_size=100)), st.randoms())
def test_a_tree_comes_back_out_of_a_car_file_in_any_order_with_blocks_twice(tmp_path_factory, files, chance):
    where = tmp_path_factory.mktemp("tree")
    there = write(where / "files", files)
    root = car.write(where / "ours.car", there)
    made = list(blocks_of(there))
    sections = [car.section(*block) for block in [*made, *chance.sample(made, len(made) // 2)]]
    chance.shuffle(sections)
    (where / "mixed.car").write_bytes(car.header(root) + b"".join(sections))
    for name in ("ours.car", "mixed.car"):
        blocks = car.CarFile(where / name)
        assert blocks.root == root == made[-1][0]
        tree = Tree(blocks.get, root)
        assert {name: tree.read(name, 100) for name in tree.names} == files
        blocks.close()
    assert car.size_of(iter(made)) == (root, (where / "ours.car").stat().st_size)


@pytest.mark.parametrize("size", [LEAF - 1, LEAF, LEAF + 1, 3 * LEAF + 5])
def test_a_file_of_several_blocks_comes_back(tmp_path, size):
    content = random.Random(size).randbytes(size)
    made = dict(blocks_of(write(tmp_path, {"": content})))
    root = list(made)[-1]
    tree = Tree(made.__getitem__, root)
    assert tree.names == [""]
    moved = []
    tree.fetch("", tmp_path / "out", size, moved.append)
    assert (tmp_path / "out").read_bytes() == content
    assert sum(moved) == size
    with pytest.raises(UserError, match=f"has {size:,} bytes, it may have {size - 1:,}"):
        tree.fetch("", tmp_path / "other", size - 1)
    assert not (tmp_path / "other").exists()


def test_only_the_blocks_of_a_file_are_asked_for(tmp_path):
    files = {f"shard-{number}": random.Random(number).randbytes(3 * LEAF) for number in range(10)}
    made = dict(blocks_of(write(tmp_path, files)))
    asked = []
    tree = Tree(lambda cid: asked.append(cid) or made[cid], list(made)[-1])
    assert len(asked) == 1
    assert tree.read("shard-7", 3 * LEAF) == files["shard-7"]
    assert len(asked) == 1 + 1 + 3


def test_a_path_leads_to_what_is_below(tmp_path):
    made = dict(blocks_of(write(tmp_path, {"a/b/c": b"1", "a/d": b"2"})))
    root = list(made)[-1]
    assert Tree(made.__getitem__, root, "a").names == ["b/c", "d"]
    assert Tree(made.__getitem__, root, "a/b/c").read("", 10) == b"1"
    for path in ("x", "a/d/e", "a/b/c/d"):
        with pytest.raises(UserError, match=f"has no '{path}'"):
            Tree(made.__getitem__, root, path)


@pytest.mark.parametrize(
    "name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"a\nb", b"\x1b[1m", "a\u202eb".encode(), b"\xff", b"n" * 256]
)
def test_names_that_are_none_are_refused(name):
    with pytest.raises(UserError, match="is no file and no folder"):
        Store().tree(folder(name))


HOSTILE = {
    "a folder in several blocks": data(5, (2, b"\xff"), (5, 0x22), (6, 256)),
    "a symbolic link": data(4, (2, b"/etc/passwd")),
    "metadata": data(3),
    "its type is unknown": data(9),
    "it has a name twice": folder(b"a", b"a"),
    "it does not have a size for each part": link(Cid.of(RAW, b"")) + data(2, (3, 0)),
    "it has an empty part": link(Cid.of(RAW, b"")) + data(2, (3, 0), (4, 0)),
    "its sizes do not add up": link(Cid.of(RAW, b"abc")) + data(2, (3, 7), (4, 3)),
    "it has a field that no node has": message(7, 1),
    "it has a field of another kind": b"\x0d\0\0\0\0",
    "a link has a field that no link has": message(2, message(9, b"")),
    "it ends early": b"\x0a\x7f",
    "a number that does not end": b"\xff" * 20,
    "another codec or hash": message(2, message(1, b"\x01\x71\x12\x20" + bytes(32))) + data(1),
    "over 32,768 names": folder(*(b"%x" % number for number in range((1 << 15) + 1))),
    "over 16,384 parts": b"".join([link(Cid.of(RAW, b"a"))] * 16385) + data(2, *[(4, 1)] * 16385),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_blocks_that_are_no_file_and_no_folder_are_refused(why):
    with pytest.raises(UserError, match=why):
        Store().tree(HOSTILE[why])


def test_a_part_that_is_larger_or_smaller_than_said_is_refused(tmp_path):
    for said in (2, 4):
        store = Store()
        tree = store.tree(link(store.put(RAW, b"abc")) + data(2, (3, said), (4, said)))
        with pytest.raises(UserError, match=f"is not the {said} bytes"):
            tree.fetch("", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_depth_is_bounded():
    store = Store()
    inner, cid = folder(), store.put(RAW, b"a")
    for _ in range(DEEPEST + 1):
        inner = folder(b"a", target=store.put(DAG_PB, inner))
        cid = store.put(DAG_PB, link(cid) + data(2, (3, 1), (4, 1)))
    with pytest.raises(UserError, match="more than 16 deep"):
        store.tree(inner).names  # noqa: B018
    with pytest.raises(UserError, match="more than 16 deep"):
        Tree(store.get, cid).read("", 10)


def test_folders_that_multiply_are_refused():
    """Ten blocks that say a hundred thousand million names."""
    store = Store()
    cid = store.put(RAW, b"a")
    for _ in range(6):
        cid = store.put(DAG_PB, folder(*(b"%d" % number for number in range(100)), target=cid))
    with pytest.raises(UserError, match="over 100,000 files"):
        Tree(store.get, cid).names  # noqa: B018


def test_a_file_of_crumbs_is_refused():
    """Few blocks that say a file of many parts of one byte, each of which would have to be asked for."""
    store, size = Store(), 1
    cid = store.put(RAW, b"a")
    for _ in range(3):
        cid, size = store.put(DAG_PB, link(cid) * 100 + data(2, (3, 100 * size), *[(4, size)] * 100)), 100 * size
    with pytest.raises(UserError, match="is cut into too many parts"):
        Tree(store.get, cid).read("", size)
    assert size > FIRST_PARTS


def test_a_file_larger_than_the_disk_is_refused_before_it_is_asked_for(tmp_path):
    store, size = Store(), 1 << 49
    tree = store.tree(link(Cid.of(RAW, b"nobody has it")) + data(2, (3, size), (4, size)))
    with pytest.raises(UserError, match=f"has {size:,} bytes"):
        tree.fetch("", tmp_path / "out")


GOOD = Cid.of(RAW, b"abc")
CARS = {
    "none of version 1 with one root": [
        b"", b"\0", b"\x3a", varint(1 << 40), b"\x0a\xa1gversion\x02" + bytes(40), car.header(GOOD)[:-1] + b"\x02",
        varint(39) + car.BEFORE.replace(b"\x81", b"\x80") + bytes(39), b"\xff" * 100,
    ],
    "it ends early": [car.header(GOOD) + car.section(GOOD, b"abc")[:-1], car.header(GOOD) + b"\x80"],
    "over 2 MiB, or none": [car.header(GOOD) + length + bytes(GOOD) for length in (varint(LARGEST_BLOCK + 37), b"\x05")],
    "a number that does not end": [car.header(GOOD) + b"\xff" * 20],
    "a CID of another codec or hash": [car.header(GOOD) + b"\x30" + bytes(48)],
}  # fmt: skip


@pytest.mark.parametrize("why", CARS)
def test_what_is_no_car_file_is_refused(tmp_path, why):
    for number, content in enumerate(CARS[why]):
        path = tmp_path / f"{number}.car"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"is not a CAR file that can be read: .*({why}|ends early|does not end)"):
            car.CarFile(path)


def test_a_damaged_or_missing_block_of_a_car_file_is_named(tmp_path):
    (tmp_path / "damaged.car").write_bytes(car.header(GOOD) + car.section(GOOD, b"abd"))
    (tmp_path / "missing.car").write_bytes(car.header(GOOD))
    for name, why in (("damaged", f"is damaged: block {GOOD}"), ("missing", f"has no block {GOOD}")):
        with pytest.raises(UserError, match=why):
            Tree(car.CarFile(tmp_path / f"{name}.car").get, GOOD)


def test_what_cannot_be_read_or_named_is_refused(tmp_path):
    for files, why in (
        ({"a": tmp_path / "nothing"}, "cannot read"),
        ({"..": tmp_path / "x"}, "is no name"),
        ({"": tmp_path}, "cannot"),
    ):
        with pytest.raises(UserError, match=why):
            list(blocks_of(files))
    with pytest.raises(UserError, match="cannot write"):
        car.write(tmp_path / "no" / "x.car", {})
    assert list(tmp_path.iterdir()) == []


def test_nodes_of_a_large_file_have_1024_links(monkeypatch, tmp_path):
    """With leaves of one byte: the shape that IPIP-499 says, three levels of it."""
    monkeypatch.setattr(unixfs, "LEAF", 1)
    path = pathlib.Path(tmp_path, "file")
    path.write_bytes(bytes(WIDTH + 1))
    made = dict(blocks_of({"": path}))
    root = unixfs.decode(list(made)[-1], list(made.values())[-1])
    assert [link.size for link in root.links] == [WIDTH, 1]
    assert [len(unixfs.decode(link.cid, made[link.cid]).links) for link in root.links] == [WIDTH, 1]
