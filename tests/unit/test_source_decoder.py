"""Targets of sources step by step against the model's window, and searches for them in any company."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.numerics import DTYPES

from dllm.config import ModelConfig
from dllm.data.tokenizers import KINDS as TOKENIZERS
from dllm.errors import UserError
from dllm.inference import answering, source_files
from dllm.inference.answering import Answering
from dllm.inference.search import Beam
from dllm.kernels.gemm import aligned
from dllm.kernels.team import Team
from dllm.model.kinds import make_model
from dllm.model.layout import Layout
from dllm.model.source_decoder import SourceDecoder

SHAPES = {
    "one direction": {},
    "both, two layers": {"bidirectional": True, "layers": 2},
    "both, three layers, dot": {"bidirectional": False, "layers": 3, "attention": "dot", "encoder_layers": 2},
    "tied": {"bidirectional": True, "layers": 2, "tied": True},
    "copying": {"bidirectional": True, "layers": 2, "copy": True},
}
V, WINDOW = 12, 9
COMM = SimpleNamespace(rank=0, size=1)


@pytest.fixture(scope="module")
def tokenizer():
    """Words a to i and <unk>."""
    found = TOKENIZERS["word"](["<unk>", *"abcdefghi"])
    found.pairs = True
    return found


def build(shape="both, two layers", dtype=np.float64, lanes=8, team=None):
    config = ModelConfig(**{"kind": "seq2seq", "embedding": 6, "hidden": 16, "init": 0.8, "init_output": 0.9} | SHAPES[shape])
    layout = Layout(config, V, dtype)
    model = make_model(layout, WINDOW, lanes, theta=aligned((layout.size,), dtype), training=False, team=team)
    model.initialise(4)
    return model


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(2)
    side = lambda most: rng.integers(0, V - 2, rng.integers(1, most))
    return [answering.Pair(side(10), side(9), "") for _ in range(30)]


@pytest.mark.parametrize("shape", SHAPES)
@DTYPES
def test_steps_have_the_losses_of_the_window(shape, dtype, tokenizer, pairs):
    model = build(shape, dtype)
    expected = answering.pair_losses(model, tokenizer, pairs[:8])
    found = answering.decoded_pair_losses(SourceDecoder(model, 8, tokenizer.sep), tokenizer, pairs[:8])
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # logits are drawn from in float32


def test_the_loss_of_a_target_is_its_own_in_any_batch(tokenizer, pairs):
    model = build(dtype=np.float32)
    alone = [answering.pair_losses(model, tokenizer, [pair])[0] for pair in pairs]
    together = [answering.pair_losses(model, tokenizer, pairs[start : start + 8]) for start in range(0, 30, 8)]
    assert np.concatenate(together).tolist() == alone


@pytest.mark.parametrize("shape", ["both, two layers", "copying"])
@DTYPES
def test_what_is_found_does_not_depend_on_the_batch_or_the_threads_to_the_bit(shape, dtype, tokenizer, pairs):
    beam = Beam(width=4, coverage=0.3, best=3)
    how = Answering(tokenizer=tokenizer, lanes=8, limit=WINDOW, beam=beam)
    sources, rng = [pair.source for pair in pairs], np.random.default_rng(6)
    decoder = SourceDecoder(build(shape, dtype), 32, tokenizer.sep)
    alone = [how.search(decoder, [source])[0] for source in sources]
    assert len({tuple(found[0].tokens) for found in alone}) > 5
    for threads in (1, 2, 3):
        some = SourceDecoder(build(shape, dtype, team=Team(threads)), 32, tokenizer.sep)
        for _ in range(3):
            numbers = rng.permutation(30)[: rng.integers(2, 9)]
            assert how.search(some, [sources[number] for number in numbers]) == [alone[number] for number in numbers]


def test_one_beam_is_the_likeliest_token_each_time_and_scores_are_those_of_the_window(tokenizer, pairs):
    model = build(lanes=V)
    decoder = SourceDecoder(model, 5 * V, tokenizer.sep)
    for source, *_ in pairs[:8]:
        (best,) = Answering(tokenizer=tokenizer, lanes=1, limit=6).search(decoder, [source])[0]
        for at, token in enumerate(best.tokens):
            lanes = [(source, np.array([*best.tokens[:at], other]), "") for other in range(V)]
            batch = answering._as_batch(tokenizer, lanes)
            losses = model.forward(batch, *np.zeros((2, 0, V, 16)))[at].copy()
            losses[[tokenizer.unknown, tokenizer.sep]] = np.inf
            assert losses.argmin() == token
        wide = Answering(tokenizer=tokenizer, lanes=1, limit=6, beam=Beam(width=5, best=5, least=2)).search(decoder, [source])[
            0
        ]
        assert all(len(one.tokens) >= 2 and not {tokenizer.unknown, tokenizer.sep} & {*one.tokens} for one in wide)
        whole = [one for one in wide if one.ended]
        assert whole
        expected = [answering.pair_losses(model, tokenizer, [(source, np.array(one.tokens), "")])[0] for one in whole]
        np.testing.assert_allclose([-one.logprob for one in whole], expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_are_near(precision, tokenizer, pairs):
    model = build(dtype=np.float32)
    plain = answering.pair_losses(model, tokenizer, pairs[:8])
    found = answering.decoded_pair_losses(SourceDecoder(model, 8, tokenizer.sep, precision), tokenizer, pairs[:8])
    np.testing.assert_allclose(found, plain, rtol=0.1)


def test_an_unknown_word_is_never_said_or_that_of_the_source(tokenizer, pairs):
    model = build()
    W = model.layout.read(model.theta, "output.bias")
    W[tokenizer.unknown] += 30  # it says nothing else
    model.layout.write(model.theta, "output.bias", W)
    lines = ["Anna b Otto", "d"]
    sources = source_files.tokens_of(tokenizer, lines, "f", 0, print)
    never, replaced = (
        source_files.translate(
            COMM, model, Answering(tokenizer=tokenizer, lanes=2, limit=4, replace=replace), lines, sources, print
        )
        for replace in (False, True)
    )
    assert not any("<unk>" in found[0].text or "Anna" in found[0].text for found in never)
    assert {*replaced[0][0].text.split()} <= {"Anna", "b", "Otto"}
    assert replaced[1][0].text == "d d d d"


def test_a_file_is_answered_in_order(tmp_path, tokenizer, pairs):
    model, told = build(), []
    text = ["".join(f"{'abcdefghi'[token % 9]} " for token in source) for source, *_ in pairs]
    text[3:3] = ["", "  "]
    (tmp_path / "f").write_bytes("\r\n".join(text).encode())
    lines = source_files.read_lines(COMM, str(tmp_path / "f"))
    assert lines == text
    sources = source_files.tokens_of(tokenizer, lines, "f", 5, told.append)
    long = [number for number, line in enumerate(lines, 1) if len(line.split()) > 5]
    assert told == [
        f"{len(long)} of 32 lines are longer than the model's window, the first is line {long[0]}: "
        "their first 5 tokens are read, the rest is left out"
    ]
    how = Answering(tokenizer=tokenizer, lanes=4, limit=6, beam=Beam(width=3, best=2))
    targets = source_files.translate(COMM, model, how, lines, sources, told.append)
    decoder = SourceDecoder(model, 3, tokenizer.sep)
    for source, found in zip(sources, targets, strict=True):
        expected = how.search(decoder, [source])[0] if len(source) else []
        assert [(how.text(one), one.score, one.logprob) for one in expected] == found
    plain = source_files.as_lines(targets, False).split("\n")
    assert plain == [found[0].text if found else "" for found in targets] + [""]
    objects = [json.loads(line) for line in source_files.as_lines(targets, True).splitlines()]
    assert [one["line"] for one in objects] == sorted([*range(1, 33), *(set(range(1, 33)) - {4, 5})])
    assert [one for one in objects if one["line"] == 4] == [{"line": 4, "text": "", "score": None, "logprob": None}]


def test_standard_input_is_read_as_a_file_is(monkeypatch):
    read = lambda data: monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    read("\ufeffa b\r\n\nß".encode())
    assert source_files.read_lines(COMM, "-") == ["a b", "", "ß"]
    for data, problem in ((b"", "standard input is empty"), (b"a\n\xff\n", "standard input line 2 is not UTF-8; convert it")):
        read(data)
        with pytest.raises(UserError, match=problem):
            source_files.read_lines(COMM, "-")
    read(b"x" * (source_files.LONGEST_LINE + 1))
    with pytest.raises(UserError, match="standard input line 1 has over 1,048,576 bytes"):
        source_files.read_lines(COMM, "-")


def test_the_alignment_is_what_each_step_looked_at(tokenizer, pairs):
    model, (source, target, *_) = build(), pairs[0]
    found = answering.alignment(model, tokenizer, source, target.tolist())
    model.forward(answering._as_batch(tokenizer, pairs[:1]), *np.zeros((2, 0, 1, 16)))
    np.testing.assert_allclose(found, model.attention.weights[0], rtol=1e-12)


@pytest.mark.parametrize("asked", ["", "xyb"])
def test_letters_are_replaced_by_those_of_the_source_or_stay_unknown(asked):
    tokenizer = TOKENIZERS["char"](["<unk>", *"abcdefghi"])
    tokenizer.pairs = True
    model = build()
    model.layout.write(model.theta, "output.bias", np.where(np.arange(V) == tokenizer.unknown, 30.0, 0.0))
    how = Answering(tokenizer=tokenizer, lanes=1, limit=4, replace=True)
    pair = answering.Pair(tokenizer.encode(b"xyb", False), np.array([1]), "", asked)
    ((text,), _) = answering.solve(COMM, model, how, [pair])
    ((found,),) = how.search(SourceDecoder(model, 1, tokenizer.sep), [pair.source])
    assert text == "".join((asked or ["<unk>", "<unk>", "b"])[place] for place in found.places)
