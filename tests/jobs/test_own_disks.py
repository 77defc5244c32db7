"""Commands over hosts that share no disk, played by ranks that work in folders of their own: a corpus in parts."""

import json
import shutil
import socket

import pytest
from helpers import own_disks
from helpers.launch import REFUSED, mpirun, train_arguments
from helpers.run_files import metrics
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus
from dllm.errors import DONE

pytestmark = pytest.mark.timeout(180)
RANKS = 4
X = "data/x"
FIRST, LATER, LAST = (f"train-{number:05d}.h5" for number in (0, 5, 9))


def train(run, *settings):
    """A run of 4 steps whose corpus is at a relative path, elsewhere on each rank."""
    settings = *settings, f"data.path={X}", "train.precision=fp64", "train.eval_every=2"
    _, module, _, _, *words = train_arguments("", run, *settings, extra=("--max-steps", 4))
    return [module, *words]


def harm(rank, what, path):
    return ["helpers.own_disks", rank, what, path]


def told(ending):
    return [line for line in ending.text.splitlines() if line.startswith("dllm:")]


def test_a_corpus_in_parts_is_prepared_trained_on_mended_and_refused_where_a_part_is_lost(tmp_path, text):
    for name, part in ("train", text[:200_000]), ("valid", text[-60_000:]), ("test", text[-9000:]):
        (tmp_path / f"{name}.txt").write_bytes(part)
    sources = [word for name in ("train", "valid", "test") for word in (f"--{name}", tmp_path / f"{name}.txt")]
    site = ["--train", tmp_path / "train.txt", "--deal", "evenly", "--tokenizer", "byte", "--out", "site{rank}"]
    commands = {
        "prepare": ["dllm.prepare", *sources, "--tokenizer", "char", "--copies", 3, "--out", X],
        "train": train("run"),
        "damage": harm(3, "flip", f"{X}/{LAST}"),
        "empty": harm(1, "remove", X),
        "mend": train("mended", "storage.copies=0"),
        "deal": ["dllm.prepare", *site],
        "lose": harm("all", "remove", f"{X}/{LATER}"),
        "lost": train("lost"),
    }
    env = {own_disks.DISKS: tmp_path}
    ends = run_several(tmp_path / "ends", RANKS, commands.values(), script="helpers.own_disks", timeout=150, env=env)
    ends = dict(zip(commands, ends, strict=True))
    for name, ending in ends.items():
        assert ending.codes == {REFUSED if name == "lost" else DONE}, f"{name}\n{ending.text}"
    host, disks = socket.gethostname(), [own_disks.disk_of(tmp_path, rank) for rank in range(RANKS)]
    assert "4 disks: each shard is on 3, those of small splits on all" in ends["prepare"].text
    assert not told(ends["train"])
    assert told(ends["mend"]) == [f"dllm: {X}/{LAST} on {host} was damaged; it is mended from {host}"]
    text = f"dllm: {X}/{LATER} is not there (rank 2 on {host}), and nobody has a copy: start with the hosts that have it, or"
    assert told(ends["lost"]) == [f"{text} prepare the data anew"]
    assert metrics(disks[0] / "mended") == metrics(disks[0] / "run")
    shards = [{path.name for path in (disk / X).glob("train-*")} for disk in disks]
    corpus, lanes = Corpus(disks[1] / X), 8
    length = corpus.split("train")["tokens"] // lanes
    read = {file.name for file in corpus.files("train", 2 * length, 4 * length)}
    assert shards[1] == read  # the disk that was empty has just what its rank reads
    assert FIRST in shards[0]
    assert min(map(len, shards)) < 6
    for disk in disks:
        assert {path.name for path in disk.glob("site*")} == {f"site{disk.name[-1]}"}
        assert (disk / X / "test-00000.h5").exists() == (disk != disks[1])

    alone = ["-m", "dllm.evaluate", disks[2] / "run", "--data", X]
    done = mpirun(0, *alone, cwd=disks[2], check=True)
    assert json.loads(done.stdout.splitlines()[-1])["split"] == "test"
    shutil.rmtree(disks[2] / X)
    shutil.copytree(disks[1] / X, disks[2] / X)
    done = mpirun(0, *alone, cwd=disks[2])
    assert done.returncode == REFUSED
    assert done.stderr.startswith(
        f"dllm: {X}/test-00000.h5 is not there, and nobody has a copy: start with the hosts that have"
    )
