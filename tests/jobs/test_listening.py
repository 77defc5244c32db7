"""Where all ranks are on one host no other can reach them: not mpirun, not its daemons, not the ranks."""

import contextlib

import pytest
from helpers.faults import slow_steps
from helpers.launch import Job, flavour, train_arguments
from helpers.listeners import elsewhere, listeners
from helpers.server import Server

from dllm.errors import UserError
from dllm.launching import interfaces, mpirun

WAIT = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier(); print('here', flush=True); import time; time.sleep(60)"
ALONE = "from dllm.comm import runtime; comm = runtime.world(); "


@contextlib.contextmanager
def waiting(code):
    """Two ranks under mpirun itself that wait."""
    with Job(2, "-c", code) as job:
        job.until(lambda: job.out.count("here") == 2, "ranks")
        yield job


def test_mpi_itself_can_be_reached_from_elsewhere():
    with waiting(WAIT) as job:
        assert len(elsewhere(job.processes())) >= 3  # mpirun and either rank


def test_ranks_under_mpirun_itself_cannot():
    with waiting(ALONE + WAIT) as job:
        reached = elsewhere(job.ranks().values())
        everywhere = elsewhere(job.processes())
    assert reached == []
    if flavour() == "openmpi":
        assert all("prterun" in line for line in everywhere)  # whose sockets its ranks do not have
    else:
        assert everywhere == []


def test_nothing_of_a_launched_run_can(tiny, tmp_path):
    train = train_arguments(tiny, tmp_path / "run", "train.max_steps=1000")[2:]
    with Job(0, "-m", "dllm.launch", "-n", 2, "--", *train, env=slow_steps(tmp_path, 0.05)) as job:
        job.until_step(tmp_path / "run", 3)
        assert len(job.ranks()) == 2
        assert listeners(job.processes())
        assert elsewhere(job.processes()) == []
        assert job.err == ""


def test_nothing_of_a_served_model_can(world):
    with Server(world / "run", ranks=2, keep=True) as server:
        assert len(server.ranks()) == 2
        assert elsewhere(server.processes()) == []


def test_an_interface_has_an_address_or_is_named_in_one_line():
    assert interfaces.address_of("lo") == "127.0.0.1"
    with pytest.raises(UserError, match=r"no network interface 'wg7'; it has .*\blo\b"):
        interfaces.address_of("wg7")


@pytest.mark.parametrize(
    ("variables", "local"),
    [
        ({}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, False),  # salloc, on the login node
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}, False),
        ({"PBS_NODEFILE": "nodes"}, False),
    ],
)
def test_whether_all_ranks_are_here_is_known_before_mpirun_starts(monkeypatch, variables, local):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME", *mpirun.MANAGERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mpirun.all_here({}) is local
    assert mpirun.all_here({"localhost": 2, "127.0.0.1": 2})
    assert not mpirun.all_here({"192.0.2.77": 2})
    assert not mpirun.all_here({"localhost": 2, "elsewhere": 2})
