"""What an URL names on this disk: fetched once into the cache, whole, checked again, by any number of processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers.gateway import Gateway, damaged, reply
from helpers.launch import environment

from dllm.config import StorageConfig
from dllm.errors import UserError
from dllm.remote import car, locate
from dllm.remote.unixfs import blocks_of

FILES = {"config.json": b"{}", "deep/er/data": bytes(range(256)) * 9000, "empty": b""}
COPY = (
    "import sys\nfrom dllm.config import StorageConfig\nfrom dllm.remote.locate import local_copy\n"
    "print(local_copy(sys.argv[1], StorageConfig(timeout=float(sys.argv[2]))))"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DLLM_IPFS", raising=False)
    monkeypatch.delenv("IPFS_GATEWAY", raising=False)


@pytest.fixture
def files(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: tmp_path / "files" / name for name in FILES}


@pytest.fixture
def gateway(files, monkeypatch):
    with Gateway.of(files) as gateway:
        monkeypatch.setenv("IPFS_GATEWAY", f"http://127.0.0.1:1, {gateway.url}/")
        gateway.at = f"ipfs://{gateway.root}"
        yield gateway


def there(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_paths_stay_as_they_are():
    for path in ("a/b", "", "ipfs:/x", "/ipfs://x", pathlib.Path("ipfs://x"), "IPFS://x"):
        assert locate.local_copy(path) == pathlib.Path(path)
        assert not locate.is_url(path)
    assert locate.join("ipfs://x/", "a") == "ipfs://x/a"
    assert locate.join("x", "a") == "x/a"


def test_a_folder_is_fetched_once(gateway):
    place = locate.local_copy(gateway.at)
    assert there(place) == FILES
    asked = len(gateway.asked)
    assert asked >= len(gateway.blocks)
    assert locate.local_copy(gateway.at) == locate.local_copy(gateway.at + "/") == place
    assert len(gateway.asked) == asked
    assert not list(place.parent.glob("*.tmp"))


def test_a_path_leads_to_a_file_or_folder(gateway):
    assert locate.local_copy(f"{gateway.at}/config.json").read_bytes() == b"{}"
    assert there(locate.local_copy(f"{gateway.at}/deep")) == {"er/data": FILES["deep/er/data"]}
    assert locate.local_copy(f"{gateway.at}/config%2Ejson").read_bytes() == b"{}"


def test_single_files_of_a_folder(gateway, tmp_path):
    folder = locate.open_folder(gateway.at)
    assert folder.read("config.json", 2) == b"{}"
    folder.fetch("deep/er/data", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == FILES["deep/er/data"]
    assert sorted(folder.names) == sorted(FILES)
    with pytest.raises(UserError, match="has no 'nothing'"):
        folder.read("nothing", 10)
    assert locate.cache_folder(gateway.at) != locate.cache_folder(f"{gateway.at}/deep")


@pytest.mark.parametrize(
    "url",
    [
        "ipfs://",
        "ipfs:///x",
        "ipfs://../../x",
        "ipfs://x?y",
        "ipfs://x#y",
        "ipfs://x\ny",
        "ipfs://" + "x" * 5000,
        "ipfs://Qm/%ff",
    ],
)
def test_what_is_no_url_is_refused(gateway, url, tmp_path):
    with pytest.raises(UserError, match=r"is no URL|is not a CID|no text"):
        locate.local_copy(url)
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} <= {".lock"}


def test_an_url_that_names_nothing_leaves_what_is_in_the_cache(gateway):
    place = locate.local_copy(gateway.at)
    for url in ("ipfs://", "ipfs:///", "ipfs:///x", "swarm://"):
        with pytest.raises(UserError, match="is no URL"):
            locate.local_copy(url)
    assert there(place) == FILES


@pytest.mark.parametrize(
    "harm", ["a bit", "a byte more", "a file less", "no list", "a list that is none", "a file for the folder"]
)
def test_a_damaged_copy_is_fetched_anew(gateway, harm):
    place = locate.local_copy(gateway.at)
    data, listed = place / "deep/er/data", place.with_name(f"{place.name}.json")
    if harm == "a bit":
        data.write_bytes(damaged(data.read_bytes()))
    elif harm == "a byte more":
        data.write_bytes(data.read_bytes() + b"x")
    elif harm == "a file less":
        data.unlink()
    elif harm == "no list":
        listed.unlink()
    elif harm == "a list that is none":
        listed.write_text('{"x": 5}')
    else:
        os.rename(place, f"{place}-aside")
        place.write_text("x")
    asked = len(gateway.asked)
    assert there(locate.local_copy(gateway.at)) == FILES
    assert len(gateway.asked) > asked


def test_what_fails_leaves_nothing_and_says_it_in_one_line(gateway):
    name = max(gateway.blocks, key=lambda name: len(gateway.blocks[name]))
    kept = gateway.blocks.pop(name)
    for harm in (None, damaged(kept)):
        if harm:
            gateway.blocks[name] = harm
        with pytest.raises(UserError, match=f"no block {name}: ") as caught:
            locate.local_copy(gateway.at)
        assert "\n" not in str(caught.value)
        assert not [path for path in locate._place(gateway.at, "whole").parent.iterdir() if path.suffix != ".lock"]
    gateway.blocks[name] = kept
    assert there(locate.local_copy(gateway.at)) == FILES


def test_nobody_to_ask(monkeypatch):
    with pytest.raises(UserError, match="nobody to ask for ipfs://: give a node's RPC by DLLM_IPFS"):
        locate.local_copy("ipfs://bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354")


def test_settings_name_sources_too(gateway, monkeypatch):
    monkeypatch.delenv("IPFS_GATEWAY")
    for settings in (StorageConfig(gateways=gateway.url), StorageConfig(ipfs=gateway.url)):
        assert locate.open_folder(gateway.at, settings).read("config.json", 2) == b"{}"


def start(url, timeout="30"):
    return subprocess.Popen(
        [sys.executable, "-c", COPY, url, timeout], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_fetch_one_after_the_other(gateway):
    block = lambda handler, name: (time.sleep(0.2), reply(handler, 200, gateway.blocks[name]))
    gateway.answers = block
    processes = [start(gateway.at) for _ in range(4)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [(process.returncode, end[1]) for process, end in zip(processes, ends, strict=True)] == [(0, "")] * 4
    assert there(pathlib.Path(ends[0][0].strip())) == FILES
    paths = [path for _, path, _ in gateway.asked]
    assert len(paths) < 2 * len(gateway.blocks)


def test_those_that_wait_for_one_that_fails_fail_with_it(gateway):
    """Four ranks, and a node that says nothing for two seconds: not eight of them."""
    gateway.answers = lambda handler, name: time.sleep(10)
    begin = time.monotonic()
    processes = [start(gateway.at, "2") for _ in range(4)]
    ends = [process.communicate(timeout=120)[1].splitlines()[-1] for process in processes]
    assert len(set(ends)) == 1
    assert "did not answer within 2 s" in ends[0]
    assert len(gateway.asked) <= 2, time.monotonic() - begin  # a process that starts late may find that nobody is there
    gateway.answers = None
    assert there(locate.local_copy(gateway.at)) == FILES


def test_one_that_was_killed_holds_nobody_up_and_one_that_stands_still_is_named(gateway):
    gate = []
    gateway.answers = lambda handler, name: (
        [time.sleep(0.02) for _ in range(3000) if not gate],
        reply(handler, 200, gateway.blocks[name]),
    )
    other = start(gateway.at)
    try:
        end = time.monotonic() + 60
        while not gateway.asked:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=r"another process that fetches .* is silent for 1 s: end it"):
            locate.local_copy(gateway.at, StorageConfig(timeout=0.1))
    finally:
        other.kill()
        other.communicate(timeout=20)
    gate.append(True)
    assert there(locate.local_copy(gateway.at)) == FILES


@pytest.mark.slow
def test_a_few_blocks_at_a_time_are_in_memory(tmp_path):
    """A file of 200 MB is fetched by a process that takes 60 MB more for it."""
    with open(tmp_path / "large", "wb") as file:
        file.truncate(200 << 20)
    path = tmp_path / "large.car"
    root = car.write(path, {"": tmp_path / "large"})
    assert root == list(blocks_of({"": tmp_path / "large"}))[-1][0]
    code = (
        "import pathlib, resource, sys\nfrom dllm.remote.car import CarFile\nfrom dllm.remote.tree import Tree\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = most()\n"
        "car = CarFile(sys.argv[1])\nTree(car.get, car.root).fetch('', pathlib.Path(sys.argv[2]))\nprint(most() - before)"
    )
    words = [sys.executable, "-c", code, str(path), str(tmp_path / "out")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").stat().st_size == 200 << 20
    assert int(done.stdout) < 60 << 10
