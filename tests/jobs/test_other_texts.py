"""A run that goes on with another text, other windows or a greater length, and one that begins with a model of another."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from helpers.launch import REFUSED, complaint, mpirun, train_arguments
from helpers.run_files import checkpoints, column, metrics

from dllm import config
from dllm.data.corpus import Corpus
from dllm.inference.loaded_model import LoadedModel
from dllm.runs import checkpoint
from dllm.runs.run_folder import Trained

SETTINGS = "train.lr=0.02", "train.eval_every=10", "train.epochs=50", "checkpoint.every_steps=10", "checkpoint.keep=9"
EASY, HARD = b"ab" * 1500, bytes(np.random.default_rng(1).integers(97, 105, 3000, np.uint8))


@pytest.fixture(scope="module")
def corpora(prepare):
    """easy, hard and mixed: texts for training and validation that are easy to learn, or random, or one of each."""
    easy = prepare("char", train=EASY + HARD[:600], valid=EASY[:600])
    again = ("--tokenizer-from", easy)
    made = {name: prepare("", again, train=train, valid=valid) for name, train, valid in
            (("hard", HARD[:2100], HARD[2100:]), ("mixed", EASY + HARD[:600], HARD[:900]))}  # fmt: skip
    return {"easy": easy} | made


def resume(ranks, run, *extra, **options):
    return mpirun(ranks, "-m", "dllm.train", "--resume", run, "--progress", "none", *extra, **options)


def manifest(run, step):
    return json.loads((checkpoint.folder_of(run, step) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def easy(corpora, tmp_path_factory):
    """30 steps on the easy text."""
    run = tmp_path_factory.mktemp("easy") / "run"
    mpirun(1, *train_arguments(corpora["easy"], run, *SETTINGS, extra=("--max-steps", 30)), check=True)
    return run


@pytest.mark.parametrize(("other", "ranks"), [("hard", 3), ("mixed", 1)])
def test_the_best_model_is_the_best_on_the_text_of_the_newest(corpora, easy, tmp_path, other, ranks):
    run = tmp_path / "run"
    shutil.copytree(easy, run)
    done = resume(ranks, run, "--data", corpora[other], "--max-steps", 50, check=True)
    says = "the text for validation is another: the best loss, and what followed from it, begin anew\n"
    says = {"hard": "the text for training is another: its first epoch begins; " + says, "mixed": says}[other]
    assert complaint(done) == f"dllm: {says}"
    losses = dict(zip(*(column(metrics(run, "valid"), name) for name in ("step", "loss")), strict=True))
    assert losses[30] < min(losses[40], losses[50])  # the text before was easier
    best = min((40, 50), key=losses.get)
    assert Trained.open(run).checkpoint.step == best
    assert json.loads((run / "summary.json").read_text())["best_valid_perplexity"] == pytest.approx(math.exp(losses[best]))
    texts = checkpoint.Checkpoint.open(checkpoint.folder_of(run, 50)).texts
    assert [text.corpus for text in texts] == [Corpus(corpora[name]).hash for name in ("easy", other)]
    windows = {"easy": 64, "hard": 64, "mixed": 64}
    assert [text.tokens for text in texts] == [30 * windows["easy"], pytest.approx(20 * windows[other], rel=0.05)]
    assert (manifest(run, 40)["scalars"]["place"] == 80) == (other == "hard")  # the first ten windows of another text

    mpirun(0, "-m", "dllm.export", run, "--out", tmp_path / "model", check=True)
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(text.corpus in card for text in texts)
    assert f"| tokens seen | {sum(text.tokens for text in LoadedModel.open(tmp_path / 'model').texts):,} |" in card


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_place_in_an_epoch_is_kept_whatever_the_windows_are(corpora, easy, tmp_path, ranks):
    run = tmp_path / "run"
    shutil.copytree(easy, run)
    predicted = Corpus(corpora["easy"]).split("train")["tokens"] // 8 - 1  # by each lane in an epoch
    assert manifest(run, 30)["scalars"]["place"] == 240
    done = resume(ranks, run, "--set", "train.window=7", "--set", "train.epochs=1", "--set", "log.every=1", check=True)
    assert complaint(done) == ""
    steps = checkpoints(run)[-1]
    assert steps == 30 + -(-(predicted - 245) // 7) + 1  # one to 245, the next multiple of 7
    scalars = manifest(run, steps)["scalars"]
    assert (scalars["epoch"], scalars["place"], scalars["seen"]) == (1, 0, 8 * predicted)

    summary = (run / "summary.json").read_text()
    again = mpirun(ranks, "-m", "dllm.train", "--resume", run, "--progress", "plain", check=True)
    assert f"nothing was left to do, all {steps} steps were done before; --set train.epochs=N goes further" in again.stdout
    assert (run / "DONE").read_text() == f"{steps}\n"
    assert (run / "summary.json").read_text() == summary


def test_a_shorter_text_is_read_from_its_beginning_for_as_many_epochs(corpora, easy, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(easy, run)
    windows = -(-(Corpus(corpora["hard"]).split("train")["tokens"] // 8 - 1) // 8)
    done = resume(2, run, "--data", corpora["hard"], "--set", "train.epochs=2", check=True)
    assert "the text for training is another: its first epoch begins" in complaint(done)
    assert checkpoints(run)[-1] == 30 + 2 * windows


def test_private_texts_are_known_by_the_sum_of_their_sizes(prepare, corpora, tmp_path):
    for name, size in (("one0", 1500), ("one1", 900), ("two0", 1500), ("two1", 1000)):
        (tmp_path / f"{name}.txt").write_bytes(HARD[:size])
    for site in ("one", "two"):
        arguments = ("--train", tmp_path / f"{site}{{rank}}.txt", "--tokenizer", "byte", "--out", tmp_path / f"{site}{{rank}}")
        mpirun(2, "-m", "dllm.prepare", *arguments, check=True)
    run = tmp_path / "run"
    mpirun(2, *train_arguments(tmp_path / "one{rank}", run, *SETTINGS, extra=("--max-steps", 12)), check=True)
    assert complaint(resume(2, run, "--max-steps", 20, check=True)) == ""
    assert manifest(run, 20)["texts"][0]["corpus"] == ""
    assert manifest(run, 20)["scalars"]["place"] == 160
    done = resume(2, run, "--data", tmp_path / "two{rank}", "--max-steps", 24, check=True)
    assert complaint(done) == "dllm: the text for training is another: its first epoch begins\n"
    assert manifest(run, 24)["scalars"]["place"] == 32


def test_patience_ends_a_run_on_all_ranks_alike_also_behind_a_resume(corpora, tmp_path):
    run = tmp_path / "run"
    settings = "train.eval_every=5", "train.patience=2", "train.lr=0.5", "train.epochs=50"
    mpirun(3, *train_arguments(corpora["hard"], run, *SETTINGS, *settings, extra=("--max-steps", 5)), check=True)
    done = resume(2, run, check=True)
    assert complaint(done) == ""
    losses, steps = (column(metrics(run, "valid"), name) for name in ("loss", "step"))
    best = int(np.argmin(losses))
    assert len(losses) == best + 3  # two that were no better
    assert (run / "DONE").read_text() == f"{steps[-1]}\n"
    assert Trained.open(run).checkpoint.step == steps[best]
    resume(2, run, "--set", "train.patience=3", check=True)
    assert len(metrics(run, "valid")) > len(losses)


@pytest.mark.parametrize(("ranks", "exported", "text"), [(1, True, "easy"), (3, False, "hard")])
def test_a_new_run_begins_with_the_parameters_of_another(corpora, easy, tmp_path, ranks, exported, text):
    run, origin = tmp_path / "run", tmp_path / "model" if exported else easy
    if exported:
        mpirun(0, "-m", "dllm.export", easy, "--out", origin, check=True)
    named = ("--set", f"train.init_from={origin}") if exported else ("--init-from", origin)  # as config.toml of a run has it
    words = ["--data", corpora[text], "--out", run, *named, "--progress", "plain"]
    launched = ["-m", "dllm.launch", "-n", ranks, "--", "--preset", "wlm-200", "--set", "model.embedding=16"]  # as the parent's
    words = [*(launched if exported else ["-m", "dllm.train"]), *words, "--max-steps", 2]
    small = ("train.lanes=8", "train.window=8", "train.lr=1e-30", "train.warmup=0", "log.sample=0")
    done = mpirun(0 if exported else ranks, *words, *(part for one in small for part in ("--set", one)), check=True)
    assert f"beginning  the parameters of {origin}" in done.stdout
    before, begun = LoadedModel.open(easy), LoadedModel.open(run)
    for name, tensor in begun.tensors().items():
        np.testing.assert_allclose(tensor, before.tensors()[name], atol=1e-6)
    assert begun.scalars["step"] == 2
    assert [one.corpus for one in begun.texts] == [Corpus(corpora[name]).hash for name in ("easy", text)]
    assert [one.tokens for one in begun.texts] == [30 * 64, 2 * 64]
    assert config.load_toml(run / "config.toml")["train"]["init_from"] == str(origin)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--init-from", "{easy}", "--set", "model.hidden=17"), "--init-from run is of another shape: output.weight is"),
        (("--init-from", "{easy}/checkpoints"), "checkpoints is not the folder of a run or of a model"),
        (("--init-from", "{easy}", "--resume", "{easy}"), "--resume goes on with the parameters that a run has"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(corpora, easy, tmp_path, words, says):
    data = () if "--resume" in words else ("--data", corpora["hard"], "--out", tmp_path / "run")
    done = mpirun(2, "-m", "dllm.train", *(word.format(easy=easy) for word in words), *data)
    assert done.returncode == REFUSED
    assert re.fullmatch(f"dllm: .*{says}.*\n", complaint(done))
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused_with_what_makes_one(easy, prepare, tmp_path):
    other = prepare("byte", train=HARD)
    done = mpirun(2, "-m", "dllm.train", "--init-from", easy, "--data", other, "--out", tmp_path / "run")
    assert done.returncode == REFUSED
    assert f"dllm.prepare --tokenizer-from {easy} makes a corpus that has it" in complaint(done)
