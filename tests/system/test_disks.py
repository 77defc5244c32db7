"""Disks that are full or become read-only: training goes on with warnings, older checkpoints stay, bad starts are refused."""

import contextlib
import math
import os
import pathlib
import re
import subprocess
import time

import numpy as np
import pytest
from helpers.faults import fault, slow_steps
from helpers.launch import NOT_SAVED, REFUSED, Job, complaint, mpirun, train_arguments
from helpers.run_files import checkpoints, column, metrics

FILLING = (
    "model.dropout=0.2", "model.layers=2", "train.lanes=6", "train.lr=0.01", "train.clip=1.0", "train.eval_every=20",
    "train.epochs=1000", "checkpoint.every_steps=30", "checkpoint.keep=9", "log.every=7",
)  # fmt: skip
STEPS = 40
SETTINGS = (
    "train.precision=fp64", "model.hidden=64", "model.embedding=64", "train.lanes=12", "train.threads=1", "log.sample=0",
    f"train.max_steps={STEPS}", "checkpoint.every_steps=10", "train.eval_every=1000",
)  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], timeout=20, check=True)


@pytest.fixture
def bind():
    """bind(folder, "ro") makes a folder read-only for everybody, bind(folder, "rw") ends that."""
    bound = []

    def run(*words):
        return subprocess.run(["mount", *words], capture_output=True, text=True, timeout=20, check=False)

    def change(folder, how):
        if folder not in bound:
            done = run("--bind", folder, folder)
            if done.returncode:
                pytest.skip(f"cannot make a folder read-only: {done.stderr.strip()}")
            bound.append(folder)
        end = time.monotonic() + 20
        while (done := run("-o", f"remount,bind,{how}", folder)).returncode and time.monotonic() < end:
            time.sleep(0.001)  # somebody has a file open for writing
        assert done.returncode == 0, done.stderr

    yield change
    for folder in reversed(bound):
        subprocess.run(["umount", "-l", folder], timeout=20, check=True)


@pytest.fixture(scope="module")
def corpus(prepare, text):
    return prepare("char", train=text[:2_200], valid=text[200:2_200])


def resume(run, *extra):
    return ["-m", "dllm.train", "--resume", run, "--progress", "none", *extra]


def fill(path):
    """Write until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass


def test_on_a_full_disk_training_goes_on_with_warnings_and_older_checkpoints_stay_whole(corpus, small_disk, tmp_path):
    run = small_disk / "run"
    settings = "model.hidden=48", "checkpoint.every_steps=20", "log.every=1", "checkpoint.keep=3"
    arguments = train_arguments(corpus, run, *FILLING, *settings, extra=("--max-steps", 130))
    with Job(2, *arguments, env=slow_steps(tmp_path, 0.02, after=20)) as job:
        job.until(lambda: checkpoints(run), "first checkpoint")
        fill(small_disk / "filler")
        job.until(lambda: "no checkpoint at step" in job.err and "metrics.jsonl" in job.err, "warnings")
        os.remove(small_disk / "filler")  # somebody made room: the last checkpoints can be written
        done = job.wait()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    warnings = complaint(done).splitlines()
    full = "No space left on device"
    known = rf"dllm: (no checkpoint at step \d+: {full}; .*older ones stay|cannot write .*metrics.jsonl: {full}; .*)"
    assert all(re.fullmatch(known, line) for line in warnings), warnings
    assert checkpoints(run)[-1] == 130
    steps = column(metrics(run, "train"), "step").tolist()
    assert steps == list(range(1, 131))  # lines that had to wait were written later


def test_a_checkpoint_larger_than_the_disk_is_a_warning_and_the_one_before_is_whole(corpus, small_disk, tmp_path):
    run = small_disk / "run"
    settings = "model.hidden=112", "checkpoint.every_steps=10", "checkpoint.keep=9", "train.eval_every=1000"
    soon = fault(tmp_path, "dllm.training.trainer", "module.LAST_NAPS = 0.1, 0.2")
    done = mpirun(2, *train_arguments(corpus, run, *FILLING, *settings, extra=("--max-steps", 40)), env=soon)
    assert done.returncode == NOT_SAVED
    kept, warnings = checkpoints(run), [line for line in complaint(done).splitlines() if line.startswith("dllm: ")]
    assert 1 <= len(kept) < 4
    *warnings, last = warnings
    assert sum("is tried again" in line for line in warnings) == 1
    warnings = [line for line in warnings if "is tried again" not in line]
    assert len(warnings) >= 4 - len(kept)
    known = r"dllm: no checkpoint at step \d+: .*; older ones stay"
    assert all(re.fullmatch(known, line) for line in warnings), warnings
    known = f"its newest checkpoint is of step {kept[-1]}. Make room, then --resume {run}"
    assert re.fullmatch(f"dllm: the model of step 40 is NOT on disk: .*; {known}", last)
    assert not (run / "DONE").exists()
    assert column(metrics(run, "train"), "step").tolist() == [7, 14, 21, 28, 35]
    assert not list(run.rglob("*.tmp"))
    assert {path.name for path in run.glob("checkpoints/*")} == {f"step-{step:08d}" for step in kept}
    done = mpirun(2, *resume(run, "--max-steps", kept[-1] + 1), env=soon)
    assert done.returncode in (0, NOT_SAVED)
    assert "damaged" not in done.stderr
    assert math.isfinite(metrics(run)[-1]["loss"])
    assert pathlib.Path(run, "summary.json").exists()


def test_a_folder_that_becomes_read_only_costs_checkpoints_and_nothing_else(tiny, tmp_path, bind):
    undisturbed = tmp_path / "undisturbed"
    mpirun(3, *train_arguments(tiny, undisturbed, *SETTINGS), check=True)
    run = tmp_path / "run"
    with Job(2, *train_arguments(tiny, run, *SETTINGS), env=slow_steps(tmp_path, 0.05, after=11)) as job:
        job.until(lambda: checkpoints(run), "a checkpoint")
        bind(run / "checkpoints", "ro")
        job.until(lambda: "no checkpoint at step" in job.err, "a warning")
        bind(run / "checkpoints", "rw")
        done = job.wait()
    assert done.returncode == 0, done.stderr
    known = r"dllm: no checkpoint at step \d+: Read-only file system; older ones stay"
    assert all(re.fullmatch(known, line) for line in complaint(done).splitlines()), done.stderr
    assert checkpoints(run)[0] == 10
    ours, theirs = metrics(run, "train"), metrics(undisturbed, "train")
    assert column(ours, "step").tolist() == column(theirs, "step").tolist()
    np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-12)
    assert checkpoints(run)[-1] == STEPS
    bind(tmp_path, "ro")
    for refused in (train_arguments(tiny, tmp_path / "other"), ["-m", "dllm.train", "--resume", run]):
        done = mpirun(2, *refused)
        assert done.returncode == REFUSED
        assert re.fullmatch(r"dllm: cannot write to the run folder .*: Read-only file system.*\n", complaint(done)), done.stderr


def test_a_corpus_too_large_for_the_disk_is_refused_in_one_line_and_nothing_is_left(small_disk, text, tmp_path):
    (tmp_path / "long.txt").write_bytes(text * 4)
    options = "--tokenizer", "byte", "--train", tmp_path / "long.txt", "--out", small_disk / "new" / "corpus"
    done = mpirun(0, "-m", "dllm.prepare", *options)
    assert done.returncode == REFUSED
    assert re.fullmatch("dllm: .*No space left on device.*train-00000.h5.*\n", done.stderr)
    assert list(small_disk.iterdir()) == []
