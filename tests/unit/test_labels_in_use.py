"""Models of labels, sound and pairs in use: memory, white space, letters that a terminal lacks, options without effect."""

import argparse
import gc
import io
import json
import threading
import tracemalloc

import numpy as np
import pytest
from helpers.model_kinds import SHAPES, configured

from dllm import config, generate
from dllm.data.tokenizers import ByteTokenizer
from dllm.errors import UserError
from dllm.inference import labelling, source_files
from dllm.inference.drawing_options import sampling_of
from dllm.kernels.team import Team
from dllm.model.batch import Batch
from dllm.model.kinds import make_model
from dllm.model.layout import Layout
from dllm.tools import predict
from dllm.training import warmup

LONG = {"seq2seq, both ways": 1, "seq2seq, copying": 1, "classifier, max": 1, "classifier, mean": 1, "tagger": 1, "ctc": 0.7}


@pytest.mark.parametrize("shape", LONG)
def test_memory_is_foreseen_as_it_is_taken(shape):
    """Beside parameters: what is made and what a window of full lanes takes, by the allocator's own count."""
    settings, T, B = configured(shape, hidden=64, embedding=48), 160, 16
    layout = Layout(settings, 300, np.float32)
    theta = np.zeros(layout.size, np.float32)
    inputs = np.ones((T, B), np.int64) if not settings.features else np.ones((T, B, settings.features), np.float32)
    steps = 1 if settings.kind == "classifier" else 20 if settings.kind == "ctc" else T
    targets = np.ones((steps, B), np.int64)
    targets[0, 0] = -1 if settings.kind == "tagger" else 1
    batch = Batch(inputs, targets, np.full(B, T), targets if settings.kind == "seq2seq" else None)
    nothing = np.zeros((0, B, 64), np.float32)

    def measure(model):
        model.bind(theta)
        model.forward(batch, nothing, nothing)
        return model.logits() if settings.kind in ("tagger", "classifier") else None

    measure(make_model(layout, T, B, training=False))  # what is compiled does not count
    tracemalloc.start()
    try:
        model = make_model(layout, T, B, training=False)
        foreseen, _ = model.memory, measure(model)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.85 * LONG[shape] * taken <= foreseen <= 1.3 * taken, (foreseen / taken, taken)


def test_threads_of_a_model_end_with_it():
    """Its team's, and those by which each direction has its own."""
    before = set(threading.enumerate())
    model = make_model(Layout(configured("tagger"), 30, np.float32), 8, 2, training=False, team=Team(4))
    model.bind(np.zeros(model.layout.size, np.float32))
    model.forward(model.example(), *np.zeros((2, 0, 1, 16), np.float32))
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3 + 1 + 2  # of four, of the two directions, and of two teams of two
    del model
    gc.collect()
    for thread in mine:
        thread.join(5)
        assert not thread.is_alive()


def test_nothing_is_taken_before_memory_is_refused():
    settings = configured("seq2seq, both ways")
    with pytest.raises(UserError, match=r"^windows of 1,048,576 tokens in 64 lanes take [\d,]+ MB; this machine's memory has"):
        make_model(Layout(settings, 30, np.float32), 1 << 20, 64, training=False)
    with pytest.raises(UserError, match=r"^windows of 1,048,576 frames in 64 lanes"):
        make_model(Layout(configured("ctc"), 30, np.float32), 1 << 20, 64, training=False)


def test_one_long_sentence_takes_lanes_and_a_longer_one_is_refused():
    sentence = lambda *lengths: [np.zeros(length, np.int64) for length in lengths]
    assert predict.windows_of([sentence(3, 4), []], 512, "x") == (7, 32)
    assert predict.windows_of([[]], 512, "x") == (1, 32)
    assert predict.windows_of([sentence(3), sentence(4000, 96)], 512, "x") == (4096, 4)
    assert predict.windows_of([sentence(32 * 512)], 512, "x") == (32 * 512, 1)
    with pytest.raises(UserError, match=r"^x line 2 has 16,385 tokens, which is no sentence: at most 16,384 are read at once$"):
        predict.windows_of([[], sentence(32 * 512, 1)], 512, "x")


def test_white_space_is_that_of_prepare():
    """Which knows that of ASCII alone: other spaces may be part of a word, as in numbers of French."""
    tokenizer = ByteTokenizer()
    line = " 10\u00a0000 \u3000\t"
    assert labelling.words_in(line) == ["10\u00a0000", "\u3000"]
    assert [bytes(tokens.astype(np.uint8)) for tokens in labelling.words_of(tokenizer, line)] == [
        "10\u00a0000".encode(), " \u3000".encode(),
    ]  # fmt: skip
    assert bytes(labelling.text_of(tokenizer, line).astype(np.uint8)) == "10\u00a0000 \u3000".encode()
    assert predict.as_text([line], [(["NUM", "X"], [1, 1])], False) == "10\u00a0000\tNUM\n\u3000\tX\n\n"
    assert len(source_files.tokens_of(tokenizer, ["\u3000", " "], "x", 0, print)[0]) == 3


def test_json_has_escapes_where_a_terminal_lacks_letters(monkeypatch):
    for ascii_only in (True, False):
        shown = predict.as_json(["\U0001f600 a"], [(["X", "Y"], [0.5, 0.5])], ["X", "Y"], False, ascii_only)
        assert (json.loads(shown)["words"], shown.isascii()) == (["\U0001f600", "a"], ascii_only)
    for encoding, out, ascii_only in (("ascii", None, True), ("utf-8", None, False), ("ascii", "x", False)):  # a file is UTF-8
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert predict._ascii(argparse.Namespace(out=out)) == ascii_only


OPTIONS = {
    "--source-file f --top-k 3": "--source-file takes the likeliest texts and draws none: leave out --top-k",
    "--source-file f --seed 1": "--source-file takes the likeliest texts and draws none: leave out --seed",
    "--source-file - --top-p 0.9": "--source-file takes the likeliest texts and draws none: leave out --top-p",
    "--source-file f --temperature 0.5": "--source-file takes the likeliest texts and draws none: leave out --temperature",
    "--beam 3 --seed 2": "--beam takes the likeliest texts and draws none: leave out --seed",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_options_of_drawing_are_refused_where_nothing_is_drawn(words):
    with pytest.raises(UserError) as error:
        generate._options(["x", *words.split()])
    assert str(error.value).startswith(OPTIONS[words])
    assert generate._options(["x", "--source-file", "f", "--temperature", "0"]).top_k is None
    assert sampling_of(generate._options(["x", "--seed", "7"]), ByteTokenizer(), 0.3).seed == 7


@pytest.mark.parametrize("shape", [*SHAPES, "lm"])
def test_the_model_of_a_warm_up_is_tied_where_the_real_one_is(shape):
    for tied in (False, True):
        model = configured(shape) if shape != "lm" else config.ModelConfig(hidden=16, embedding=16)
        if tied and model.kind not in ("lm", "bilm", "seq2seq"):
            continue
        width = {"embedding": 16, "projection": 0} if tied else {}
        if model.kind == "seq2seq" and tied:
            width = {"embedding": 9, "projection": model.projection and 9}
        asked = config.from_dict({"model": {**vars(model), "tied": tied, **width}, "train": {}})
        small = warmup._model(asked, np.float32)
        assert small.config.tied == tied
        small.bind(np.zeros(small.layout.size, np.float32))
        small.forward(small.example(), *np.zeros((2, small.layout.carried, 1, small.config.hidden), np.float32))
