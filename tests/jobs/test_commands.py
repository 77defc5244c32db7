"""The commands as users type them: help, evaluate, what a run shows, generate, crashes."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from helpers.faults import in_each_step
from helpers.launch import REFUSED, Job, complaint, mpirun, train_arguments
from helpers.run_files import metrics

import dllm
from dllm import config
from dllm.model.precision import described, products_of


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate"])
def test_help_is_printed_once_on_four_ranks(command):
    done = mpirun(4, "-m", f"dllm.{command}", "--help", check=True)
    assert done.stdout.count(f"usage: python -m dllm.{command}") == 1
    assert done.stdout.count("examples") == 1
    assert complaint(done) == ""


def test_settings_are_shown_once_as_the_other_options_set_them():
    words = ["--settings", "--preset", "wlm-200", "--set", "train.seed=7"]
    alone, under_mpirun = (mpirun(ranks, "-m", "dllm.train", *words, check=True) for ranks in (0, 3))
    assert alone.stdout == under_mpirun.stdout
    assert complaint(under_mpirun) == ""
    for name in config.FIELDS:
        assert len(re.findall(f"^{re.escape(name)} ", alone.stdout, re.M)) == 1, name
    assert re.search(r"^train\.seed +7 +not negative +\w", alone.stdout, re.M)
    assert re.search(r"^model\.hidden +200 +at least 1 +\w", alone.stdout, re.M)
    refused = mpirun(3, "-m", "dllm.train", "--settings", "--set", "train.lr=0")
    assert refused.returncode == REFUSED
    assert complaint(refused) == "dllm: train.lr = 0.0: it must be above 0\n"


def test_the_program_without_a_command_shows_the_commands_and_knows_no_others():
    usage = mpirun(4, "-m", "dllm", check=True).stdout
    assert usage.count("usage: dllm COMMAND") == 1
    for command in ("prepare", "train", "evaluate", "generate"):
        assert len(re.findall(f"^  {command} ", usage, re.M)) == 1
        assert f"python -m dllm.{command}" in mpirun(0, "-m", "dllm", command, "--help", check=True).stdout
    assert mpirun(0, "-m", "dllm", "--version", check=True).stdout.startswith(f"dllm {dllm.__version__}")
    done = mpirun(4, "-m", "dllm", "fly")
    assert done.returncode == REFUSED
    assert re.fullmatch("dllm: there is no command fly; there are prepare, .*\n", complaint(done))


def test_evaluate_agrees_with_the_run_on_any_number_of_ranks(world):
    last = metrics(world / "run", "valid")[-1]
    for ranks in (0, 2):
        done = mpirun(
            ranks, "-m", "dllm.evaluate", "run", "--split", "valid", "--checkpoint", "last", cwd=world, check=True
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        assert {"split", "tokens", "loss", "perplexity", "bits_per_token"} <= result.keys()
        assert result["split"] == "valid"
        assert result["tokens"] == last["tokens"]
        assert result["loss"] == pytest.approx(last["loss"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(2.718281828459045 ** result["loss"], rel=1e-6)
        assert result["bits_per_token"] == pytest.approx(result["loss"] / 0.6931471805599453, rel=1e-6)
        assert complaint(done) == ""


def test_evaluate_measures_what_is_served_beside_fp32(world):
    options = "run", "--split", "valid", "--checkpoint", "last", "--precision", "int8"
    found = []
    for ranks in (0, 2):
        done = mpirun(ranks, "-m", "dllm.evaluate", *options, cwd=world, check=True)
        *_, says, result = done.stdout.splitlines()
        assert complaint(done) == ""
        assert says.startswith(f"{described('int8')}: perplexity ")
        found.append(json.loads(result))
    one, two = found
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["precision"] == products_of("int8", np.float32)
    last = metrics(world / "run", "valid")[-1]
    assert one["tokens"] == last["tokens"]
    assert one["perplexity_fp32"] == pytest.approx(last["perplexity"], rel=1e-5)
    assert one["perplexity"] == pytest.approx(last["perplexity"], rel=5e-3)
    assert (one["perplexity"] == one["perplexity_fp32"]) <= (one["precision"] == "fp32")


def test_a_short_run_shows_header_sample_and_what_to_type_next_once_and_no_warnings(world, tmp_path):
    arguments = train_arguments("train-only", tmp_path / "run", "log.every=50", extra=("--max-steps", 3))
    arguments[arguments.index("none")] = "auto"
    done = mpirun(2, *arguments, cwd=world, check=True)
    assert complaint(done) == ""
    assert "\x1b" not in done.stdout  # nobody watches: lines, not a live display
    for start in ("dllm ", "data ", "lanes ", "model ", "training ", "run ", "done  ", "sample", "plot ", "generate "):
        assert len(re.findall(f"^{start}", done.stdout, re.M)) == 1, f"{start}\n{done.stdout}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    keys = "ranks mpi_library parameters tokens_per_second gflops exposed_comm_fraction peak_rss_bytes steps"
    assert {*keys.split(), "wall_seconds", "best_valid_perplexity", "config"} <= summary.keys()
    assert (summary["ranks"], summary["steps"], len(summary["peak_rss_bytes"])) == (2, 3, 2)


def generated(world, *options):
    arguments = "-m", "dllm.generate", "run", "--prompt", "First", "--tokens", 60, *options
    return mpirun(0, *arguments, cwd=world, check=True).stdout


def test_generate_repeats_for_a_seed_and_differs_between_seeds(world):
    first = generated(world, "--seed", 7)
    assert first.startswith("First")
    assert generated(world, "--seed", 7) == first
    assert generated(world, "--seed", 8) != first


def test_generate_at_temperature_0_takes_the_likeliest_token_and_json_holds_what_was_printed(world):
    coldest = generated(world, "--temperature", 0)
    assert generated(world, "--top-k", 1, "--seed", 9) == coldest
    lines = generated(world, "--temperature", 0, "--json").splitlines()
    assert len(lines) == 1
    value = json.loads(lines[0])
    assert value["prompt"] == "First"
    assert len(value["tokens"]) == 60
    assert value["prompt"] + value["text"] + "\n" == coldest


def test_generate_with_beams_draws_nothing_and_one_beam_is_the_coldest(world):
    assert generated(world, "--beam", 1) == generated(world, "--temperature", 0)
    found = generated(world, "--beam", 5)
    assert found.startswith("First")
    refused = mpirun(0, "-m", "dllm.generate", "run", "--beam", 5, "--seed", 3, cwd=world)
    assert (refused.returncode, refused.stderr.count("\n")) == (REFUSED, 1)
    assert "--beam takes the likeliest texts and draws none: leave out --seed" in refused.stderr


@pytest.mark.parametrize(
    ("what", "says", "codes"),
    [
        ("raise RuntimeError('broken')", "dllm: rank 1 failed\nTraceback.*RuntimeError: broken", None),
        ("from dllm import errors; raise errors.UserError('no such text')", r"dllm: no such text \(rank 1\)\n", {REFUSED}),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", "", None),
    ],
)
def test_one_rank_that_crashes_ends_all_ranks_soon(world, tmp_path, what, says, codes):
    env = in_each_step(tmp_path, f"if rank == 1 and trainer.state.step == 5: {what}")
    with Job(3, *train_arguments("tiny", tmp_path / "run"), env=env, cwd=world) as job:
        log = tmp_path / "run" / "metrics.jsonl"
        job.until(lambda: log.exists() and '"step": 5,' in log.read_text(), "step 5")
        begin = time.monotonic()
        done = job.wait()  # fails where a process stays
        assert time.monotonic() - begin < 20
    assert done.returncode in codes if codes else done.returncode not in (0, 75)
    assert re.search(says, done.stderr, re.S), done.stderr
    assert len(metrics(tmp_path / "run", "train")) == 5


def test_an_interrupted_start_leaves_no_process_behind(world, tmp_path):
    with Job(2, *train_arguments("tiny", tmp_path / "run"), cwd=world) as job:
        job.until(lambda: len(job.ranks()) == 2, "two ranks")
        ranks = list(job.ranks().values())
        job.signal(signal.SIGKILL, [job.launcher()])
        job.kill()
        assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in ranks)
