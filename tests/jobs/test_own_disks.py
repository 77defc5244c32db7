"""Commands over hosts that share no disk, played by ranks that work in folders of their own: a corpus, and runs, in parts."""

import json
import shutil
import socket

import pytest
from helpers import own_disks
from helpers.launch import REFUSED, mpirun, train_arguments
from helpers.run_files import arrays, checkpoints, metrics, same_losses
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus
from dllm.errors import DONE, STOPPED_EARLY

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


def slices(disks, run, step):
    """By disk, the files of a checkpoint: name -> bytes."""
    return [
        {path.name: path.read_bytes() for path in (disk / run / f"checkpoints/step-{step:08d}").glob("*")} for disk in disks
    ]


def test_a_run_in_parts_is_copied_mended_and_refused_where_a_part_is_lost(tmp_path, tiny):
    def run(name, steps=24, data=tiny):
        settings = "train.precision=fp64", "train.eval_every=8", "checkpoint.every_steps=8", f"train.max_steps={steps}"
        _, module, _, _, *words = train_arguments("", name, *settings, f"data.path={data}")
        return [module, *words]

    def resume(name, steps):
        return ["dllm.train", "--resume", name, "--progress", "none", "--set", f"train.max_steps={steps}"]

    sites = ["--train", tmp_path / "text.txt", "--deal", "evenly", "--tokenizer", "byte", "--out", "site{rank}"]
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    newest = "part/checkpoints/step-00000013/rank-00001-of-00004.h5"
    commands = {
        "straight": run("straight", 32),
        "run": run("run"),
        "damage": harm(1, "flip", "run/checkpoints/step-00000024/rank-00002-of-00004.h5"),
        "empty": harm(3, "remove", "run"),
        "resume": resume("run", 32),
        "stop at 13": ["helpers.own_disks", "all", "stop", 13],
        "part": run("part"),
        "lose the newest": harm("all", "remove", newest),
        "stop at 14": ["helpers.own_disks", "all", "stop", 14],
        "go on": resume("part", 24),
        "keep": ["helpers.own_disks", "all", "copy", "part"],
        "lose one of all": harm("all", "remove", "part/checkpoints/*/rank-00001-of-00004.h5"),
        "refused": resume("part", 24),
        "measure": ["dllm.evaluate", "part"],
        "in the way": harm(0, "remove", "run"),
        "new": run("run"),
        "other settings": harm(3, "append", "straight/config.toml"),
        "doubtful": resume("straight", 40),
        "deal": ["dllm.prepare", *sites],
        "private": run("private", 9, "site{rank}"),
    }
    env = {own_disks.DISKS: tmp_path}
    ends = run_several(tmp_path / "ends", RANKS, commands.values(), script="helpers.own_disks", timeout=150, env=env)
    ends = dict(zip(commands, ends, strict=True))
    expected = {
        "part": STOPPED_EARLY,
        "go on": STOPPED_EARLY,
        **dict.fromkeys(("refused", "measure", "new", "doubtful"), REFUSED),
    }
    for name, ending in ends.items():
        assert ending.codes == {expected.get(name, DONE)}, f"{name}\n{ending.text}"
    host, disks = socket.gethostname(), [own_disks.disk_of(tmp_path, rank) for rank in range(RANKS)]

    # What another disk has is neither mixed with a new run nor taken for its settings.
    assert told(ends["new"]) == [
        f"dllm: --out run exists on {host}; choose another name, or go on with it by --resume run (rank 1)"
    ]
    assert told(ends["doubtful"])[0].startswith(f"dllm: straight/config.toml on {host} is not that on {host}: remove straight")

    # Done: the newest and the best one are whole on each disk, with all that a command needs; older ones are pruned.
    for disk in disks[1:]:
        same_losses(disk / "run", disk / "straight")
        assert (disk / "run" / "DONE").read_text() == "32\n"
        assert checkpoints(disk / "run") == [16, 24, 32] if disk != disks[3] else [24, 32]
    found = slices(disks[1:], "run", 32)
    assert found == [found[0]] * (RANKS - 1)
    assert len(found[0]) == RANKS + 1
    where = f"run/checkpoints/step-00000024/rank-00002-of-00004.h5 on {host}"
    assert told(ends["resume"]) == [f"dllm: {where} is damaged; another copy takes its place, if there is one"]

    # Stopped: two copies of each slice; what is lost twice is named.
    copies = [sum(f"rank-{rank:05d}-of-00004.h5" in files for files in slices(disks, "kept", 14)) for rank in range(RANKS)]
    assert copies == [2] * RANKS
    assert told(ends["go on"])[0] == f"dllm: nobody here has {newest[5:]} of part; step 8 takes its place"
    for name, step in ("refused", "14"), ("measure", "08"):  # the newest, the best
        text = f"dllm: nobody here has {newest[5:].replace('13', step)} of part: start with a host that has it"
        assert told(ends[name]) == [text]
    for disk in disks:
        lost = {path.relative_to(disk / "kept") for path in (disk / "kept").rglob("*") if path.is_file()}
        lost -= {path.relative_to(disk / "part") for path in (disk / "part").rglob("*")}
        assert {path.name for path in lost} <= {"rank-00001-of-00004.h5"}

    # Private: the model goes to other disks, neither text nor what it made of lanes does.
    for rank, disk in enumerate(disks):
        assert [path.name for path in disk.glob("site*")] == [f"site{rank}"]
        joined, _ = arrays(disk / "private", 9)
        assert joined["theta"].any()
        assert not any(joined[name].any() for name in ("h", "c", "lane_loss"))
