"""The launcher brings a run to its end whatever dies: ranks, all of them, mpirun; and ends when it is told to."""

import json
import pathlib
import re
import signal

import pytest
from helpers.faults import at_stage, fault, slow_steps
from helpers.launch import REFUSED, Job, complaint, flavour, mpirun, train_arguments
from helpers.run_files import checkpoints, metrics, same_losses

from dllm.errors import UserError
from dllm.launching.mpirun import read_hosts

STEPS = 60
SETTINGS = (
    "train.precision=fp64", "model.hidden=96", "model.embedding=96", "train.lanes=12", "train.window=32", "train.threads=1",
    f"train.max_steps={STEPS}", "train.clip=1.0", "log.sample=0", "checkpoint.every_steps=10", "train.eval_every=25",
    "resilience.deadline=3",
)  # fmt: skip


def launch(data, run, ranks=3, options=()):
    """Arguments of Python."""
    return ["-m", "dllm.launch", "-n", ranks, *options, "--", *train_arguments(data, run, *SETTINGS)[2:]]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = mpirun(0, *launch(tiny, run), check=True)
    assert complaint(done) == ""
    return run


def check(run, undisturbed):
    assert pathlib.Path(run, "DONE").read_text() == f"{STEPS}\n"
    same_losses(run, undisturbed)


@pytest.mark.parametrize(
    "victims", ["all ranks", "all but one", "mpirun", "mpirun while a checkpoint is written", "segfault", "stopped"]
)
def test_the_run_comes_to_its_end_though_they_die(tiny, undisturbed, tmp_path, victims):
    run, env = tmp_path / "run", {}
    if "checkpoint" in victims:
        env = at_stage(tmp_path, "time.sleep(1)", step=20, stage="begin")
    with Job(0, *launch(tiny, run), env=env) as job:
        job.until_step(run, 22 if "checkpoint" in victims else 25)
        ranks = job.ranks()
        if "mpirun" in victims:
            launcher = job.launcher()
            mpi = [pid for pid in job.processes() if pid not in ranks.values() and _parent(pid) == launcher]
            job.signal(signal.SIGKILL, mpi)
        else:
            number = {"segfault": signal.SIGSEGV, "stopped": signal.SIGSTOP}.get(victims, signal.SIGKILL)
            spared = {"all but one": [0], "stopped": [0, 1]}.get(victims, [])
            job.signal(number, [pid for rank, pid in ranks.items() if rank not in spared])
        done = job.wait()
        assert done.returncode == 0, str(job)
    if victims == "stopped":
        assert "rank 2 has been silent for 3 s and is ended" in done.stderr
    if victims not in ("all but one", "stopped") or flavour() == "mpich":
        whence = "10" if "checkpoint" in victims else "[12]0"
        assert re.search(f"starting it again from step {whence}", done.stderr), done.stderr
    check(run, undisturbed)
    if victims not in ("all but one", "stopped"):  # the same number of ranks from a checkpoint: the same to the bit
        assert metrics(run, "train")[-1]["parameters"] == metrics(undisturbed, "train")[-1]["parameters"]


def _parent(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_killed_before_the_first_checkpoint_it_starts_from_the_beginning(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    with Job(0, *launch(tiny, run)) as job:
        job.until_step(run, 2)
        job.signal(signal.SIGKILL, job.ranks().values())
        done = job.wait()
        assert done.returncode == 0, str(job)
    check(run, undisturbed)


def test_interrupted_once_it_leaves_a_checkpoint_and_launched_again_it_goes_on(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    with Job(0, *launch(tiny, run)) as job:
        job.until_step(run, 15)
        job.signal(signal.SIGINT, [job.launcher()])
        assert job.wait().returncode == 75, str(job)
    assert checkpoints(run)[-1] >= 15
    assert not (run / "DONE").exists()
    mpirun(0, "-m", "dllm.launch", "-n", 2, "--resume", run, "--", "--progress", "none", check=True)
    check(run, undisturbed)


def test_resized_in_mid_run_it_comes_back_with_other_ranks(tiny, undisturbed, tmp_path):
    run, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("localhost slots=3\n")
    resize = lambda ranks: mpirun(0, "-m", "dllm.resize", run, "-n", ranks)
    env = slow_steps(tmp_path, 0.1) | {"OMPI_MCA_mpi_yield_when_idle": "1"}  # the slots are more than there are cores
    with Job(0, *launch(tiny, run, options=("--hostfile", hosts)), env=env, timeout=150) as job:
        for step, ranks, named in ((15, 4, "localhost slots=4\n"), (30, 2, "localhost slots=some\n")):
            job.until_step(run, step)
            hosts.write_text(named)  # which is read now
            done = resize(ranks)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"{run} comes back with {ranks} ranks\n"
            job.until(lambda ranks=ranks: len(job.ranks()) == ranks, f"{ranks} ranks")
        done = job.wait()
        assert done.returncode == 0, str(job)
    assert [int(ranks) for ranks in re.findall(r"going on with (\d) ranks from step \d+", done.stderr)] == [4, 2]
    assert "line 1: 'localhost slots=some' is no host" in done.stderr
    assert done.stderr.count("going on with the hosts that it named before") == 1
    check(run, undisturbed)
    for ranks, message in ((13, "at most so many"), (2, "is done")):
        done = resize(ranks)
        assert done.returncode == REFUSED
        assert message in done.stderr
    (run / "DONE").unlink()
    done = resize(3)
    assert done.returncode == REFUSED
    assert done.stderr == f"dllm: no launcher watches {run}: dllm launch -n 3 --resume {run}\n"
    assert not (run / "resize").exists()


def test_ranks_that_cannot_start_after_a_resize_are_given_up_for_the_former(tiny, undisturbed, tmp_path):
    run = tmp_path / "run"
    cannot = "if os.environ.get('OMPI_COMM_WORLD_SIZE', os.environ.get('PMI_SIZE')) == '5': os._exit(3)\n"
    with Job(0, *launch(tiny, run), env=slow_steps(tmp_path, 0.1, also=cannot)) as job:
        job.until_step(run, 15)
        mpirun(0, "-m", "dllm.resize", run, "-n", 5, check=True)
        done = job.wait()
        assert done.returncode == 0, str(job)
    assert "5 ranks get nowhere; going back to 3" in done.stderr
    check(run, undisturbed)


def test_interrupted_twice_it_ends_now(tiny, tmp_path):
    run = tmp_path / "run"
    with Job(0, *launch(tiny, run)) as job:
        job.until_step(run, 5)
        for _ in range(2):
            job.signal(signal.SIGINT, [job.launcher()])
        done = job.wait()
        assert done.returncode in (1, 75), str(job)
        assert done.seconds < 60


def test_a_start_to_which_no_rank_comes_is_tried_again(tiny, undisturbed, tmp_path):
    daemons = """
module.START = 5
def command(*others, before=module.mpirun.command):
    return ["bash", "-c", "sleep 300"] if once("hanging") else before(*others)
module.mpirun.command = command
"""
    words = ["-m", "dllm", "launch", *launch(tiny, tmp_path / "run")[2:]]
    done = mpirun(0, *words, env=fault(tmp_path, "dllm.launching.supervisor", daemons), check=True)
    assert "no rank was there after 5 s" in done.stderr
    assert done.stderr.count("starting it again") == 1
    check(tmp_path / "run", undisturbed)


def test_it_gives_up_on_a_job_that_gets_nowhere(tiny, tmp_path):
    run = tmp_path / "run"
    with Job(0, *launch(tiny, run, options=("--retries", 1))) as job:
        for attempt in (1, 2):
            job.until(lambda: len(job.ranks()) == 3, f"the ranks of attempt {attempt}")
            job.signal(signal.SIGKILL, job.ranks().values())
            job.until(lambda: not job.ranks(), "their end") if attempt == 1 else None
        done = job.wait()
        assert done.returncode == 1, str(job)
    assert "giving up" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--set", "train.lr=fast"], "train.lr"),
        (["--", "--resume", "run"], "belongs before the --"),
        (["--resume", "nowhere"], "is not the folder of a run"),
        (["--resume", "run", "--", "--init-from", "model"], "leave out --init-from"),
        (["-n", "0"], "not a number of at least 1"),
        (["--hostfile", "nowhere"], "cannot read the hosts in nowhere: No such file or directory"),
        (["--hostfile", "/dev/null"], "cannot read the hosts in /dev/null: it is not a file"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_anything_starts(tmp_path, arguments, message):
    done = mpirun(0, "-m", "dllm.launch", *arguments, cwd=tmp_path)
    assert done.returncode == REFUSED
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_hostfile_is_read_as_both_mpis_write_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=8\n\nnode-2.cluster:4  # the small one\nnode3\nnode1:2\n")
    assert read_hosts(path) == {"node1": 10, "node-2.cluster": 4, "node3": 1}
    for line in ("node1 max_slots=3", "-x", "node1 slots=0", "a;rm -rf b", "node 1"):
        path.write_text(f"node1\n{line}\n")
        with pytest.raises(UserError, match=r"line 2: .* is no host; write"):
            read_hosts(path)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    done = mpirun(0, "-m", "dllm.launch", "-n", 1, "--run", tmp_path / "precious", cwd=tmp_path)
    assert done.returncode == REFUSED
    assert "is not the folder of a run" in done.stderr
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"


def test_bad_input_that_only_the_job_can_see_is_said_once(tmp_path):
    done = mpirun(0, "-m", "dllm.launch", "-n", 2, "--", "--data", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == REFUSED
    assert complaint(done).count("dllm:") == 1, done.stderr
    assert json.dumps(str(tmp_path / "nothing"))[1:-1] in done.stderr
