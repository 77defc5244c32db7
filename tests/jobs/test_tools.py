"""dllm info, compare and lr-find: what they say of runs, corpora and models, sound and damaged, and that they start no MPI."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from helpers.faults import fault
from helpers.launch import REFUSED, environment, mpirun
from helpers.run_files import metrics
from helpers.several_commands import run_several

from dllm import config
from dllm.config import TrainConfig
from dllm.errors import UserError
from dllm.tools import compare, facts, info, lr_find
from dllm.training.curves import can_draw
from dllm.training.optim import learning_rate


def said(command, capsys, *words):
    """The exit code of a command in this process, and what it printed."""
    code = command([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(command, capsys, *words):
    code, out, err = said(command, capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def tokens(world):
    """Of the training text."""
    return json.loads((world / "tiny" / "manifest.json").read_text())["splits"]["train"]["tokens"]


@pytest.fixture
def run(world, tmp_path):
    """A copy of the run of `world`, to be changed."""
    return shutil.copytree(world / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "model"
    mpirun(0, "-m", "dllm.export", world / "run", "--out", out, check=True)
    return out


def test_info_of_a_run(world, capsys):
    found = as_json(info.main, capsys, world / "run")
    valid = min(metrics(world / "run", "valid"), key=lambda line: line["loss"])
    assert (found["kind"], found["state"]) == ("run", "done")
    assert (found["step"], found["ranks"], found["tokenizer"]) == (20, 2, "char")
    assert found["steps"] == config.resolve("default").train.epochs * math.ceil((tokens(world) // 8 - 1) / 8)
    assert found["texts"] == [{"corpus": as_json(info.main, capsys, world / "tiny")["hash"], "tokens": 20 * 8 * 8}]
    assert found["best"] == {key: valid[key] for key in ("loss", "perplexity", "step", "bits_per_byte")}
    assert found["checkpoints"][-1] == 20
    assert found["problems"] == []
    assert found["changed"]["model.hidden"] == 16
    sizes = [path.stat().st_size for path in (world / "run").rglob("*") if path.is_file()]
    assert found["disk_bytes"] == sum(sizes)
    _, out, _ = said(info.main, capsys, world / "run")
    assert "done, step 20 of 312,500" in out
    assert f"validation perplexity {valid['perplexity']:.4g}" in out
    assert out.splitlines()[-1].split(None, 1)[1] == f"python -m dllm.generate {world / 'run'} --prompt '...'"


def test_info_of_a_corpus_and_of_a_model(world, model, capsys):
    found = as_json(info.main, capsys, world / "tiny")
    assert (found["kind"], found["vocabulary"]) == ("corpus", as_json(info.main, capsys, model)["vocabulary"])
    assert found["splits"]["train"]["tokens"] == tokens(world)
    assert "dllm.train --data" in found["next"]
    (world / "tiny" / "valid-00000.h5").rename(world / "away")
    try:
        assert as_json(info.main, capsys, world / "tiny")["splits"]["valid"]["not_on_this_disk"] == ["valid-00000.h5"]
        assert "1 of them not on this disk" in said(info.main, capsys, world / "tiny")[1]
    finally:
        (world / "away").rename(world / "tiny" / "valid-00000.h5")
    found = as_json(info.main, capsys, model)
    assert (found["kind"], found["weights"], found["training"]["step"]) == ("model", "fp32", 20)
    assert "step 20 of a run" in said(info.main, capsys, model)[1]


def test_info_tells_a_run_that_goes_on_from_one_that_stopped_whatever_this_clock_says(run, capsys, monkeypatch):
    (run / "DONE").unlink()
    now, clock = time.time(), time.time
    for age, ahead, state, words in (
        (2, 0, "running", "tail -f"),
        (3600, 0, "stopped", f"mpirun -n 2 python -m dllm.train --resume {run}"),
        (2, 86400, "running", "tail -f"),
        (3600, -86400, "stopped", "--resume"),
    ):
        os.utime(run / "owner", (now - age, now - age))
        monkeypatch.setattr(time, "time", lambda ahead=ahead: clock() + ahead)
        found = as_json(info.main, capsys, run)
        assert found["state"] == state
        assert words in found["next"]
        out = said(info.main, capsys, run)[1]
        assert f"{state}, step 20 of 312,500" in out
        assert age <= int(re.search(r"is ([\d,]+) s old\n", out)[1].replace(",", "")) < age + 20
    shutil.rmtree(run / "checkpoints")
    os.utime(run / "owner", (1, 1))
    assert "--config" in as_json(info.main, capsys, run)["next"]  # there is nothing to resume


def test_a_best_loss_on_a_corpus_of_before_is_not_the_best():
    line = lambda step, loss: {"step": step, "split": "valid", "loss": loss}
    lines = [line(10, 1.0), line(20, 3.0), line(30, 2.5), line(40, 2.7)]
    scalars = {"step": 30, "best_loss": 2.5}
    assert facts.best(lines, {"scalars": scalars})["step"] == 30
    assert facts.best(lines, {})["step"] == 10
    assert facts.best([*lines, line(50, math.nan)], {"scalars": scalars})["step"] == 30
    assert facts.best([], {"scalars": {"step": 3, "best_loss": math.inf}}) is None
    assert facts.best(lines, {"scalars": {"step": 45, "best_loss": math.inf}}) is None  # of another text, not evaluated yet
    assert facts.best(lines, {"scalars": {"step": 45, "best_loss": 1.5}}) == {"loss": 1.5, "perplexity": math.exp(1.5)}


def test_steps_are_counted_by_epochs_where_these_end_first(world, run, capsys):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("epochs = 100", "epochs = 2"))
    assert as_json(info.main, capsys, run)["steps"] == 2 * math.ceil((tokens(world) // 8 - 1) / 8)


DAMAGE = {
    "no settings": ("config.toml", b"\xff\xfe"),
    "other settings": ("config.toml", b"[train]\nlr = 'high'\n"),
    "no tokenizer": ("tokenizer.json", b"{"),
    "a summary that is a list": ("summary.json", b"[1, 2]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_one_line(run, capsys, what):
    name, data = DAMAGE[what]
    (run / name).write_bytes(data)
    for command in (info.main, compare.main):
        code, out, err = said(command, capsys, run)
        assert (code, out) == (REFUSED, "")
        assert err.startswith("dllm: ")
        assert err.count("\n") == 1


def test_what_a_hostile_run_says_of_itself_does_no_harm(run, capsys):
    huge, deep = "9" * 400, "[" * 100_000
    lines = [
        f'{{"step": {huge}, "loss": 1.0}}', f'{{"step": 3, "loss": {huge}}}', deep, '{"step": 4, "loss": 2.0, "epoch": 1e308}',
        '{"step": 5, "loss": NaN, "epoch": NaN, "tokens_per_second": "fast"}', '{"step": -1, "loss": 1}', "\x1b[2J",
        '{"step": 60, "loss": 1.5, "split": "valid", "bits_per_byte": "\\u001b[2J"}',
        '{"step": 7, "loss": 1.0, "epoch": 1e-300}',
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(lines))
    manifest = run / "checkpoints" / "step-00000020" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"lanes": 8', '"lanes": 9'))
    summary = {"ranks": "\x1b[2J", "parameters": 10**300, "tokens_per_second": None}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "owner").write_bytes(b"\x1b[2J")
    found = as_json(info.main, capsys, run)
    assert found["best"] == {"loss": 1.5, "perplexity": math.exp(1.5), "step": 60}
    assert "is damaged" in found["problems"][0]
    for command in (info.main, compare.main):
        code, out, err = said(command, capsys, run)
        assert code == 0
        assert "\x1b" not in out + err


def test_what_is_no_folder_of_ours_is_one_line(world, tmp_path, capsys):
    (tmp_path / "config.toml").mkdir()
    for path in (tmp_path, tmp_path / "not-there", "/dev/null", "ipfs://"):
        for command in (info.main, compare.main):
            code, out, err = said(command, capsys, path)
            assert (code, out, err.count("\n")) == (REFUSED, "", 1)
    code, _, err = said(compare.main, capsys, world / "run", world / "tiny")
    assert (code, err) == (REFUSED, f"dllm: {world / 'tiny'} is the folder of a corpus: runs are compared\n")


def test_a_checkpoint_whose_file_is_cut_or_gone_is_named(run, capsys):
    first, second = sorted(run.glob("checkpoints/step-00000020/*.h5"))
    first.unlink()
    os.truncate(second, 100)
    gone, cut = as_json(info.main, capsys, run)["problems"]
    assert gone == f"{first} is not on this disk"
    assert cut.startswith(f"{second} is damaged")


def test_info_and_compare_import_no_mpi(world):
    code = (
        "import sys; from dllm.tools import {0}; code = {0}.main([sys.argv[1]]); assert code == 0;"
        "assert not [name for name in sys.modules if name.startswith('mpi4py')]"
    )
    for name in ("info", "compare"):
        words = [sys.executable, "-c", code.format(name), str(world / "run")]
        subprocess.run(words, env=environment({"PYTHONPATH": os.getcwd()}), check=True, timeout=60, capture_output=True)


def test_compare_shows_what_differs_and_what_came_out(world, run, capsys):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 0.02", "lr = 0.05").replace("seed = 1", "seed = 2"))
    lines = (run / "metrics.jsonl").read_text().replace('"loss": ', '"loss": 1')
    (run / "metrics.jsonl").write_text(lines)
    other = run.rename(run.with_name("other"))
    found = as_json(compare.main, capsys, world / "run", other)
    assert found["settings"] == {"train.lr": [0.02, 0.05], "train.seed": [1, 2]}
    assert found["results"]["steps"] == [20, 20]
    code, out, _ = said(compare.main, capsys, world / "run", other)
    rows = {line[: line.find("  ")]: line.split() for line in out.splitlines() if line.strip()}
    assert code == 0
    assert rows["train.lr"][1:] == ["0.02", "0.05"]
    assert [cell.endswith("*") for cell in rows["best valid perplexity"][-2:]] == [True, False]
    assert as_json(compare.main, capsys, world / "run")["settings"] == {}


def test_the_picture_of_compare_has_every_run(world, run, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = said(compare.main, capsys, world / "run", run, "--plot", tmp_path / "both.svg")
    assert (code, out.splitlines()[-1]) == (0, f"plot: {tmp_path / 'both.svg'}")
    picture = (tmp_path / "both.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture.count("C0") + picture.count("#1f77b4") >= 2
    for path, why in ((tmp_path / "both.txt", "must end with"), (tmp_path / "nix" / "a.png", "there is no folder")):
        code, _, err = said(compare.main, capsys, run, "--plot", path)
        assert (code, why in err) == (REFUSED, True)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    code, out, err = said(compare.main, capsys, world / "run", "--plot", "a.png")
    assert (code, out) == (REFUSED, "")
    assert err == "dllm: --plot a.png needs matplotlib: pip install 'dllm[plot]'\n"


def test_the_range_of_rates_rises_by_one_factor():
    train = TrainConfig(schedule="range", min_lr=1e-4, lr=1.0, max_steps=5)
    rates = [learning_rate(train, step, 0, 1.0, 5) for step in range(5)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    with pytest.raises(UserError, match="it needs 0 < train"):
        config.from_dict({"train": {"schedule": "range", "lr": 0.1}})


def test_a_test_of_rates_is_judged_by_its_curve():
    """A loss that falls fastest at 1e-3, with noise of which there is no trace in what is found."""
    rates = [10 ** (-5 + 6 * step / 199) for step in range(200)]
    loss = lambda lr: 6 - 3 / (1 + (1e-3 / lr) ** 2) + 0.01 * (math.log10(lr) + 1) ** 2 + lr**2
    lines = [{"lr": lr, "loss": loss(lr) + 0.02 * (-1) ** step} for step, lr in enumerate(rates)]
    found = lr_find.judge(lines)
    assert found.rates[found.steepest] == pytest.approx(1e-3, rel=0.15)
    assert found.proposal == pytest.approx(min(rates, key=loss) / 10, rel=0.2)
    with pytest.raises(UserError, match="after 5 steps"):
        lr_find.judge(lines[:5])


def test_lr_find_ends_where_the_loss_diverges_and_leaves_a_picture_alone(world, tmp_path):
    picture = ["--out", tmp_path / "range.png"] if can_draw() else []
    small = ["--set", "model.embedding=16", "--set", "model.hidden=16", "--set", "train.lanes=8", "--set", "train.window=8"]
    words = ["--data", world / "tiny", *small, "--set", "train.clip=0", "--low", 1e-3, "--high", 1e8, "--steps", 120]
    command = ["-m", "dllm", "lr-find", *words, *picture, "--progress", "none"]
    done = mpirun(2, *command, cwd=tmp_path, env={"TMPDIR": tmp_path}, check=True)
    *_, proposal, following = done.stdout.splitlines()
    rate = float(proposal.split()[1].rstrip(","))
    assert 1e-3 < rate < 1
    assert following.endswith(f"--set train.lr={rate:g}")
    assert "e+08" not in done.stdout  # it ended before
    assert {path.name for path in tmp_path.iterdir()} - {"range.png"} == {
        name for name in os.listdir(tmp_path) if name.startswith(("ompi", "prte"))
    }
    assert not picture or (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_under_way_where_a_test_of_rates_ends_by_a_loss_that_is_not_finite(world, tmp_path):
    """The heartbeat of a node's ranks is a thread of each; averaging and the heartbeat end together."""
    code = """
import sys, threading
def judge(lines, before=module.judge):
    sys.stderr.write(f"threads {[type(thread).__name__ for thread in threading.enumerate()]}\\n")
    return before(lines)
module.judge, module.DIVERGED = judge, float("inf")
"""
    small = ("model.embedding=16", "model.hidden=16", "train.lanes=8", "train.window=8", "train.clip=0", "train.optimizer=sgd")
    words = [*(word for one in small for word in ("--set", one)), "--low", 1e-3, "--high", 1e30, "--steps", 80]
    command = ["-m", "dllm", "lr-find", "--data", world / "tiny", *words, "--progress", "plain"]
    done = mpirun(2, *command, cwd=tmp_path, env=fault(tmp_path, "dllm.tools.lr_find", code))
    assert "the test ends: " in done.stdout, done
    assert "not finite" in done.stdout
    assert done.stderr.count("threads [") == 2
    assert "Heartbeat" not in done.stderr


def test_lr_find_refuses_what_is_trains_alone_and_what_is_no_range(world, tmp_path):
    small = ["--data", world / "tiny", "--progress", "none"]
    tries = (
        ["--resume", world / "run"],
        [*small, "--low", 2],
        [*small, "--set", "train.optimizer=sgd", "--low", 200],
        ["--steps", 3],
    )
    ends = run_several(tmp_path / "said", 2, [["dllm.tools.lr_find", *words] for words in tries])
    assert all(end.codes == {REFUSED} for end in ends)
    for end, why in zip(
        ends,
        ("of train's options", "--low 2 must be below --high 1", "--low 200 must be below --high 100", "--steps"),
        strict=True,
    ):
        assert end.text.startswith("dllm: ")
        assert end.text.count("\n") == 1
        assert why in end.text
