"""docs/deploy/stack.yml on four real dockerds: the machine of the supervisor dies, and the run comes to its end on another."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import docker_swarm
from helpers.docker_swarm import DEPLOY, IMAGE, Swarm, until
from helpers.launch import mpirun
from helpers.run_files import arrays

from benchmarks.hosts import Hosts

pytestmark = [pytest.mark.skipif(bool(docker_swarm.missing()), reason=str(docker_swarm.missing())), pytest.mark.timeout(500)]
PAGE = DEPLOY / "README.md"
STEPS = 150
SETTINGS = f"""
[model]
embedding = 16
hidden = 16
[train]
lanes = 8
window = 8
schedule = "constant"
warmup = 0
eval_every = 0
max_steps = {STEPS}
precision = "fp64"
threads = 1
[checkpoint]
every_steps = 10
[log]
every = 1
sample = 0
"""


@pytest.fixture
def swarm(tmp_path):
    with Hosts(tmp_path) as hosts, Swarm(tmp_path, hosts) as swarm:
        yield swarm


@pytest.fixture
def undisturbed(tiny, tmp_path):
    """The same run on this machine, which compiles the kernels as well."""
    (tmp_path / "settings.toml").write_text(SETTINGS)
    words = "--data", tiny, "--config", tmp_path / "settings.toml", "--out", tmp_path / "undisturbed", "--progress", "none"
    mpirun(2, "-m", "dllm.train", *words, timeout=150, check=True)
    return tmp_path / "undisturbed"


def deploy(swarm, folder, corpus):
    """What the page "Deploy" says, in its order."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=20)
    swarm.docker(1, "secret", "create", "dllm_key", key)
    for number in swarm.numbers:
        swarm.fill("data", number, corpus, "corpus")
    stack = folder / "stack"
    stack.mkdir()
    shutil.copy(DEPLOY / "stack.yml", stack)
    shutil.copy(folder / "settings.toml", stack)
    (stack / "hosts").write_text(listed(swarm))
    names = {"IMAGE": IMAGE, "RUN": "mine", "CORPUS": "corpus", "INTERFACE": "e0"}
    other = swarm.override({"UCX_TLS": "tcp,self", "OMPI_MCA_mpi_yield_when_idle": "1"})  # in truth all nodes are one machine
    swarm.docker(1, "stack", "deploy", "-c", stack / "stack.yml", "-c", other, "dllm", variables=names)


def listed(swarm):
    """The file of hosts, by the page's own command."""
    command = next(line for line in PAGE.read_text().splitlines() if line.startswith("docker node ls -q"))
    swarm.shell(1, command.replace("> hosts", f"> {swarm.folder}/listed"))
    lines = (swarm.folder / "listed").read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == [f"10.77.0.{number}" for number in swarm.numbers]
    assert all(re.fullmatch(r"\S+ slots=[1-9]\d*", line) for line in lines)
    one = [line.split()[0] + " slots=1\n" for line in sorted(lines)]  # in truth the four share the cores of this machine
    return "".join(one)


def supervisor(swarm, number):
    """Node and state of the newest supervisor, such as (2, "Running"), as a manager sees them; (0, "") where there is none."""
    words = "service", "ps", "dllm_supervisor", "--format", "{{.Node}} {{.CurrentState}}"
    code, text = swarm.docker(number, *words, check=False)
    name, state = re.match(r"(\S*) ?(\w*)", text).groups()
    return (swarm.hosts.names.index(name) + 1, state) if code == 0 and name in swarm.hosts.names else (0, "")


def runs(swarm, *without):
    """Where the run lies on each node."""
    return [swarm.volume("data", number) / "runs" / "mine" for number in swarm.numbers if number not in without]


def steps(swarm):
    """The last step that is written down on any node."""
    logs = [log.read_text() for run in runs(swarm) if (log := run / "metrics.jsonl").exists()]
    return max((int(step) for log in logs for step in re.findall(r'"step": (\d+),', log)), default=0)


def test_the_run_outlives_the_machine_of_its_supervisor(undisturbed, swarm, tiny, tmp_path):
    deploy(swarm, tmp_path, tiny)
    asked = 1
    try:
        until(lambda: steps(swarm) >= 25, "step 25", 150)
        first, state = supervisor(swarm, asked)
        assert state == "Running"
        swarm.kill(first)
        asked = 1 if first != 1 else 2
        until(lambda: supervisor(swarm, asked)[0] not in (0, first), "supervisor elsewhere", 90)
        until(lambda: supervisor(swarm, asked)[1] == "Complete", "end of the run", 200)
    finally:
        print(swarm.report(asked))
    (wanted, _) = arrays(undisturbed, STEPS)
    for run in runs(swarm, first):
        assert (run / "DONE").read_text() == f"{STEPS}\n"
        found, _ = arrays(run, STEPS)
        np.testing.assert_allclose(found["theta"], wanted["theta"], rtol=1e-9, atol=1e-12)
