"""Real IPFS: names as other programs make them, nodes that die, stand still, lack a block or hand out a damaged one.

Kubo's nodes have no HTTP here: the gateway of helpers/gateway.py, which is not a real one, reads blocks off their disks.
"""

import itertools
import json
import random
import shutil
import subprocess
import time

import httpx
import pytest
from helpers import ipfs_nodes
from helpers.gateway import Gateway, damaged, reply
from helpers.ipfs_nodes import JsNode, Kubo, Process, place, script
from helpers.launch import mpirun
from helpers.server import Server
from helpers.several_commands import run_several
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm.kernels.compile import CACHE
from dllm.remote import car, ipfs
from dllm.remote.cid import RAW, Cid
from dllm.remote.tree import Tree
from dllm.remote.unixfs import LEAF, blocks_of

pytestmark = pytest.mark.skipif(bool(ipfs_nodes.missing()), reason=ipfs_nodes.missing())
SLACK = 25  # seconds that a command may take beside the time that a node has, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ipfs")


@pytest.fixture(scope="module")
def nodes(folder):
    """Two nodes of js-ipfs that know each other."""
    with JsNode(folder / "js", "first") as first, JsNode(folder / "js", "second") as second:
        first.connect(second)
        yield first, second


@pytest.fixture(scope="module")
def ipfs_car(folder):
    """path -> CID, of npm's ipfs-car."""
    with Process("node", script(folder / "car", "ipfs_car.mjs"), log=folder / "car.log") as process:

        def name(path):
            process.tell(path)
            return process.line(60)

        yield name


@pytest.fixture(autouse=True)
def _nobody_to_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(CACHE.parents[1]))  # that of all tests: kernels are compiled once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("DLLM_IPFS", "IPFS_GATEWAY", "DLLM_IPFS_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def several(tmp_path):
    """What commands wrote that ran one after another in one process, all of which ended well."""
    numbers = itertools.count()

    def run(commands, **env):
        words = [[f"dllm.{name}", *rest] for name, *rest in commands]
        ends = run_several(tmp_path / f"said-{next(numbers)}", 0, words, env=env, check=True, timeout=200)
        return [end.text for end in ends]

    return run


def dllm(*words, env, check=True):
    """(what a command wrote to standard output, to standard error); its exit code is 0, or with check=False 2."""
    done = mpirun(0, "-m", "dllm", *words, env=env, timeout=120)
    assert done.returncode == (0 if check else 2), done
    return done.stdout, done.stderr


def there(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: folder / name for name in files}


sizes = st.sampled_from([0, 1, 2, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF, 3 * LEAF - 7])
contents = st.one_of(st.binary(max_size=50), sizes.map(lambda size: random.Random(size).randbytes(size)))
letters = st.characters(exclude_categories=("C", "Z"), exclude_characters='/\\*?[]{}()!"')
names = st.text(letters, min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), contents, min_size=1, max_size=5).map(
    lambda files: {a: data for a, data in files.items() if not any(b.startswith(f"{a}/") for b in files)}
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees)
def test_our_names_are_those_of_ipfs_car_and_of_a_node(nodes, ipfs_car, tmp_path_factory, files):
    files = {"beside.it": b"", **files}  # ipfs-car leaves out a folder that holds nothing but one other
    where = tmp_path_factory.mktemp("tree") / "root"
    *_, (root, _) = blocks_of(write(where, files))
    ours = str(root)
    assert ipfs_car(where) == ours
    parts = [("file", (f"root/{name}".replace("%", "%25"), content)) for name, content in files.items()]
    arguments = {"cid-version": 1, "cid-base": "base32", "raw-leaves": "true", "chunker": f"size-{LEAF}", "pin": "false"}
    answer = httpx.post(f"{nodes[0].url}/api/v0/add", params=arguments, files=parts, timeout=60)
    named = {found["Name"]: found["Hash"] for found in map(json.loads, answer.text.splitlines())}
    assert named["root"] == ours


def test_a_file_of_more_than_1024_leaves_has_the_name_that_ipfs_car_gives(ipfs_car, tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate((1024 << 20) + 1)
    theirs = ipfs_car(tmp_path / "file")
    *_, (root, _) = blocks_of({"": tmp_path / "file"})
    assert str(root) == theirs


def test_publish_kill_the_origin_and_fetch_from_the_other(folder, world, tiny, several, tmp_path):
    run, model, small = world / "run", tmp_path / "model", world / "tiny"
    kinds = {"run": run, "model": model, "tiny": small}
    with JsNode(folder / "origin", "first") as first, JsNode(folder / "origin", "second") as second:
        second.connect(first)
        lines = [
            ("export", run, "--out", model),
            *(("share", "publish", what) for what in kinds.values()),
            ("share", "publish", small, "--set", "storage.pin=false"),
            *(("share", "publish", what, "--to", tmp_path / f"{name}.car") for name, what in kinds.items()),
            *(("share", "fetch", tmp_path / f"{name}.car", "--out", tmp_path / f"car-{name}") for name in kinds),
        ]
        said = several(lines, DLLM_IPFS=first.url)
        urls = dict(zip(kinds, (text.splitlines()[-1] for text in said[1:4]), strict=True))
        assert list(urls.values()) == [text.splitlines()[-1] for text in said[5:8]]
        assert urls["tiny"] in said[4]
        pinned = first.call("pin/ls", **{"type": "recursive", "cid-base": "base32"}).text
        assert all(url.removeprefix("ipfs://") in pinned for url in urls.values())

        fetches = lambda when: [("share", "fetch", url, "--out", tmp_path / f"{when}-{name}") for name, url in urls.items()]
        several(fetches("early"), DLLM_IPFS=second.url)
        first.kill()
        weights, readme = (f"{urls['model']}/{name}" for name in ("model.safetensors", "README.md"))
        (tmp_path / "text").write_text("import os\n")
        said = several(
            [
                *fetches("late"),
                ("generate", run, "--tokens", 20),
                ("generate", urls["run"], "--tokens", 20),
                ("generate", urls["model"], "--tokens", 20),
                ("evaluate", run, "--data", small),
                ("evaluate", urls["run"], "--data", small),
                ("export", urls["run"], "--out", tmp_path / "again"),
                ("import_", weights, "--tokenizer", urls["tiny"], "--out", tmp_path / "imported"),
                ("prepare", "--train", readme, "--tokenizer", "byte", "--out", tmp_path / "readme"),
                ("prepare", "--train", tmp_path / "text", "--tokenizer-from", urls["tiny"], "--out", tmp_path / "taken"),
            ],
            DLLM_IPFS=second.url,
        )
        plain, of_run, of_model, ours, fetched = said[3:8]
        assert plain == of_run == of_model != ""
        assert json.loads(ours.splitlines()[-1]) == json.loads(fetched.splitlines()[-1])
    for name, what in kinds.items():
        content, found = there(what), there(tmp_path / f"late-{name}")
        assert found == there(tmp_path / f"early-{name}") == there(tmp_path / f"car-{name}")
        assert found == {name: content[name] for name in found}
        assert name == "run" or found == content
    assert (tmp_path / "again/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (tmp_path / "taken/tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


def test_a_model_is_served_by_its_url(nodes, world, monkeypatch, tmp_path):
    out, _ = dllm("publish", world / "run", env={"DLLM_IPFS": nodes[0].url})
    monkeypatch.setenv("DLLM_IPFS", nodes[0].url)
    with Server(out.splitlines()[-1], ranks=2) as server:
        answer = server.complete("The ", max_tokens=5)
        assert answer
    assert len(list((tmp_path / "cache/dllm/ipfs/whole").glob("*.json"))) == 1


def fails_in_time(*words, env, limit, why):
    """The command ends with one line that holds `why`, within `limit` seconds and what Python takes."""
    begin = time.monotonic()
    _, said = dllm(*words, "--set", f"storage.timeout={limit}", env=env, check=False)
    assert time.monotonic() - begin < limit + SLACK
    assert said.count("\n") == 1, said
    assert why in said
    assert "Traceback" not in said


def test_a_block_that_nobody_has_a_wrong_name_and_nodes_that_are_down_or_stand_still(nodes, tiny, tmp_path):
    first, _ = nodes
    shutil.copytree(tiny, tmp_path / "tiny")
    missing = Cid.of(RAW, b"nobody has this")
    out = "--out", tmp_path / "out"
    env = {"DLLM_IPFS": first.url}
    fails_in_time("fetch", f"ipfs://{missing}", *out, env=env, limit=2, why=f"no block {missing}: {first.url}")
    fails_in_time("fetch", f"ipfs://{str(missing)[:-1]}", *out, env=env, limit=2, why="is not a CID")
    fails_in_time(
        "fetch", f"ipfs://{missing}", *out, env={"DLLM_IPFS": "http://127.0.0.1:1"}, limit=2, why="Connection refused"
    )
    first.stop()
    try:
        why = f"no block {missing}: {first.url} did not answer within 2 s"
        fails_in_time("fetch", f"ipfs://{missing}", *out, env=env, limit=2, why=why)
        fails_in_time("publish", tmp_path / "tiny", env=env, limit=2, why=f"{first.url} did not answer within 2 s")
    finally:
        first.go_on()
    assert not (tmp_path / "out").exists()


def test_a_block_damaged_on_a_node_s_disk_is_not_taken(folder, tmp_path, tiny):
    with JsNode(folder / "damaged", "node") as node:
        out, _ = dllm("publish", tiny, env={"DLLM_IPFS": node.url})
        url = out.splitlines()[-1]
        files = sorted((node.repo / "blocks").rglob("*.data"), key=lambda path: path.stat().st_size)
        files[-1].write_bytes(damaged(files[-1].read_bytes()))
        _, said = dllm("fetch", url, "--out", tmp_path / "out", env={"DLLM_IPFS": node.url}, check=False)
        assert said.count("\n") == 1, said
        assert f"{node.url} gives a damaged one" in said or "answers 500" in said
        assert not (tmp_path / "out").exists()
        with Gateway.of({name: tiny / name for name in there(tiny)}) as gateway:  # whoever has it whole is asked next
            env = {"DLLM_IPFS": node.url, "IPFS_GATEWAY": gateway.url}
            dllm("fetch", url, "--out", tmp_path / "out", env=env)
        assert there(tmp_path / "out") == there(tiny)


class DiskOf:
    """Answers of a gateway out of the blocks on a Kubo node's disk."""

    def __init__(self, node):
        self.node = node

    def __call__(self, handler, name):
        path = self.node.blocks().get(place(Cid.parse(name)))
        reply(handler, *((200, path.read_bytes()) if path else (404, b"")))


def test_blocks_go_from_kubo_to_kubo_and_the_origin_dies(folder, tmp_path, tiny):
    files = {name: tiny / name for name in there(tiny)}
    large = tmp_path / "large"
    large.write_bytes(random.Random(1).randbytes(9 * LEAF + 3))
    made = [*blocks_of(files), *blocks_of({"": large})]
    root, alone = list(blocks_of(files))[-1][0], made[-1][0]
    with (
        Kubo(folder / "kubo", "first", made) as first,
        Kubo(folder / "kubo", "second") as second,
        Kubo(folder / "kubo", "third") as third,
        Kubo(folder / "strangers", "fourth") as stranger,
    ):
        second.do("ConnectToPeer", first.address)
        for cid, ours in ((root, tiny), (alone, large)):
            second.do("Download", cid, tmp_path / f"second-{cid}")
            fetched = tmp_path / f"second-{cid}"
            assert there(fetched) == there(ours) if ours == tiny else fetched.read_bytes() == ours.read_bytes()
        stranger.do("ConnectToPeer", second.address)
        assert first.repo.name not in stranger.do("ListPeersIDs")
        first.kill()
        third.do("ConnectToPeer", second.address)
        third.do("Download", root, tmp_path / "third")
        assert there(tmp_path / "third") == there(tiny)
        with Gateway(answers=DiskOf(third)) as gateway:
            env = {"IPFS_GATEWAY": gateway.url}
            dllm("fetch", f"ipfs://{root}", "--out", tmp_path / "ours", env=env)
            assert there(tmp_path / "ours") == there(tiny)
            largest = max(third.blocks().values(), key=lambda path: path.stat().st_size)
            largest.write_bytes(damaged(largest.read_bytes()))
            third.do("Download", root, tmp_path / "harmed")  # Kubo itself says nothing of it
            assert there(tmp_path / "harmed") != there(tiny)
            _, said = dllm("fetch", f"ipfs://{root}", "--out", tmp_path / "refused", env=env, check=False)
            assert f"{gateway.url} gives a damaged one" in said
            assert said.count("\n") == 1


def test_what_kubo_adds_in_its_own_way_is_read(folder, tmp_path):
    """Names of version 0, leaves of 256 KiB within nodes."""
    files = {"a": random.Random(1).randbytes(3 << 18), "b/c": b"text", "b/empty": b""}
    write(tmp_path / "files", files)
    with Kubo(folder / "adds", "node") as node:
        name = node.do("add", tmp_path / "files")
        assert name.startswith("Qm")
        with Gateway(answers=DiskOf(node)) as gateway:
            tree = Tree(ipfs.Blocks([ipfs.Gateway(gateway.url, 10)]).get, Cid.parse(name))
            assert {name: tree.read(name, 1 << 20) for name in tree.names} == files


def test_ipfs_car_reads_ours_and_we_read_its(tmp_path):
    files = write(tmp_path / "files", {"a": random.Random(1).randbytes(3 * LEAF), "b/c": b"text"})
    program = ipfs_nodes.PARTS / "node_modules/.bin/ipfs-car"
    root = car.write(tmp_path / "ours.car", files)
    run = lambda *words: subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=True).stdout
    run("unpack", tmp_path / "ours.car", "--output", tmp_path / "theirs")
    assert there(tmp_path / "theirs") == there(tmp_path / "files")
    assert run("pack", tmp_path / "files", "--output", tmp_path / "theirs.car").strip() == str(root)
    dllm("fetch", tmp_path / "theirs.car", "--out", tmp_path / "ours", env={})
    assert there(tmp_path / "ours") == there(tmp_path / "files")
