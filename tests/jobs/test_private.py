"""Private text stays where it is: nothing of it is in what MPI is given, and nothing that a peer sends runs as code."""

import concurrent.futures
import itertools
import os
import pickletools
import re
import signal

import numpy as np
import pytest
from helpers.launch import REFUSED, complaint, mpirun, train_arguments, write_pairs
from helpers.leaks import Detector
from helpers.server import Server, texts
from helpers.several_commands import run_several
from helpers.spy import NODES, sent

from dllm.comm import methods
from dllm.data.corpus import Corpus
from dllm.data.lane_kinds import read_lanes
from dllm.data.lanes import deal
from dllm.data.tokenizer_files import load_tokenizer

RANKS, LANES, WINDOW, PAIRS_WINDOW = 4, 8, 8, 256
STEPS = (
    "train.max_steps=3",
    "train.eval_every=2",
    "checkpoint.every_steps=2",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.clip=0",
)


@pytest.fixture(scope="module")
def sites(text, tmp_path_factory):
    """A folder with the corpus `public`, and for each rank text-R.txt, valid-R.txt and pairs, made of its words."""
    folder = tmp_path_factory.mktemp("sites")
    lines = [" ".join(line.split()) for line in text.decode().splitlines()]
    lines = [line for line in lines if 3 <= len(line.split()) <= 12]
    (folder / "public.txt").write_text("\n".join(sorted(set(" ".join(lines[:4000]).split()))))
    mpirun(
        0, "-m", "dllm.prepare", "--train", folder / "public.txt", "--tokenizer", "word", "--out", folder / "public", check=True
    )
    for rank in range(RANKS):
        part = lines[rank * 800 : rank * 800 + 800]
        (folder / f"text-{rank}.txt").write_text("\n".join(part))
        (folder / f"valid-{rank}.txt").write_text("\n".join(part[::9]))
        write_pairs(folder, [*zip(part[:80:2], part[1:80:2], strict=True)], f"pairs-{rank}")
    return folder


def private_text(folder, sites, corpora=("corpus",)):
    """A Detector of the texts in `sites`, and of the windows that steps and evaluations read of corpora in `folder`."""
    texts = {path.name: path.read_bytes() for path in sites.glob("*-[0-9].*")}
    windows = {}
    for name, split in itertools.product(corpora, ("train", "valid")):
        everyone = []
        for rank in range(RANKS):
            corpus = Corpus(folder / f"{name}-{rank}")
            if split in corpus.manifest["splits"]:
                window = PAIRS_WINDOW if corpus.tokenizer.pairs else WINDOW
                lanes = read_lanes(corpus, split, range(len(deal(LANES, RANKS, rank))), LANES // RANKS, window)
                everyone.append([lanes.window(number, window)[0] for number in range(8)])
                windows[f"{name}, {split} split of rank {rank}"] = everyone[-1]
        windows[f"{name}, {split} split of all ranks"] = [np.concatenate(step, axis=1) for step in zip(*everyone, strict=True)]
    return Detector(texts, windows)


def is_pickle(data):
    """Whether bytes are a pickle from their first byte to their last."""
    if data[:1] != b"\x80" or data[-1:] != b".":
        return False
    try:
        return sum(1 for _ in pickletools.genops(data)) > 0
    except (ValueError, UnicodeDecodeError):
        return False


def check(folder, detector, commands):
    """Nothing private was given to MPI; what was is looked at once, however often it was sent."""
    seen, calls = set(), set()
    for command, rank, name, data in sent(folder, RANKS):
        calls.add(name)
        if data not in seen:
            seen.add(data)
            where = f"{' '.join(map(str, commands[command]))}\nrank {rank}, {name} of {len(data)} bytes: "
            assert not is_pickle(data), f"{where}a pickle, {data[:200]}"
            assert not (found := detector.find(data)), where + "\n".join(found)
    assert len(seen) > 20 * len(commands)
    return calls


def _holds(data, number):
    return number.to_bytes(8, "little") in data or (-number).to_bytes(8, "little", signed=True) in data


def train(folder, run, *settings, data="corpus-{rank}", extra=()):
    _, *words = train_arguments(folder / data, folder / run, *STEPS, *settings, extra=extra)
    return words


def test_no_text_is_in_what_mpi_is_given_by_any_method_evaluation_or_checkpoint(sites, tmp_path):
    prepare = ["dllm.prepare", "--tokenizer-from", sites / "public"]
    text = ["--train", sites / "text-{rank}.txt", "--valid", sites / "valid-{rank}.txt"]
    pairs = ["--pairs", sites / "pairs-{rank}.src", sites / "pairs-{rank}.tgt"]
    commands = [
        [*prepare, *text, "--out", sites / "corpus-{rank}"],
        ["dllm.prepare", *pairs, "--tokenizer", "byte", "--out", sites / "pairs-{rank}"],
        train(sites, "pairs", "train.carry=window", f"train.window={PAIRS_WINDOW}", data="pairs-{rank}"),
    ]
    for method in methods.METHODS:
        for compression in ("none", *methods.method(method).compressions):
            settings = f"averaging.method={method}", f"averaging.compression={compression}"
            traced = ("--trace", "2:3") if compression == "none" else ()
            commands.append(train(sites, f"{method}-{compression}", *settings, extra=traced))
    commands.append(train(sites, "tied", "model.tied=true"))
    commands.append(["dllm.evaluate", sites / "allreduce-none", "--split", "valid"])
    small = "model.embedding=16", "model.hidden=16", "train.window=8", "train.lanes=8"
    lr_find = ["dllm.tools.lr_find", "--data", sites / "corpus-{rank}", "--steps", 20, "--progress", "none"]
    commands.append([*lr_find, *(word for setting in small for word in ("--set", setting))])
    run_several(tmp_path / "all", RANKS, commands, check=True, script="helpers.spy", timeout=280)
    calls = check(tmp_path / "all", private_text(sites, sites, ("corpus", "pairs")), commands)
    assert {path.parent.name for path in sites.glob("*/trace.json")} == {f"{method}-none" for method in methods.METHODS}
    assert calls > {"Iallreduce", "Iallgather", "Iallgatherv", "Ineighbor_allgather", "Accumulate", "Ibcast"}
    sizes = [Corpus(sites / f"corpus-{rank}").split("train")["tokens"] for rank in range(RANKS)]
    told = [rank for command, rank, _, data in sent(tmp_path / "all", RANKS) if not command and _holds(data, sizes[rank])]
    assert sorted(told) == list(range(RANKS))  # prepare gives the size of a site to one sum


@pytest.mark.parametrize("nodes", [2, RANKS])
def test_no_text_is_in_what_mpi_is_given_between_nodes(sites, tmp_path, nodes):
    prepare = ["dllm.prepare", "--tokenizer-from", sites / "public", "--train", sites / "text-{rank}.txt"]
    commands = [
        [*prepare, "--out", tmp_path / "corpus-{rank}"],
        train(tmp_path, "untied"),
        train(tmp_path, "tied", "model.tied=true"),
        train(tmp_path, "two-levels", "averaging.method=dpsgd", "averaging.hierarchical=true"),
    ]
    run_several(tmp_path / "all", RANKS, commands, check=True, script="helpers.spy", env={NODES: nodes})
    check(tmp_path / "all", private_text(tmp_path, sites), commands)


@pytest.mark.parametrize("what", ["code", "type", "number", "depth", "length", "huge"])
def test_what_a_hostile_rank_sends_is_refused_in_one_line_and_runs_nowhere(tmp_path, what):
    script = tmp_path / "hostile.py"
    script.write_text(HOSTILE)
    done = mpirun(2, script, what, cwd=tmp_path, timeout=60)
    assert not (tmp_path / "owned").exists()
    assert done.returncode == REFUSED, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in complaint(done).splitlines() if line.startswith("dllm: ")]
    assert re.match("dllm: rank 1 (sent not a message of the kind that was expected: |announced a message of )", line)


HOSTILE = """
import os, pickle, sys
import numpy as np
from dllm import cli
from dllm.comm import runtime
from dllm.comm.messages import pack

class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)

def command(words, comm):
    if comm.rank == 0:
        runtime.check_same(comm, {"code": "x"})
        return 0
    message = {
        "code": lambda: pickle.dumps(Code()), "type": lambda: pack({"a": 1}), "number": lambda: pack([1.5]),
        "depth": lambda: (10**6).to_bytes(8, "little") + b"[" * 10**6, "length": lambda: b"", "huge": lambda: b"",
    }[sys.argv[1]]()
    length = {"length": -1, "huge": 1 << 50}.get(sys.argv[1], len(message))
    lengths = np.empty(2, np.int64)
    comm.Iallgather(np.array([length]), lengths).Wait()
    if length == len(message):
        everyones = np.empty(lengths.sum(), np.uint8)
        comm.Iallgatherv(np.frombuffer(message, np.uint8), [everyones, lengths]).Wait()
    return 2

sys.exit(cli.collective(command))
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_private_run_says_what_others_learn_shows_no_sample_and_is_its_owners_alone(sites, tmp_path, ranks):
    old = os.umask(0o022)
    try:
        prepare = ["dllm.prepare", "--tokenizer-from", sites / "public", "--train", sites / "text-{rank}.txt"]
        words = train(tmp_path, "run", extra=("--progress", "plain"))
        _, ended = run_several(tmp_path / "all", ranks, [[*prepare, "--out", tmp_path / "corpus-{rank}"], words], check=True)
        export = ["dllm.export", tmp_path / "run", "--out", tmp_path / "run" / "model"]
        run_several(tmp_path / "export", 0, [export], check=True)
    finally:
        os.umask(old)
    (line,) = re.findall("^private .*$", ended.text, re.MULTILINE)
    assert ("one rank" in line, "how often" in line) == (ranks == 1, ranks == 2)
    assert "done " in ended.text
    assert "sample" not in ended.text
    made = [*tmp_path.glob("corpus-*/**/*"), *tmp_path.glob("run/**/*"), tmp_path / "run", tmp_path / "corpus-0"]
    assert len(made) > 12
    assert [path for path in made if path.stat().st_mode & 0o077] == []


def test_no_prompt_and_no_answer_is_in_what_mpi_is_given_by_a_server(world, text, tmp_path):
    prompts = [text[start : start + 300].decode() for start in range(0, 24_000, 3000)]
    tokenizer = load_tokenizer(world / "tiny")
    with Server(world / "run", "--slots", 1, spied=tmp_path / "sent") as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda prompt: server.complete(prompt, max_tokens=60, seed=1), prompts)]
        said = [text for answer in answers for text in texts(answer)]
        server.signal(signal.SIGTERM, server.ranks().values())
        assert server.wait().returncode == 0
    private = [prompt.encode() for prompt in prompts] + [answer.encode() for answer in said]
    detector = Detector(private, [tokenizer.encode(one, False)[:, None] for one in private])
    seen = {data for _, _, _, data in sent(tmp_path / "sent", 2)}
    assert len(seen) > 10
    assert not [found for data in seen for found in detector.find(data)]
