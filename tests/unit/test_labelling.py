"""What models say of texts, and how good it is: spans, F1, confusion; the same alone and in any batch."""

import itertools
import types

import numpy as np
import pytest
from helpers.labels import make_corpus, records
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from dllm.config import resolve
from dllm.data.labelling import Classing, Tagging
from dllm.errors import UserError
from dllm.files import storage
from dllm.inference import label_scores, labelling
from dllm.inference.evaluation import Evaluation
from dllm.tools import predict
from dllm.training.options import of_corpus

TYPES = st.sampled_from(["O", *(f"{mark}-{name}" for mark in "BIES" for name in ("PER", "LOC"))])
FEW = settings(max_examples=200, deadline=None, derandomize=True, database=None)
MARKS = "BIO"  # of the small corpus


def conlleval(tags):
    """Spans as the script of CoNLL-2000 finds them, by its rules for an end and a start between two words."""
    found, start = set(), 0
    parts = [("O", ""), *((tag[0], tag[2:]) for tag in tags), ("O", "")]
    for place, ((mark, name), (after, next_name)) in enumerate(itertools.pairwise(parts)):
        end = (mark in "BI" and after in "BSO") or mark in "ES" or (mark != "O" and name != next_name)
        begin = after in "BS" or (mark in "ESO" and after in "EI") or (after != "O" and name != next_name)
        if end:
            found.add((start, place, name))
        if begin:
            start = place
    return found


@FEW
@given(st.lists(TYPES, max_size=9))
def test_spans_are_those_of_conlleval(tags):
    found = list(label_scores.spans_of(tags))
    assert set(found) == conlleval(tags)
    assert all(first < stop for first, stop, _ in found)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O", [(1, 3, "PER")]),
        ("I-PER I-PER B-PER", [(0, 2, "PER"), (2, 3, "PER")]),  # IOB1
        ("B-PER I-LOC", [(0, 1, "PER"), (1, 2, "LOC")]),
        ("S-PER B-PER E-PER I-PER", [(0, 1, "PER"), (1, 3, "PER"), (3, 4, "PER")]),
        ("", []),
    ],
)
def test_some_spans(tags, spans):
    assert list(label_scores.spans_of(tags.split())) == spans


def test_precision_and_recall_count_spans_and_labels_that_are_no_spans_have_none():
    labels = ["B-X", "B-Y", "I-X", "O"]
    spans = label_scores.Spans(labels)
    number = {label: place for place, label in enumerate(labels)}
    true, said = ("B-X I-X O B-Y B-X", "B-X I-X O B-X B-X")
    spans.count(*(np.array([number[tag] for tag in tags.split()]) for tags in (true, said)))
    found = spans.measured(spans.seen)
    thirds = pytest.approx(200 / 3)
    assert (found["precision"], found["recall"], found["f1"]) == (thirds, thirds, thirds)
    assert found["types"]["X"] == {"precision": thirds, "recall": 100, "f1": 80}
    assert found["types"]["Y"] == {"precision": 0, "recall": 0, "f1": 0}
    for others in (["NOUN", "O"], ["A-X", "O"], ["O", "P"]):
        plain = label_scores.Spans(others)
        plain.count(np.zeros(2, np.int64), np.ones(2, np.int64))
        assert plain.measured(plain.seen) == {}


@pytest.fixture(scope="module", params=["tags", "classes"])
def measured(request, tmp_path_factory):
    """A corpus, an Evaluation of a small model that has learnt nothing, and its parameters."""
    folder, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(4)
    lines = [["".join(rng.choice([*"abc"], 2)) for _ in range(rng.integers(1, 7))] for _ in range(40)]
    tag = lambda word: "O" if word[0] == "a" else f"{MARKS[word[0] == 'b']}-{word[1].upper()}"
    if request.param == "tags":
        text, drawing = "\n".join("".join(f"{word}\t{tag(word)}\n" for word in line) for line in lines), Tagging(1)
    else:
        text, drawing = "".join(f"{line[0][0]}\t{' '.join(line)}\n" for line in lines), Classing(1)
    (folder / "train").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "flush", lambda path: None)
        corpus = make_corpus(folder / "out", drawing, {"train": [folder / "train"]})
    preset = {"tags": "tagger", "classes": "classifier"}[request.param]
    small = ["model.hidden=16", "model.embedding=8", "train.window=40", "train.lanes=6", "train.precision=fp64"]
    config = of_corpus(resolve(preset, None, small), corpus)
    evaluation = Evaluation(MPI.COMM_SELF, corpus, "train", config, np.float64)
    theta = np.zeros(evaluation.model.layout.size)
    evaluation.model.bind(theta)
    evaluation.model.initialise(3)
    theta *= 5  # so that it says this and that
    return corpus, evaluation, theta


def test_a_text_gets_the_same_labels_alone_and_in_any_batch(measured):
    corpus, evaluation, theta = measured
    classes = corpus.content == "classes"
    lines = [corpus.tokenizer.decode(tokens).decode() for tokens, _ in records(corpus)] + [""]
    encode = (lambda *both: [labelling.text_of(*both)]) if classes else labelling.words_of
    texts = [encode(corpus.tokenizer, line) for line in lines]
    said = {}
    for lanes in (1, 7):
        model = type(evaluation.model)(evaluation.model.layout, 40, lanes, theta=theta, training=False)
        said[lanes] = labelling.say_labels(MPI.COMM_SELF, model, corpus.labels, texts)
    assert said[1] == said[7]
    assert said[1][-1] == ([], [])
    for (labels, values), words in zip(said[1][:-1], texts[:-1], strict=True):
        assert len(labels) == (1 if classes else len(words))
        assert len(values) == (len(corpus.labels) if classes else len(words))
        assert not classes or sum(values) == pytest.approx(1)


def test_measures_are_those_of_labels_one_by_one(measured):
    corpus, evaluation, theta = measured
    found, classes = evaluation.run(theta, whole=True), corpus.content == "classes"
    model = type(evaluation.model)(evaluation.model.layout, 40, 1, theta=theta, training=False)
    true, said, spans = [], [], np.zeros(3, int)
    for tokens, labels in records(corpus):
        parts = np.split(np.array(tokens), [place for place, label in enumerate(labels) if label and place])
        ((given, _),) = labelling.say_labels(MPI.COMM_SELF, model, corpus.labels, [[np.array(tokens)] if classes else parts])
        wanted = [label for label in labels if label]
        true, said = true + wanted, said + given
        there, told = conlleval(wanted), conlleval(given)
        spans += [len(there & told), len(told), len(there)]
    right = np.mean([one == other for one, other in zip(true, said, strict=True)])
    assert 0 < right < 1
    assert found["labels"] == len(true)
    assert found["accuracy"] == pytest.approx(100 * right)
    both = list(zip(true, said, strict=True))
    assert found["confusion"] == [[both.count((one, other)) for other in corpus.labels] for one in corpus.labels]
    f1 = [2 * sum(one == other == label for one, other in zip(true, said, strict=True)) / ((true + said).count(label))
          for label in set(true + said)]  # fmt: skip
    assert found["macro_f1"] == pytest.approx(100 * np.mean(f1))
    assert ("precision" in found) != classes
    if not classes:
        assert found["precision"] == pytest.approx(100 * spans[0] / max(1, spans[1]))
        assert found["recall"] == pytest.approx(100 * spans[0] / spans[2])


def test_the_mask_of_a_lane_that_has_nothing_is_no_label(measured):
    """More lanes than records of a window: nothing is counted of the others."""
    _, evaluation, theta = measured
    total = sum(evaluation.schedule.tokens(place) for place in evaluation.schedule.places)
    assert evaluation.run(theta)["labels"] == total


def test_a_model_that_says_no_labels_is_refused():
    for kind, labels, count, message in (
        ("lm", (), 0, "x is a model of kind lm: a tagger or a classifier of text says labels"),
        ("tagger", ("a", "b"), 3, "x has 3 labels, and its tokenizer.json names 2"),
    ):
        model = types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(labels=labels), config=types.SimpleNamespace(kind=kind, labels=count, features=0)
        )
        with pytest.raises(UserError, match=message):
            labelling.labels_of(model, "x")


def test_what_predict_writes():
    said = [(["A", "B"], [0.5, 0.75]), ([], [])]
    assert predict.as_text(["ab  c", ""], said, False) == "ab\tA\nc\tB\n\n\n"
    assert predict.as_json(["ab  c", ""], said, "AB", False).splitlines() == [
        '{"words": ["ab", "c"], "tags": ["A", "B"], "probabilities": [0.5, 0.75]}',
        '{"words": [], "tags": [], "probabilities": []}',
    ]
    said = [(["B"], [0.25, 0.75]), ([], [])]
    assert predict.as_text(["ab", ""], said, True) == "B\t0.7500\n\t\n"
    assert predict.as_json(["ab", ""], said, "AB", True).splitlines() == [
        '{"label": "B", "probabilities": {"A": 0.25, "B": 0.75}}', '{"label": null, "probabilities": {}}'
    ]  # fmt: skip
