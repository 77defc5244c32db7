"""Four hosts, each with a disk of its own: what is made there works on each alone, and no disk's loss loses anything."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
from helpers import disks
from helpers.disks import HOSTS, digest, step_folder
from helpers.faults import slow_steps
from helpers.launch import REFUSED, Job, flavour, train_arguments
from helpers.run_files import checkpoints, column, flip, metrics, same_losses
from helpers.several_commands import write_commands

from benchmarks import hosts as network
from dllm.launching.mpirun import command

CORPUS, STEPS, STOPPED = "data/x", 60, 30
TESTS = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(bool(network.missing()), reason=str(network.missing()))
SETTINGS = (
    "train.precision=fp64", "train.lanes=16", "train.threads=1", "train.clip=1.0", "log.sample=0", "checkpoint.keep=9",
    "checkpoint.every_steps=10", "train.eval_every=20",
)  # fmt: skip
TEXTS = {"train": slice(200_000), "valid": slice(-40_000, -20_000), "test": slice(-20_000, None)}


def launch(hosts, *words, on=1, env=None, timeout=100):
    """A Job: dllm launch on all hosts, called on one of them, in the folder that is each host's own."""
    words = "-m", "dllm.launch", "--hostfile", hosts.file, "--silence", 20, *words
    return Job(0, *words, timeout=timeout, env=hosts.environment() | (env or {}), before=hosts.on(on), cwd=hosts.path)


def new(run, steps):
    """The words behind `launch` that begin a run."""
    return ["--", *train_arguments(CORPUS, run, *SETTINGS, f"train.max_steps={steps}")[2:]]


def going_on(run, steps=STEPS):
    return ["--resume", run, "--", "--progress", "none", "--max-steps", steps]


def finish(hosts, *words, **options):
    """Launch to the end. Returns the CompletedProcess."""
    with launch(hosts, *words, **options) as job:
        done = job.wait()
        assert done.returncode == 0, str(job)
        return done


@pytest.fixture(scope="module")
def network_hosts(tmp_path_factory):
    with network.Hosts(tmp_path_factory.mktemp("hosts"), disks=True) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def kept(network_hosts, text, tmp_path_factory):
    """The disks as all tests find them: a corpus, the run `whole` of STEPS steps, and `part`, which died with all hosts.

    The newest checkpoint of `part` is that of step STOPPED, and each of its slices lies on two disks or more.
    """
    hosts, place = network_hosts, tmp_path_factory.mktemp("kept")
    for number in HOSTS:
        for split, part in TEXTS.items():
            (hosts.disk(number) / f"{split}.txt").write_bytes(text[part])
    own = [word for split in TEXTS for word in (f"--{split}", f"{split}.txt")]
    before = [*hosts.on(1), *command(network.COUNT, network.COUNT, dict.fromkeys(hosts.names, 1))]
    words = "-m", "dllm.prepare", "--tokenizer", "char", *own, "--out", CORPUS
    with Job(0, *words, before=before, env=hosts.environment(), cwd=hosts.path) as job:
        assert job.wait().returncode == 0, str(job)
    finish(hosts, *new("whole", STEPS))
    with launch(hosts, *new("part", 10**6), env=slow_steps(tmp_path_factory.mktemp("slow"), 0.01)) as job:
        job.until(lambda: _has_two_copies(hosts, "part", STOPPED), "two copies of each slice")
        for number in HOSTS:
            hosts.kill(number)
    for number in HOSTS:
        for step in checkpoints(hosts.disk(number) / "part"):
            if step > STOPPED:
                shutil.rmtree(hosts.disk(number) / step_folder("part", step))
        for path in hosts.disk(number).glob("part/checkpoints/step-*"):
            if not (path / "manifest.json").exists():
                shutil.rmtree(path)
    disks.keep(hosts, place)
    return place


def _has_two_copies(hosts, run, step):
    if not any((hosts.disk(number) / step_folder(run, step) / "manifest.json").exists() for number in HOSTS):
        return False
    return all(len(found) >= 2 for found in disks.slices(hosts, run, step).values())


@pytest.fixture
def hosts(network_hosts, kept):
    disks.bring_back(network_hosts, kept)
    return network_hosts


def alone(hosts, folder, commands, numbers=HOSTS):
    """Run commands of dllm on some hosts, on each without the others. Returns for each host what each command wrote last."""
    jobs = {}
    try:
        for number in numbers:
            write_commands(folder / str(number), commands)
            words = "-m", "helpers.several_commands", folder / str(number)
            env = hosts.environment() | {"PYTHONPATH": TESTS}
            jobs[number] = Job(0, *words, env=env, before=hosts.on(number), cwd=hosts.path)
        for number, job in jobs.items():
            done, texts = job.wait(), sorted((folder / str(number)).glob("*-0.txt"))
            said = "".join(path.read_text() for path in texts)
            assert done.returncode == 0, f"{job}\n{said}"
            assert {code for code, _ in json.loads((folder / str(number) / "0.json").read_text())} == {0}, f"{number}: {said}"
            yield [path.read_text().splitlines()[-1:] for path in texts]
    finally:
        for job in jobs.values():
            job.__exit__()


def export(run):
    return ["dllm.export", run, "--out", "model"]


def weights(hosts, number):
    """The sha256 of what a host has exported."""
    return digest(hosts.disk(number) / "model" / "model.safetensors")


def same_after(hosts, kept, run, step):
    """Whether the losses after a step are those of the run `whole`; those before it may have gone with a disk."""
    for split in ("train", "valid"):
        runs = hosts.disk(1) / run, kept / "1" / "whole"
        ours, theirs = ([line for line in metrics(run, split) if line["step"] > step] for run in runs)
        assert column(ours, "step").tolist() == column(theirs, "step").tolist()
        np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-12)


def test_each_host_alone_can_use_what_all_have_made(hosts, tmp_path):
    for number in HOSTS:
        assert (hosts.disk(number) / "whole" / "DONE").read_text() == f"{STEPS}\n"
    commands = [
        ["dllm.generate", "whole", "--prompt", "import", "--tokens", 60, "--seed", 3, "--json"],
        ["dllm.evaluate", "whole"],
        export("whole"),
        ["dllm.train", "--resume", "whole", "--progress", "none", "--max-steps", STEPS + 4],
    ]
    texts = [said[:2] for said in alone(hosts, tmp_path, commands)]
    generated, measured = (json.loads(*said) for said in texts[0])
    assert len(generated["text"]) >= 60
    assert measured["tokens"] > 10_000
    assert texts == [texts[0]] * network.COUNT
    assert {weights(hosts, number) for number in HOSTS} == {weights(hosts, 1)} != {None}
    ends = [[line["loss"] for line in metrics(hosts.disk(number) / "whole", "train")[-4:]] for number in HOSTS]
    assert ends == [ends[0]] * network.COUNT
    assert len(ends[0]) == 4


def test_a_host_dies_with_its_disk(hosts, tmp_path):
    run, left = hosts.disk(1) / "run", [1, 2, 4]
    for place, path in enumerate(disks.shards(hosts, CORPUS)):  # each on that host's disk and one other
        for number in {*left} - {left[place % 3]}:
            (hosts.disk(number) / path).unlink()
    large = "import dllm.data.placing\ndllm.data.placing.SMALL = 0\n"  # no split lies on every disk
    with launch(hosts, *new("run", STEPS), env=slow_steps(tmp_path, 0.05, also=large)) as job:
        job.until_step(run, 25)
        if flavour() == "openmpi":  # mpirun's child on this machine must live, as ssh to a host without power would
            hosts.cut(3)
            job.signal(signal.SIGKILL, [job.ranks()[2]])
        else:
            hosts.kill(3)
            time.sleep(0.5)  # until others have heard of it: of a cut link MPICH hears after many minutes only
            hosts.cut(3)
        hosts.wipe(3)
        try:
            done = job.wait()
        finally:
            hosts.heal(3)
        assert done.returncode == 0, str(job)
    assert "rank 2 of 4 died; 3 go on" in done.stderr or flavour() == "mpich"
    assert "going on without" in done.stderr or flavour() == "openmpi"
    same_losses(run, hosts.disk(1) / "whole")
    assert list(hosts.disk(3).iterdir()) == []
    copies = {**disks.shards(hosts, CORPUS), **disks.slices(hosts, "run", STEPS)}
    assert {path: found for path, found in copies.items() if len(set(found) & set(left)) < 2} == {}
    list(alone(hosts, tmp_path / "alone", [export("run")], (2, 4)))
    assert weights(hosts, 2) == weights(hosts, 4) is not None


def test_flipped_bits_are_named_and_mended(hosts, kept):
    newest, held = disks.slices(hosts, "part", STOPPED), disks.shards(hosts, CORPUS)
    part = next(path for path, found in newest.items() if 2 in found)
    shard = next(path for path, found in held.items() if 3 in found and "train" in path.name)
    places = [(2, part), (3, shard)]
    sound = [digest(hosts.disk(number) / path) for number, path in places]
    for number, path in places:
        flip(hosts.disk(number) / path, (hosts.disk(number) / path).stat().st_size // 2)
    done = finish(hosts, *going_on("part"))
    for name in (part.relative_to("part"), shard.name):
        assert str(name) in done.stderr
    assert [digest(hosts.disk(number) / path) for number, path in places] == sound
    same_after(hosts, kept, "part", 0)


def test_an_empty_disk_is_filled(hosts, kept, tmp_path):
    hosts.wipe(4)
    finish(hosts, *going_on("part"))
    same_after(hosts, kept, "part", 0)
    copies = {**disks.shards(hosts, CORPUS), **disks.slices(hosts, "part", STEPS)}
    assert {path: found for path, found in copies.items() if 4 not in found} == {}
    evaluate = ["dllm.evaluate", "part"], ["dllm.generate", "part", "--prompt", "import", "--tokens", 30, "--json"]
    one, other = alone(hosts, tmp_path, evaluate, (2, 4))
    assert one == other


def lose(hosts, older):
    """Wipe two disks that together had a slice of the newest checkpoint. Returns its name, and the hosts that are left.

    older : whether the checkpoint before lies on all other disks; else there is none
    """
    newest = disks.slices(hosts, "part", STOPPED)
    path, holders = min(newest.items(), key=lambda item: len(item[1]))
    for number in holders[2:]:  # who wrote it may have it, too
        (hosts.disk(number) / path).unlink()
    left = [number for number in HOSTS if number not in holders[:2]]
    before = step_folder("part", STOPPED - 10)
    for one, found in disks.slices(hosts, "part", STOPPED - 10).items() if older else ():
        for number in left:
            (hosts.disk(number) / before).mkdir(exist_ok=True)
            (hosts.disk(number) / one).write_bytes((hosts.disk(found[0]) / one).read_bytes())
    for number in holders[:2]:
        hosts.wipe(number)
    for number in left:
        for step in checkpoints(hosts.disk(number) / "part"):
            if step < STOPPED - 10 * older:
                shutil.rmtree(hosts.disk(number) / step_folder("part", step))
    return str(path.relative_to("part")), left


def test_a_slice_that_nobody_has_ends_the_run_with_its_name(hosts):
    path, left = lose(hosts, older=False)
    before = [disks.files(hosts.disk(number)) for number in left]
    with launch(hosts, *going_on("part"), on=left[0]) as job:
        done = job.wait()
        assert done.returncode == REFUSED, str(job)
    assert sum(path in line for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    after = [disks.files(hosts.disk(number)) for number in left]
    assert [found | was for found, was in zip(after, before, strict=True)] == after  # all that was there is, as it was


def test_an_older_checkpoint_is_taken_where_nobody_has_all_of_the_newest(hosts, kept):
    path, left = lose(hosts, older=True)
    done = finish(hosts, *going_on("part"), on=left[0])
    assert path in done.stderr
    same_after(hosts, kept, "part", STOPPED - 10)


def test_a_shard_that_nobody_has_is_named(hosts):
    shard = next(path for path in disks.shards(hosts, CORPUS) if "train" in path.name)
    for number in HOSTS:
        (hosts.disk(number) / shard).unlink(missing_ok=True)
    with launch(hosts, *going_on("part")) as job:
        done = job.wait()
        assert done.returncode == REFUSED, str(job)
    assert sum(shard.name in line for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
