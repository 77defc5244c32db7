"""The Python API on a run and on model folders: what the commands print, without MPI."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.launch import mpirun, train_arguments, write_pairs
from helpers.model_folders import commands, make
from helpers.numerics import reference

import dllm
from dllm.data.corpus import Corpus
from dllm.inference.loaded_model import LoadedModel
from dllm.model.batch import Batch

TEXT = "To be, or not to be: that is the question. " * 4


@pytest.fixture(scope="module", params=["run", "exported"])
def folder(request, world, tmp_path_factory):
    """A run, and the model folder that was made of it."""
    if request.param == "run":
        return world / "run"
    out = tmp_path_factory.mktemp("api") / "exported"
    mpirun(0, "-m", "dllm.export", "run", "--out", out, cwd=world, check=True)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return dllm.load(folder)


def printed(tmp_path, model, *options):
    """The texts of `dllm generate MODEL` with each of some options."""
    lines = [f"generate {model} {words} --json" for words in options]
    told = commands(tmp_path / "commands", *lines, cwd=model.parent)
    assert {code for code, _ in told} == {0}
    return [json.loads(out.splitlines()[-1])["text"] for _, out in told]


def test_a_text_is_that_of_the_command_for_the_same_seed(tmp_path, model, folder):
    words = (
        "--seed 7", f"--seed {2**40} --temperature 1.2 --top-k 9", "--top-p 0.8", "--beam 3", "--min-p 0.02 --best-of 2",
        "--presence-penalty 0.5 --frequency-penalty 0.25 --repetition-penalty 1.5", "--logit-bias e=-100 --logit-bias 3=2.5",
    )  # fmt: skip
    told = printed(tmp_path, folder, *[f"--prompt First --tokens 40 {option}" for option in words])
    options = (
        {"seed": 7}, {"seed": 2**40, "temperature": 1.2, "top_k": np.int64(9)}, {"top_p": 0.8}, {"beam": 3},
        {"min_p": 0.02, "best_of": 2}, {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5},
        {"logit_bias": {"e": -100, 3: 2.5}},
    )  # fmt: skip
    assert [model.generate("First", 40, **each) for each in options] == told
    assert len(set(told)) == len(options)
    assert "e" not in told[-1]
    assert model.generate() == model.generate("", 200, temperature=0.8, seed=1)


def test_a_score_is_that_of_a_forward_pass_and_of_the_equations(model, folder):
    score, loaded = model.score(TEXT), LoadedModel.open(folder)
    n = len(score.tokens)
    assert n > 64  # more than a window
    assert score.logprobs.shape == (n - 1,)
    h = np.zeros((loaded.config.layers, 1, loaded.config.hidden), loaded.dtype)
    forward = loaded.model(n - 1).forward(Batch(score.tokens[:-1, None], score.tokens[1:, None]), h, np.zeros_like(h))[:, 0]
    np.testing.assert_allclose(-score.logprobs, forward, atol=1e-5)
    logits = reference(loaded.model(1), score.tokens[:-1, None])[0][:, 0]
    exact = logits[np.arange(n - 1), score.tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(score.logprobs, exact, atol=1e-5)
    assert score.loss == pytest.approx(forward.mean(), abs=1e-6)
    assert score.perplexity == pytest.approx(np.exp(score.loss))
    assert repr(score).startswith(f"<dllm score of {n} tokens: loss {score.loss:.4f}, ")


def test_a_split_s_score_is_its_evaluation(model, folder, world):
    """The test split from end to end, in one lane."""
    words = "-m", "dllm.evaluate", folder, "--data", world / "tiny", "--lanes", 1
    told = json.loads(mpirun(1, *words, check=True).stdout.splitlines()[-1])
    corpus = Corpus(world / "tiny")
    text = corpus.tokenizer.decode(corpus.read("test", 0, corpus.split("test")["tokens"])).decode()
    score = model.score(text)
    assert len(score.logprobs) == told["tokens"]
    assert score.loss == pytest.approx(told["loss"], abs=1e-5)


def test_embeddings_are_the_states_behind_texts_whatever_is_beside_them(model, folder):
    loaded = LoadedModel.open(folder)
    texts = [TEXT[: 3 * n + 1] for n in range(70)]
    found = model.embed(texts)
    assert found.shape == (70, loaded.config.hidden)
    for n in (0, 1, 33, 69):
        np.testing.assert_array_equal(model.embed(texts[n]), found[n : n + 1])
        tokens = loaded.tokenizer.encode(texts[n].encode(), False)
        np.testing.assert_allclose(found[n], reference(loaded.model(1), tokens[:, None])[1][-1, 0], atol=1e-5)
    assert model.embed([]).shape == (0, loaded.config.hidden)


def test_metrics_are_arrays_by_step(world):
    lines = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    found = dllm.metrics(world / "run")
    assert set(found) == {"train", "valid"}
    for kind, columns in found.items():
        mine = [line for line in lines if line.get("split", "train") == kind]
        for name in ("step", "loss"):
            assert columns[name].dtype.kind == {"step": "i", "loss": "f"}[name]
            assert columns[name].tolist() == [line[name] for line in mine]
    assert found["valid"]["step"].tolist() == [8, 16, 20]
    assert found["train"]["busy_seconds"].shape == (len(found["train"]["step"]), 3)


def test_metrics_of_a_run_that_is_writing_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "x": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    found = dllm.metrics(tmp_path)["train"]
    assert found["loss"].tolist() == [2.5, 2]
    assert np.isnan(found["x"]).tolist() == [False, True]


def test_a_model_of_pairs_answers(tmp_path):
    pairs = [(f"{a}+{b}", f"{a + b}") for a in range(12) for b in range(12)]
    words = "-m", "dllm.prepare", "--pairs", *write_pairs(tmp_path, pairs), "--tokenizer", "char", "--out", "data"
    mpirun(0, *words, cwd=tmp_path, check=True)
    settings = "train.carry=window", "train.window=20"
    mpirun(1, *train_arguments("data", "run", *settings, extra=("--max-steps", 5)), cwd=tmp_path, check=True)
    model = dllm.load(tmp_path / "run", "last")
    assert model.pairs
    asked = "--checkpoint last --source 3+4 --tokens 9"
    assert [model.answer("3+4", 9), model.answer("3+4", 9, beam=4)] == printed(
        tmp_path, tmp_path / "run", asked, f"{asked} --beam 4"
    )
    for ask in (lambda: model.generate("x"), lambda: model.score("3+4")):
        with pytest.raises(dllm.UserError, match="was trained on pairs"):
            ask()


def test_errors_are_one_line(tmp_path, model):
    make(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text("x\n{}\n")
    for ask, text in (
        (lambda: dllm.load(tmp_path / "nowhere"), "is not the folder of a run or of a model"),
        (lambda: dllm.load(tmp_path / "broken"), "is not valid JSON"),
        (lambda: dllm.load(tmp_path, "newest"), "it is 'best' or 'last'"),
        (lambda: dllm.metrics(tmp_path), "is .* the folder of a run"),
        (lambda: dllm.metrics(tmp_path / "bad"), "line 1 is not a line of metrics"),
        (lambda: model.answer("x"), "was not trained on pairs: let it continue a text by generate"),
        (lambda: model.generate("x", 0), "tokens is 0: it must be at least 1"),
        (lambda: model.generate("x", temperature=-1), "temperature is -1: it must be at least 0"),
        (lambda: model.generate("x", top_k=-1), "top_k is -1"),
        (lambda: model.generate("x", top_p=1.5), "it is a probability"),
        (lambda: model.generate("x", beam=0), "beam is 0"),
        (lambda: model.generate("x", beam=2, top_k=3), "beam takes the likeliest text and draws none: leave out top_k"),
        (lambda: model.generate("x", temperature=float("nan")), "temperature is nan"),
        (lambda: model.generate("x", temperature=float("inf")), "temperature is inf"),
        (lambda: model.generate("x", top_k=1.5), "top_k is 1.5: it must be a whole number"),
        (lambda: model.generate("x", seed="1"), "seed is '1': it must be a whole number"),
        (lambda: model.generate("x", seed=2**63), "seed is 9223372036854775808: it must be at least 0"),
        (lambda: model.generate("x", best_of=65), "best_of is 65: it must be at least 1 and at most 64"),
        (lambda: model.generate("x", presence_penalty=-3), "it must be at least -2 and at most 2"),
        (lambda: model.generate("x", repetition_penalty=0), "repetition_penalty is 0: it must be at least 0.01"),
        (lambda: model.generate("x", logit_bias=[1]), "logit_bias maps tokens"),
        (lambda: model.generate("x", logit_bias={"To": 1}), "'To' is not one token"),
        (lambda: model.generate("x", logit_bias={10**9: 1}), "there is no token 1000000000"),
        (lambda: model.generate("x", logit_bias={1.5: 1}), "there is no token 1.5"),
        (lambda: model.generate("x", logit_bias={"e": 101}), "logit_bias of 'e' is 101: it is a number from -100 to 100"),
        (lambda: model.score("x"), "is too short to score"),
        (lambda: model.embed(["x", ""]), "an empty text has no embedding"),
    ):
        with pytest.raises(dllm.UserError, match=text) as error:
            ask()
        assert "\n" not in str(error.value)


def test_an_option_that_is_none_is_an_error_of_the_program(model):
    with pytest.raises(TypeError, match="there is no option 'topk' of drawing; there are temperature, top_k, "):
        model.generate("x", topk=3)


def test_neither_the_import_nor_a_model_starts_mpi(folder):
    """`import dllm` loads nothing else; a model at work has no MPI library, even where there is none to load."""
    script = """
import sys
import dllm
assert not {"numpy", "numba", "mpi4py", "h5py"} & sys.modules.keys(), "the import loads too much"
assert set(dllm.__all__) <= set(dir(dllm))
sys.modules["mpi4py.MPI"] = None  # an import of it fails
model = dllm.load(sys.argv[1])
model.generate("x", 5)
model.score("To be")
model.embed(["x"])
dllm.Model, dllm.Score
assert sys.modules["mpi4py.MPI"] is None
try:
    dllm.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
else:
    raise AssertionError("dllm.nothing")
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=120)
