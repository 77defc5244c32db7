"""What several disks say of a run, and what the launcher believes of it."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest
from helpers.launch import environment
from hypothesis import given
from hypothesis import strategies as st

from dllm import launch
from dllm.errors import BAD_INPUT, NOT_SAVED, UserError
from dllm.launching import mpirun
from dllm.launching.run_disks import PROGRAM, RunDisks
from dllm.launching.run_status import LONGEST, MARK, RunStatus, together
from dllm.launching.training_supervisor import TrainingSupervisor
from dllm.runs import marks, ownership
from dllm.training.options import train_options

AGENT = """#!/bin/bash
there={folder}/$1; shift
test -d $there || exit 255
text=$*
exec /bin/bash -c "${{text//"{here}"/"$there"}}"
"""  # a host is a folder: what is to run in this one runs there
OWNER = {"owner": "job.1", "silent": 1.0}


def status(**facts):
    return RunStatus(**(OWNER | facts))


def test_the_newest_step_and_the_owner_that_was_heard_last_count():
    late, away = status(step=20, silent=3.0), status(step=30, owner="job.0", silent=900.0, done=True)
    both = together([away, late, RunStatus(there=True)])
    assert both == status(step=30, silent=3.0, there=True)  # the end of an older owner is none
    assert together([late, status(done=True, silent=9.0)]).done
    assert together([]) == RunStatus()
    assert together([RunStatus(), status(resize=3)]).resize == 3


@given(st.builds(RunStatus, step=st.none() | st.integers(0, 2**53), silent=st.none() | st.floats(0, 1e9),
                 owner=st.none() | st.text(max_size=200), error=st.text(max_size=50)))  # fmt: skip
def test_what_is_said_is_read(said):
    assert RunStatus.read(said.line().rstrip(b"\n")) == said


HOSTILE = [
    b"", b"Welcome to node1!", b"{}", MARK, MARK + b"[]", MARK + b"null", MARK + b"{", MARK + b"\xff",
    *(MARK + json.dumps(facts).encode() for facts in (
        {"step": -1}, {"step": 2**60}, {"step": 1.5}, {"step": "9"}, {"step": True}, {"done": 1}, {"there": "yes"},
        {"owner": "x" * 201}, {"owner": 7}, {"silent": -0.1}, {"silent": "1"}, {"resize": 0}, {"resize": 2**21},
        {"error": "x" * LONGEST}, {"error": None},
    )),
    MARK + b'{"silent": NaN}', MARK + b'{"silent": 1e999}', MARK + b'{"step": ' + b"9" * 5000 + b"}",
    MARK + b"[" * 4000, MARK + b'{"x": ' + b"[" * 4000, MARK + b'{"step": 1}' + b" " * LONGEST,
]  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_status_is_not_believed(line):
    assert RunStatus.read(line) is None


@given(st.binary(max_size=200))
def test_any_other_bytes_are_none_or_a_status(data):
    RunStatus.read(MARK + data)


@pytest.fixture
def disks(tmp_path, monkeypatch):
    """The folders of three hosts; `away` does not answer. This host is none of them."""
    folder = tmp_path / "hosts"
    for host in ("one", "two", "three"):
        (folder / host).mkdir(parents=True)
    here = tmp_path / "here"
    here.mkdir()
    agent = tmp_path / "agent"
    agent.write_text(AGENT.format(folder=folder, here=here))
    agent.chmod(agent.stat().st_mode | stat.S_IXUSR)
    for name in mpirun.AGENTS:
        monkeypatch.setenv(name, str(agent))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.chdir(here)
    return folder


def make_run(folder, owner, age, done=False):
    folder.mkdir()
    ownership.Ownership(str(folder), owner).take()
    os.utime(folder / "owner", (time.time() - age,) * 2)
    if done:
        marks.done(folder, 9)


def until(condition, limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("ahead", [-86400.0, 86400.0])
def test_silence_is_not_the_difference_of_two_clocks(tmp_path, monkeypatch, ahead):
    make_run(tmp_path / "run", "job.1", 5)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + ahead)  # this host's, beside the disk's
    with RunDisks(str(tmp_path / "run"), {}) as run:
        assert 4.9 < run.status().silent < 30  # the clock of files is coarse
        os.utime(tmp_path / "run" / "owner", (1e9, 1e9))  # a server whose clock went back: it has changed, so it is alive
        assert run.look().silent < 1
        assert run.look().silent > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner"]


def test_a_disk_that_is_away_for_a_moment_is_no_silent_job(tmp_path):
    options = launch.arguments(["-n", "1", "--silence", "50", "--run", str(tmp_path / "run")])
    with RunDisks(options.run, {}) as run:
        supervisor = TrainingSupervisor(options, train_options([]), run, run.status())
        make_run(tmp_path / "run", f"{supervisor.job.mark}.1", 0)
        assert not supervisor.is_due(100.0)
        (tmp_path / "run").rename(tmp_path / "away")
        assert not supervisor.is_due(140.0)
        assert supervisor.is_due(151.0)


def test_a_new_run_gets_its_parent_and_every_start_is_traced(tmp_path):
    run = str(tmp_path / "run")
    options = launch.arguments(["-n", "1", "--run", run, "--", "--init-from", "parent", "--trace", "100:105"])
    with RunDisks(run, {}) as disks:
        supervisor = TrainingSupervisor(options, train_options(options.train), disks, disks.status())
        words = train_options(supervisor.arguments())
        assert (words.init_from, words.trace, words.out) == ("parent", (100, 105), run)
        supervisor.newest, supervisor.wanted.trace = 50, (0, 5)
        words = train_options(supervisor.arguments())
        assert (words.init_from, words.trace, words.resume) == (None, (0, 5), run)


def test_a_last_state_that_could_not_be_written_is_not_computed_again(tmp_path):
    options = launch.arguments(["-n", "1", "--run", str(tmp_path / "run")])
    with RunDisks(options.run, {}) as run:
        supervisor = TrainingSupervisor(options, train_options([]), run, run.status())
        make_run(tmp_path / "run", f"{supervisor.job.mark}.1", 0)
        assert supervisor.judge(1, 5.0).code is None  # a crash is
        supervisor.begin()
        assert supervisor.judge(NOT_SAVED, 5.0).code == NOT_SAVED
        supervisor.ranks += 1  # dllm resize
        assert supervisor.judge(NOT_SAVED, 5.0).code == NOT_SAVED
        supervisor.job.stop()
        assert supervisor.judge(NOT_SAVED, 5.0).code == NOT_SAVED
        (tmp_path / "run" / "owner").write_text("another.1")
        supervisor.job.stops = 0
        assert supervisor.judge(NOT_SAVED, 5.0).code == BAD_INPUT


def test_other_hosts_are_asked_listened_to_and_told(disks):
    make_run(disks / "one" / "run", "job.0", 500, done=True)
    make_run(disks / "two" / "run", "job.1", 5)
    (disks / "two" / "run" / "config.toml").touch()
    (disks / "three" / "run").mkdir()
    (disks / "three" / "run" / "thesis.txt").touch()
    with RunDisks("run", dict.fromkeys(["one", "two", "three", "away"], 1)) as run:
        found = run.status()
        assert (found.there, found.settings, found.step, found.done, found.owner) == (True, True, None, False, "job.1")
        assert 4.9 < found.silent < 60
        assert run.silent() == ["away"]
        assert run.owners == {None, "job.0", "job.1"}

        until(lambda: run.look().owner == "job.1")
        marks.done(disks / "two" / "run", 9)
        until(lambda: run.look().done)
        marks.request_resize(disks / "one" / "run", 5)
        wanted = []

        def is_wanted():
            run.look()
            wanted.append(run.take_resize_request())
            return wanted[-1] == 5

        until(is_wanted)
        until(lambda: not (disks / "one" / "run" / "resize").exists())
        programs = [listener.process for listener in run._listeners.values()]

        run.status()
        run.go_on()
        assert not list(disks.glob("*/run/DONE"))
        with pytest.raises(UserError, match=r"three: run exists and is not the folder of a run"):
            run.begin_anew()
        assert [str(path.relative_to(disks)) for path in disks.glob("*/run")] == ["three/run"]
        assert (disks / "three" / "run" / "thesis.txt").exists()
    assert all(program.poll() is not None for program in programs)


def test_a_host_that_says_too_much_or_nothing_is_one_that_does_not_answer(tmp_path, monkeypatch):
    flood = tmp_path / "flood"
    flood.write_text("#!/bin/bash\ntest $1 = mute && exec sleep 60\nexec cat /dev/zero\n")
    flood.chmod(0o755)
    for name in mpirun.AGENTS:
        monkeypatch.setenv(name, str(flood))
    monkeypatch.setattr(mpirun, "ANSWER", 1.0)
    with RunDisks("run", {"flood": 1, "mute": 1}) as run:
        begin = time.monotonic()
        assert run.status() == RunStatus()
        assert run.silent() == ["flood", "mute"]
        assert run.look() == RunStatus()
        assert time.monotonic() - begin < 10


def test_who_watches_ends_with_its_input_and_imports_no_numba(tmp_path):
    code = "import sys, dllm.launching.run_status as r; r.main('x', 'watch'); print({'numba', 'h5py'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"", capture_output=True, timeout=60, env=environment(), check=True
    )
    said, loaded = done.stdout.splitlines()
    assert RunStatus.read(said) == RunStatus()
    assert loaded == b"set()"
    assert PROGRAM == "dllm.launching.run_status"


def test_where_all_hosts_are_this_one_only_its_disk_is_read(tmp_path, monkeypatch):
    for name in mpirun.AGENTS:
        monkeypatch.setenv(name, "false")
    make_run(tmp_path / "run", "job.1", 0)
    for hosts in ({}, {"localhost": 2}):
        with RunDisks(str(tmp_path / "run"), hosts) as run:
            assert run.look().owner == run.status().owner == "job.1"
            assert not run._listeners
            assert run.silent() == []
