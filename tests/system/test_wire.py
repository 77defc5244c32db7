"""What crosses the wire between four hosts that prepare, train, measure, save, die and serve: no piece of their texts.

Frames are captured on the switch, outside of the program, and put together; `helpers.leaks` knows what to look for.
"""

import json
import pathlib
import signal
import subprocess

import numpy as np
import pytest
from helpers.faults import in_each_step
from helpers.host_clients import TOKEN, ask, busy
from helpers.launch import LIMIT, Job, train_arguments
from helpers.leaks import Detector
from helpers.wire import Capture

from benchmarks import hosts as network
from dllm.comm.methods import METHODS, method
from dllm.data.corpus import Corpus
from dllm.data.lanes import Lanes
from dllm.launching.mpirun import command

pytestmark = pytest.mark.skipif(bool(network.missing()), reason=str(network.missing()))
RANKS, LANES, WINDOW, STEPS = network.COUNT, 16, 8, 4
SIZES = {"train": 2400, "valid": 400, "test": 400}  # words of a site
WORDS = 1200  # of the vocabulary: many more than a window has
SETTINGS = (
    "model.embedding=12", "model.hidden=8", "train.threads=1", f"train.lanes={LANES}", f"train.window={WINDOW}",
    f"train.max_steps={STEPS}", "train.eval_every=2", "train.eval_lanes=4", "checkpoint.every_steps=2", "log.sample=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with network.Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with public.txt, which has every word, and SPLIT-R.txt of four sites, which share no line."""
    folder, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(15)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = sorted({"".join(random.choice(syllables, 3)) for _ in range(2 * WORDS)})[:WORDS]
    lines = lambda chosen: "".join(" ".join(chosen[at : at + 12]) + "\n" for at in range(0, len(chosen), 12))
    (folder / "public.txt").write_text(lines(random.permutation(words)))
    for rank in range(RANKS):
        for split, size in SIZES.items():
            (folder / f"{split}-{rank}.txt").write_text(lines(random.choice(words, size)))
    return folder


def several(hosts, folder, *commands):
    """Run commands of dllm, each a list of words, in one start of a rank on each host."""
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps([list(map(str, words)) for words in commands]))
    env = hosts.environment() | {"PYTHONPATH": pathlib.Path(__file__).parents[1]}
    before = [*hosts.on(1), *command(RANKS, RANKS, dict.fromkeys(hosts.names, 1), "PYTHONPATH")]
    with Job(0, "-m", "helpers.several_commands", folder, before=before, env=env, timeout=LIMIT) as job:
        done = job.wait()
        said = "".join(path.read_text() for path in sorted(folder.glob("*.txt")))
        assert done.returncode == 0, f"{job}\n{said}"
    codes = [[code for code, _ in json.loads((folder / f"{rank}.json").read_text())] for rank in range(RANKS)]
    assert codes == [[0] * len(commands)] * RANKS, said


@pytest.fixture(scope="module")
def sites(hosts, texts, tmp_path_factory):
    """The path of the sites' corpora, with {rank}; made on the hosts, while the wire is watched."""
    folder = tmp_path_factory.mktemp("sites")
    out = f"{folder}/site{{rank}}"
    with Job(
        0, "-m", "dllm.prepare", "--tokenizer", "word", "--train", texts / "public.txt", "--out", folder / "public"
    ) as job:
        assert job.wait().returncode == 0, str(job)
    own = [word for split in SIZES for word in (f"--{split}", f"{texts}/{split}-{{rank}}.txt")]
    with Capture(hosts.switch, folder) as wire:
        several(hosts, folder / "said", ["dllm.prepare", "--tokenizer-from", folder / "public", *own, "--out", out])
    assert knower(texts, out).find(b"".join(data for _, data in wire.payload())) == []
    return out


@pytest.fixture(scope="module")
def detector(texts, sites):
    return knower(texts, sites)


def knower(texts, sites):
    """The Detector of the sites' texts, and of the windows in which ranks see them, alone and side by side."""
    corpora = [Corpus(sites.format(rank=rank)) for rank in range(RANKS)]
    each = LANES // RANKS
    lanes = [Lanes(corpus, "train", range(each), each, WINDOW) for corpus in corpora]
    windows = [[one.window(number, WINDOW)[0] for number in range(one.length // WINDOW)] for one in lanes]
    named = {f"site {rank}'s train split": found for rank, found in enumerate(windows)}
    named["all sites together"] = [np.concatenate(found, axis=1) for found in zip(*windows, strict=True)]
    for split in ("valid", "test"):
        for rank, corpus in enumerate(corpora):
            one = Lanes(corpus, split, range(4), 4, 32)
            named[f"site {rank}'s {split} split"] = [one.window(number, 32)[0] for number in range(one.length // 32)]
    files = {f"{split} text of site {rank}": f"{split}-{rank}.txt" for split in SIZES for rank in range(RANKS)}
    return Detector({name: (texts / file).read_bytes() for name, file in files.items()}, named)


def train(sites, run, *settings):
    return train_arguments(sites, run, *SETTINGS, *settings)[1:]


def tells_nothing(wire, detector, at_least):
    """Fails where pieces of a text went over the wire, or less than so many bytes."""
    payload = wire.payload()
    assert sum(len(data) for _, data in payload) > at_least
    found = [f"{where}: {line}" for where, data in payload for line in detector.find(data)]
    assert not found, f"{len(found)} pieces of texts\n" + "\n".join(found[:20])


def runs():
    """name -> settings of every averaging method."""
    for name in METHODS:
        kind = method(name)
        sgd = ("train.optimizer=sgd", "train.momentum=0") if kind.needs_sgd else ()
        yield name, (f"averaging.method={name}", *sgd)
    yield "powersgd", ("averaging.compression=powersgd",)
    yield "choco-sign", ("averaging.method=choco", "averaging.compression=sign")
    yield "tied", ("model.tied=true", "model.hidden=12")


def test_every_method_with_evaluation_and_checkpoints(hosts, sites, detector, tmp_path):
    trained = [train(sites, tmp_path / name, *settings) for name, settings in runs()]
    evaluated = [["dllm.evaluate", tmp_path / name, "--split", "test"] for name in ("allreduce", "choco")]
    with Capture(hosts.switch, tmp_path) as wire:
        several(hosts, tmp_path / "said", *trained, *evaluated)
    gradients = WORDS * 8 * 4  # bytes of the output layer's alone
    tells_nothing(wire, detector, len(trained) * STEPS * gradients)


def test_a_death_and_what_follows(hosts, sites, detector, tmp_path):
    dies = in_each_step(tmp_path, "if rank == 2 and trainer.state.step == 4 and once('died'): os.kill(os.getpid(), 9)")
    words = "-m", "dllm.launch", "--hostfile", hosts.file, "--", *train(sites, tmp_path / "run", "train.max_steps=9")[1:]
    with Capture(hosts.switch, tmp_path) as wire, Job(0, *words, env=hosts.environment() | dies, before=hosts.on(1)) as job:
        done = job.wait()
        assert done.returncode == 0, str(job)
    assert (tmp_path / "fault" / "died").exists()
    assert "starting it again" in done.stderr or "go on" in done.stderr
    tells_nothing(wire, detector, 9 * WORDS * 8 * 4)


def test_prompts_that_a_rank_hands_to_another(hosts, texts, sites, detector, tmp_path):
    run, options = tmp_path / "run", ("-n", RANKS, "--hostfile", hosts.file, "--host", "0.0.0.0", "--slots", 1)
    env, prompt = hosts.environment() | {"DLLM_TOKEN": TOKEN}, (texts / "test-2.txt").read_text().split()[:100]
    several(hosts, tmp_path / "said", train(sites, run))
    with (
        Capture(hosts.switch, tmp_path) as wire,
        Job(0, "-m", "dllm", "serve", run, *options, "--max-tokens", 10**5, env=env, before=hosts.on(1)) as server,
    ):
        well = lambda number: [e["rank"] for e in ask(hosts, number, "/health")[2].get("ranks", ()) if e["state"] == "ok"]
        server.until(lambda: "at http://" in server.out, "server")
        server.until(lambda: all(well(number) == [0, 1, 2, 3] for number in range(1, RANKS + 1)), "ranks that know each other")
        with busy(hosts, 3, prompt[0]) as first:
            assert first == 2
            for number in (0, 15, 30):
                status, rank, answer = ask(hosts, 3, "/v1/completions", {"prompt": " ".join(prompt[number:]), "max_tokens": 20})
                assert status == 200, answer
                assert int(rank) != 2  # so it went over the wire
        server.signal(signal.SIGTERM, [server.launcher()])
        assert server.process.wait(60) == 0, str(server)
    tells_nothing(wire, detector, 3 * len(" ".join(prompt)))


def test_the_capture_sees_what_crosses_the_wire(hosts, detector, texts, tmp_path):
    text = (texts / "train-1.txt").read_bytes()
    take = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('here', flush=True); c = s.accept()[0]\n"
    take += "while c.recv(1 << 20): pass"
    send = "import socket, sys; socket.create_connection((sys.argv[1], 7000)).sendall(open(sys.argv[2], 'rb').read() * 300)"
    with Capture(hosts.switch, tmp_path) as wire, Job(0, "-c", take, before=hosts.on(2)) as taker:
        taker.until(lambda: "here" in taker.out, "listener")
        words = [*hosts.on(1), "python3", "-c", send, hosts.names[1], str(texts / "train-1.txt")]
        subprocess.run(words, check=True, timeout=30)
        taker.wait()
    (sent,) = [data for (_, _, _, port, _), data in wire.streams.items() if port == 7000]
    assert sent == text * 300
    assert "bytes of train text of site 1" in detector.find(sent[:5000])[0]
