"""A run that is watched: `train --trace`, a trace of all ranks, and files for TensorBoard. Neither changes what is computed."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.faults import in_each_step
from helpers.launch import ULFM, flavour, mpirun, train_arguments
from helpers.run_files import column, metrics
from helpers.several_commands import run_several

from dllm.comm.heartbeat import Heartbeat
from dllm.comm.shared_memory import READY, SUMMED
from dllm.comm.tracing import Message, Span
from dllm.errors import UserError
from dllm.training import trace
from dllm.training.event_files import EventFile
from dllm.training.options import train_config, train_options
from dllm.training.progress import Reporter
from dllm.training.trace_events import Told, events, process_of
from dllm.training.trainer import Trainer

RANKS, FIRST, LAST = 4, 6, 12
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
WITH_TENSORBOARD = pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed: pip install -e '.[test]' does")


@pytest.fixture(scope="module")
def traced(world, tmp_path_factory):
    """The run of `world`, on other ranks and watched."""
    out = tmp_path_factory.mktemp("traced") / "run"
    settings = "train.eval_every=8", "train.lr=0.02", "averaging.bucket_mb=0.004", "checkpoint.every_steps=7"
    settings += ("log.tensorboard=true",) * TENSORBOARD
    extra = "--max-steps", 20, "--trace", f"{FIRST}:{LAST}"
    mpirun(RANKS, *train_arguments("tiny", out, *settings, extra=extra), cwd=world, check=True)
    return out


def check_format(trace):
    """As the format's document has it: events by rank, slices one inside the other, what begins ends."""
    assert set(trace) == {"traceEvents", "otherData"}
    open_until, begun, threads = {}, {}, {}
    for event in trace["traceEvents"]:
        assert event["ph"] in "XMbe"
        assert type(event["pid"]) is type(event["tid"]) is int
        assert threads.setdefault(event["tid"], event["pid"]) == event["pid"] > 0  # as Perfetto takes them
        if event["ph"] == "M":
            assert set(event["args"]) in ({"name"}, {"sort_index"})
            continue
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0
        key = event["pid"], event.get("id", event["tid"])
        if event["ph"] == "X":
            ends = open_until.setdefault(key, [])
            while ends and ends[-1] <= event["ts"] + 1e-4:
                ends.pop()
            ends.append(event["ts"] + event["dur"])
            assert event["dur"] >= 0
            assert len(ends) == 1 or ends[-1] <= ends[-2] + 1e-4
        elif event["ph"] == "b":
            begun[key] = event["ts"]
        else:
            assert begun.pop(key) <= event["ts"]
    assert not begun


def test_a_trace_of_four_ranks_shows_messages_under_the_backward(traced):
    found = json.loads((traced / "trace.json").read_text())
    check_format(found)
    assert found["otherData"]["steps"] == [FIRST, LAST]
    for rank in range(RANKS):
        of_rank = [event for event in found["traceEvents"] if event["pid"] == process_of(rank)]
        spans = [event for event in of_rank if event["ph"] == "X"]
        names = [event["name"] for event in spans]
        assert [name for name in names if name.startswith("step ")] == [f"step {step}" for step in range(FIRST, LAST + 1)]
        for name in ("forward", "backward", "optimiser", "wait for the gradient", "read text"):
            assert names.count(name) == LAST - FIRST + 1, name
        assert names.count("evaluation") == 1  # of step 8
        assert {"checkpoint: copy", "metrics"} <= set(names)  # of step 7 and 8
        assert any(event["name"].startswith("write step") for event in spans if event["tid"] == process_of(rank) + 1)
        backwards = [(event["ts"], event["ts"] + event["dur"]) for event in spans if event["name"] == "backward"]
        buckets = [event for event in of_rank if event["ph"] == "b" and event["name"].startswith("bucket")]
        under = [one for one in buckets if any(begin <= one["ts"] < end for begin, end in backwards)]
        assert len(buckets) >= 3 * (LAST - FIRST + 1)
        assert len(under) == len(buckets)
        assert all(one["args"]["bytes"] > 0 for one in buckets)
    hosts = [event["args"]["name"] for event in found["traceEvents"] if event["name"] == "process_name"]
    assert [name.partition(" on ")[0] for name in hosts] == [f"rank {rank}" for rank in range(RANKS)]


def test_a_trace_changes_nothing(traced, world):
    for split in ("train", "valid"):
        ours, theirs = metrics(traced, split), metrics(world / "run", split)
        np.testing.assert_allclose(column(ours, "loss"), column(theirs, "loss"), rtol=1e-4)
    assert json.loads((traced / "summary.json").read_text())["steps"] == 20


def test_a_trace_has_the_steps_that_were_taken_and_a_run_that_never_came_so_far_says_so(world, tmp_path):
    tries = {"run": ("--max-steps", 4, "--trace", "3:9"), "other": ("--max-steps", 2, "--trace", 5)}
    words = [list(map(str, train_arguments("tiny", tmp_path / name, extra=extra)[1:])) for name, extra in tries.items()]
    words.append(["dllm.train", "--resume", tmp_path / "other", "--max-steps", 5, "--trace", "1:4", "--progress", "none"])
    ends = run_several(tmp_path / "said", 0, words, cwd=world, check=True)
    for name in ("run", "other"):  # one ends before the last step that was asked for, one goes on behind the first
        found = json.loads((tmp_path / name / "trace.json").read_text())
        check_format(found)
        steps = [event["name"] for event in found["traceEvents"] if event["name"].startswith("step ")]
        assert steps == ["step 3", "step 4"]
        assert found["otherData"]["steps"] == [3, 4]
    assert "dllm: no trace: step 11 is none of those that this start has taken\n" in ends[1].text


@pytest.mark.skipif(flavour() == "mpich", reason="MPICH ends the job where a rank dies")
def test_a_death_while_a_trace_is_taken_costs_the_trace_alone(world, tmp_path):
    kill = "if trainer.state.step == 8 and rank == 1 and once('killed'): os.kill(os.getpid(), 9)"
    arguments = train_arguments("tiny", tmp_path / "run", extra=("--max-steps", 14, "--trace", "5:12"))
    done = mpirun(3, *arguments, cwd=world, env=in_each_step(tmp_path, kill) | ULFM)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 14, done.stderr
    assert "dllm: no trace: a rank has died before its last step" in done.stderr
    assert not (tmp_path / "run" / "trace.json").exists()


def test_a_death_behind_which_no_step_follows_costs_the_trace_and_is_told(capsys):
    dead = SimpleNamespace(state=SimpleNamespace(step=5))
    averaging = SimpleNamespace(model=np.copy, end=lambda: None)
    rank = SimpleNamespace(reporter=Reporter(True, "none"), heartbeat=Heartbeat())
    survivor = SimpleNamespace(state=SimpleNamespace(theta=np.zeros(2)), averaging=averaging, rank=rank)
    hooks, close = list(Trainer.before_step), Trainer.close
    trace.install(dead, (5, 9))
    Trainer.close(survivor)
    assert capsys.readouterr().err == "dllm: no trace: a rank has died before its last step\n"
    assert (Trainer.before_step, Trainer.close) == (hooks, close)


@pytest.mark.parametrize("text", ["0", "5:4", "0:3", "-1", "a", "1:1001", "1001", "1:2:3", "", "9" * 20])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--trace"):
        train_options(["--trace", text])


def test_which_steps_are_traced():
    assert train_options(["--trace", "100:105"]).trace == (100, 105)
    assert train_options(["--trace", "20"]).trace == (0, 20)


def test_times_of_other_hosts_are_moved_and_a_bucket_ends_when_all_have_added_up():
    marks = lambda ready, summed: [
        (READY, 4, 0.0),
        (SUMMED, 4, 0.0),
        (READY, 5, ready),
        (READY, 6, ready + 1),
        (SUMMED, 6, summed),
    ]
    told = [
        Told("a", [0, 1], [Span("step 1", "compute", 10.0, 20.0)], [], marks(11, 13), [("x", 8), ("y", 4)]),
        Told("a", [0, 1], [Span("step 1", "compute", 10.0, 20.0)], [], marks(12, 15), [("x", 8), ("y", 4)]),
        Told("b\x1b", [2], [Span("step 1", "compute", 110.5, 120.5)], [Message("Isend", 3, 111.0, 112.0)], [], []),
    ]
    found = events(told, [0.0, 0.0, 100.0])
    shown = [(event["pid"] // 10 - 1, event["ph"], event["name"], event["ts"]) for event in found if event["ph"] in "be"]
    assert shown == [
        (0, "b", "x", 1e6), (0, "e", "x", 5e6), (0, "b", "y", 2e6), (0, "e", "y", 5e6),
        (1, "b", "x", 2e6), (1, "e", "x", 5e6), (1, "b", "y", 3e6), (1, "e", "y", 5e6),
        (2, "b", "Isend", 1e6), (2, "e", "Isend", 2e6),
    ]  # fmt: skip
    assert [event["ts"] for event in found if event["ph"] == "X"] == [0.0, 0.0, 0.5e6]
    assert "\x1b" not in json.dumps(found, ensure_ascii=False)


def shown(run):
    """Chart -> (steps, values) as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    scalars = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    return {tag: ([one.step for one in events], [one.value for one in events]) for tag, events in scalars.items()}


@WITH_TENSORBOARD
def test_tensorboard_reads_what_metrics_has(traced):
    charts = shown(traced)
    lines = {split: metrics(traced, split) for split in ("train", "valid")}
    for chart, split, name in (
        ("loss/train", "train", "loss"), ("loss/valid", "valid", "loss"), ("perplexity/valid", "valid", "perplexity"),
        ("bits per byte/valid", "valid", "bits_per_byte"), ("training/learning rate", "train", "lr"),
        ("training/gradient norm", "train", "grad_norm"),
    ):  # fmt: skip
        steps, values = charts[chart]
        assert steps == column(lines[split], "step").tolist(), chart
        np.testing.assert_allclose(values, column(lines[split], name), rtol=1e-6)
    assert {"speed/tokens a second", "speed/communication hidden", "perplexity/train"} <= set(charts)


@WITH_TENSORBOARD
def test_steps_that_are_taken_again_are_shown_once(tmp_path):
    lines = [{"step": step, "loss": 5.0 - step / 10, "tokens_per_second": 1.0} for step in range(9)]
    for start, stop in ((0, 6), (3, 9)):  # the first one dies behind its checkpoint of step 3
        reporter = Reporter(True, "none")
        reporter.tensorboard = True
        reporter.begin(tmp_path, start, 9, True)
        for line in lines[start + 1 : stop]:
            reporter.log(line | {"loss": line["loss"] + start})
        reporter.end()
    steps, values = shown(tmp_path)["loss/train"]
    assert steps == list(range(1, 9))
    assert values == pytest.approx([5.0 - step / 10 + 3 * (step > 3) for step in steps])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@WITH_TENSORBOARD
def test_a_full_disk_hides_no_later_step(tmp_path):
    events = EventFile(tmp_path, 0)
    with open("/dev/full", "wb", buffering=0) as full:
        file, events._file = events._file, full
        for step in (1, 2):
            with pytest.raises(OSError, match="No space"):
                events.log({"step": step, "loss": 2.0})
        events._file = file
    events.log({"step": 3, "loss": 1.0})
    events.end()
    assert shown(tmp_path)["loss/train"] == ([1, 2, 3], [2.0, 2.0, 1.0])


def test_a_run_without_tensorboard_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'dllm\[tensorboard\]'"):
        train_config(train_options(["--set", "log.tensorboard=true"]))
    assert not train_config(train_options([])).log.tensorboard
