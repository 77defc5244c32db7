"""What is counted and measured of each kind of model: what it reads, its operations, and scores that mean something of it."""

import math
import types

import numpy as np
import pytest
from helpers.labels import make_corpus
from helpers.model_kinds import EVERY_SHAPE, LENGTHS, batch_of, build, configured
from mpi4py import MPI

from dllm import config
from dllm.config import ModelConfig
from dllm.data import audio
from dllm.data.labelling import Classing
from dllm.data.recordings import Recordings, Transcribing
from dllm.errors import UserError
from dllm.files import storage
from dllm.inference.evaluation import Evaluation
from dllm.model import blocks
from dllm.model.batch import Batch
from dllm.tools import facts, info
from dllm.training import event_files, progress
from dllm.training.options import of_corpus


@EVERY_SHAPE
def test_operations_are_those_of_the_products_that_a_batch_needs(shape):
    """Every weight by the rows that it is multiplied with, which the kinds' equations say."""
    model = build(configured(shape))
    batch = batch_of(model.config)
    kind, targets = model.config.kind, int((batch.targets >= 0).sum())
    if kind == "bilm":
        steps = sum(int(np.flatnonzero(lane >= 0).max(initial=-1)) + 1 for lane in batch.targets.T)
        rows = {"forward": steps / 2, "backward": steps / 2, "output": targets}
    else:
        steps = int(LENGTHS.sum())
        rows = {"encoder": steps, "keys": steps, "bridge": 4, "decoder": targets, "combine": targets, "gate": targets}
        rows |= {"projection": targets if kind == "classifier" else steps, "output": steps if kind == "ctc" else targets}
    weights = {name: tensor for name, tensor in model.layout.tensors.items() if ".weight" in name}
    if not model.config.tied:
        weights.pop("embedding.weight", None)
    part = lambda name: "output" if "embedding" in name else name.split(".")[0]
    assert model.flops(batch) == sum(6 * math.prod(tensor.shape) * rows[part(name)] for name, tensor in weights.items())
    assert batch.read == steps + (targets if kind == "seq2seq" else 0)


def test_a_pair_as_one_text_is_read_whole_and_its_source_is_not_predicted():
    targets = np.array([[-1, -1, 3], [-1, 5, 4], [7, -1, 2], [8, -1, -1]])
    assert (Batch(np.zeros((4, 3), int), targets).read, Batch(np.zeros((4, 3), int), targets).predicted) == (4 + 2 + 3, 6)


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """Recordings 0.wav to 3.wav."""
    monkeypatch.setattr(storage, "flush", lambda path: None)
    for number in range(4):
        sound = np.sin(np.arange(1600) * (0.2 + number / 5)).astype(np.float32) / 2
        audio.write(tmp_path / f"{number}.wav", audio.Sound(sound, 8000))
    return tmp_path


def corpus_of(folder, drawing, lines, valid, kind="mel"):
    (folder / "train").write_text("".join(lines))
    (folder / "valid").write_text("".join(valid))
    return make_corpus(folder / "out", drawing, {name: [folder / name] for name in ("train", "valid")}, kind)


def evaluated(corpus, preset, split="valid", whole=False):
    small = "model.hidden=16", "train.lanes=2", "train.precision=fp64"
    evaluation = Evaluation(MPI.COMM_SELF, corpus, split, of_corpus(config.resolve(preset, None, small), corpus), np.float64)
    theta = np.zeros(evaluation.model.layout.size)
    evaluation.model.bind(theta)
    evaluation.model.initialise(1)
    return evaluation.run(theta, whole=whole)


def as_shown(result, units):
    """What progress, TensorBoard, info and compare make of an evaluation."""
    line = {"step": 3, **result}
    best = facts.best([line], {}, units.text)
    return progress.scores_in_words(line), event_files.charts(line), info._best(best)


def test_labels_have_accuracy_and_no_perplexity_wherever_they_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "flush", lambda path: None)
    lines = "x\taa\n", "y\tbb b\n", "x\ta\n", "y\tb\n"
    result = evaluated(corpus_of(tmp_path, Classing(1), lines, lines, "char"), "classifier")
    assert (result["labels"], result["perplexity"], result["bits_per_byte"]) == (4, None, None)
    assert result["perplexity_reason"] == result["bits_per_byte_reason"] == "labels are predicted, no text"
    assert result["accuracy"] in (0, 25, 50, 75, 100)
    assert not {"tokens", "window_perplexity", "bits_per_token", "confusion"} & result.keys()
    shown, charts, best = as_shown(result, blocks.Units("tokens", "labels"))
    assert shown == f"loss {result['loss']:.4f}  accuracy {result['accuracy']:.2f} %"
    assert charts == {"loss/valid": result["loss"], "accuracy/valid": result["accuracy"]}
    assert best == f"validation accuracy {result['accuracy']:.2f} %, loss {result['loss']:.4f}, at step 3"


def test_letters_have_error_rates_which_are_null_where_nothing_is_said(sounds):
    lines = [f"{said}\t{number}.wav\n" for number, said in enumerate(("ab", "", "ba", "b"))]
    corpus = corpus_of(sounds, Transcribing(1), lines, ["\t1.wav\n", "\t2.wav\n"])
    result = evaluated(corpus, "speech-to-text")
    assert (result["letters"], result["wer"], result["cer"], result["perplexity"]) == (2, None, None, None)
    assert result["wer_reason"] == "all transcripts are empty"
    assert result["loss"] > 0  # of saying nothing, each counted as a letter
    shown, charts, _ = as_shown(result, blocks.Units("frames", "letters"))
    assert (shown, charts) == (f"loss {result['loss']:.4f}", {"loss/valid": result["loss"]})
    result = evaluated(corpus, "speech-to-text", "train")
    assert result["letters"] == 6  # five, and a transcript without any
    assert {"word error rate/train", "letter error rate/train", "loss/train"} == event_files.charts(
        {"step": 1, **result}
    ).keys()


def test_text_keeps_its_scores_and_targets_of_pairs_have_no_bits_per_byte():
    line = {"step": 3, "split": "valid", "loss": 1.0, "perplexity": math.e, "bits_per_byte": np.float64(0.5)}
    shown, charts, best = as_shown(line, blocks.Units())
    assert shown == "loss 1.0000  perplexity 2.72  bits per byte 0.500"
    assert charts == {"loss/valid": 1.0, "perplexity/valid": math.e, "bits per byte/valid": 0.5}
    assert best == "validation perplexity 2.72, bits per byte 0.500, loss 1.0000, at step 3"
    model = types.SimpleNamespace(units=blocks.Units(), corpus=types.SimpleNamespace(content="pairs", tokenizer=None))
    model.corpus.tokenizer = types.SimpleNamespace(rate=0, bands=0)
    found = Evaluation._of_text(model, 1.0, np.ones(2))
    assert (found["perplexity"], found["bits_per_byte"]) == (math.e, None)
    assert found["bits_per_byte_reason"]


def test_the_speed_of_a_model_that_hears_is_in_frames(capsys):
    reporter = progress.Reporter(True, "plain")
    reporter.units = blocks.units(ModelConfig(kind="ctc", features=40))
    reporter.begin(".", 0, 9, writes=False)
    reporter.log({"step": 1, "loss": 2.0, "tokens_per_second": 5.0, "hidden_comm_fraction": 1.0})
    assert capsys.readouterr().out.startswith("step 1/9  loss 2.0000  5 frames/s  communication hidden 100%")
    assert progress.Reporter(True, "plain", reporter).units == blocks.Units("frames", "letters")


UNREAD = {
    "attention": ("classifier", "model.attention=dot", "seq2seq, not by classifier"),
    "default value": ("tagger", "model.encoder_layers=1", "seq2seq, not by tagger"),
    "pool": ("tagger", "model.pool=mean", "classifier, not by tagger"),
    "carry": ("seq2seq", "train.carry=run", "lm and bilm, not by seq2seq"),
    "last window": ("classifier", "train.last_window=drop", "lm and bilm, not by classifier"),
    "projection": ("default", "model.projection=8", "seq2seq, tagger, classifier and ctc, not by lm"),
    "embedding": ("speech-to-text", "model.embedding=9", "lm, bilm, seq2seq, tagger and classifier, not by ctc"),
    "prompt": ("classifier", "log.prompt=To be", "lm, not by classifier"),
    "smoothing": ("speech-to-text", "train.smoothing=0.1", "lm, bilm, seq2seq, tagger and classifier, not by ctc"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_setting_that_a_kind_does_not_read_is_refused_where_a_user_has_said_it(tmp_path, case):
    preset, setting, kinds = UNREAD[case]
    name, _, value = setting.partition("=")
    message = f"{name} is read by model.kind = {kinds}: leave it out"
    (section, _, key), file = name.partition("."), tmp_path / "mine.toml"
    file.write_text(f"[{section}]\n{key} = {value if value[0].isdigit() else repr(value)}\n")
    for said in ({"settings": [setting]}, {"file": file}):
        with pytest.raises(UserError) as error:
            config.resolve(preset, **said)
        assert str(error.value) == message


def test_what_a_preset_a_run_or_a_parent_says_is_not_the_users():
    assert config.resolve("pairs", None, ["model.kind=seq2seq"]).train.carry == "window"
    assert config.resolve("keras-imdb", None, ["model.kind=tagger"]).model.pool == "last"
    shape = lambda kind: {"embedding": 8, "hidden": 16}
    assert config.resolve("speech-to-text", None, [], shape).model.embedding == 8


def test_what_a_run_says_may_stay_without_effect_and_what_is_said_of_it_may_not(tmp_path):
    from dllm.runs.run_folder import read_settings

    run = config.resolve("pairs", None, ["model.kind=seq2seq"])
    file = tmp_path / "config.toml"
    file.write_text('[model]\nkind = "seq2seq"\npool = "mean"\n[data]\npath = "/x"\n[train]\ncarry = "window"\n')
    assert config.resolve("pairs", file).model.pool == "mean"
    assert read_settings(tmp_path).train.carry == run.train.carry
    with pytest.raises(UserError, match=r"train\.carry is read by"):
        read_settings(tmp_path, {"train": {"carry": "run"}})


def test_frames_are_refused_by_what_they_are(sounds):
    lines = [f"{'xy'[number % 2]}\t{number}.wav\n" for number in range(4)]
    corpus = corpus_of(sounds, Recordings(1), lines, lines)
    for kind in ("lm", "tagger", "seq2seq"):
        with pytest.raises(UserError, match=f"holds recordings with classes, and model.kind = {kind} reads .*: --preset class"):
            of_corpus(config.resolve("default", None, [f"model.kind={kind}"]), corpus)
    settings = config.resolve("classifier", None, ["model.embedding=64"])
    with pytest.raises(UserError, match=r"model\.embedding is of tokens, and \S+ holds frames of sound: leave it out"):
        of_corpus(settings, corpus, config.of_user(None, ["model.embedding=64"]))
    assert of_corpus(settings, corpus).model.features == corpus.features
