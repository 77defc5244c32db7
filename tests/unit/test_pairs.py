"""Pairs of texts: their tokens, how lanes hold them, the losses and likeliest targets of each."""

import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.launch import write_pairs
from helpers.numerics import reference
from helpers.pair_corpus import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm import prepare
from dllm.config import ModelConfig
from dllm.data import drawing, lines, pair_order, pairs
from dllm.data.tokenizer_files import tokenizer_hash
from dllm.data.tokenizers import KINDS, load
from dllm.errors import UserError
from dllm.inference import answering
from dllm.inference.answering import Answering
from dllm.inference.generation import DecoderStreams, source_prompt
from dllm.inference.search import GREEDY, Beam, search
from dllm.kernels.gemm import aligned
from dllm.model.decoder import Decoder
from dllm.model.language_model import LanguageModel
from dllm.model.layout import Layout

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TEXTS = st.text("ab <>sepnd/ß宋\t", max_size=12)


def built(kind, text):
    cls = KINDS[kind]
    tokenizer = cls.build(cls.count(text), 300 if kind == "bpe" else 0)
    tokenizer.pairs = True
    return tokenizer


# tokens


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mel"])  # frames are no text
def test_no_text_is_encoded_as_what_stands_between_and_behind_the_sides(kind):
    text = b"<sep> <end> </s> a\tb <unk> sep end \x00"
    tokenizer = built(kind, text)
    plain = KINDS[kind].from_json({name: value for name, value in tokenizer.to_json().items() if name != "pairs"})
    assert (plain.sep, plain.end) == (None, None)
    assert (tokenizer.sep, tokenizer.end, tokenizer.size) == (plain.size, plain.size + 1, plain.size + 2)
    tokens = tokenizer.encode(text, False)
    np.testing.assert_array_equal(tokens, plain.encode(text, False))
    assert tokens.max() < tokenizer.sep
    assert tokenizer.decode(tokens) == plain.decode(tokens)
    again = load(json.loads(json.dumps(tokenizer.to_json())), "tokenizer.json")
    assert (again.sep, again.end, again.size) == (tokenizer.sep, tokenizer.end, tokenizer.size)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer) != tokenizer_hash(plain)
    shown = tokenizer.decode([*tokens, tokenizer.sep, *tokens, tokenizer.end])
    assert shown == plain.decode(tokens) + b"\t" + plain.decode(tokens) + b"\n"


@FEW
@given(st.binary(max_size=40))
def test_lines_are_those_between_newlines(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(data)
    expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[: None if data and not data.endswith(b"\n") else -1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines.text, "PIECE", 7)
        found = lines.Lines(path)
    assert [found[number] for number in range(len(found))] == [line.removesuffix(b"\r") for line in expected]


EXAMPLES = [(f"q{number}" * (1 + number % 3), "ß" * (number % 5 + 1) + str(number)) for number in range(60)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mel"])  # frames are no text
def test_a_stream_has_every_pair_once_in_an_order_drawn_by_the_seed(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", 7)
    monkeypatch.setattr(drawing.text, "SHARD", 200)
    tokenizer = built(kind, " ".join(map(" ".join, EXAMPLES)).encode())
    files = [write_pairs(tmp_path, EXAMPLES[:40], "a"), write_pairs(tmp_path, EXAMPLES[40:], "b")]
    streams = []
    for seed in (1, 1, 2):
        blocks = list(itertools.chain.from_iterable(pairs.plan_pairs(files, pairs.Pairing(seed))))
        assert len(pairs.plan_pairs(files, pairs.Pairing(seed))) > 2
        streams.append(np.concatenate([block.encode(tokenizer)[0] for block in blocks]))
        assert streams[-1][0] == streams[-1][-1] == tokenizer.end
    text = [[part.strip() for part in line.split("\t")] for line in tokenizer.decode(streams[0]).decode().split("\n")[1:-1]]
    assert sorted(map(tuple, text)) == sorted(EXAMPLES)
    np.testing.assert_array_equal(streams[0], streams[1])
    assert len(streams[0]) == len(streams[2])
    assert (streams[0] != streams[2]).any()


def test_marks_and_ends_of_lines_of_other_systems_are_no_part_of_a_pair(tmp_path):
    (tmp_path / "s").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfc\nd")
    files = pairs.PairFiles(tmp_path / "s", tmp_path / "t")
    assert [files[line] for line in range(len(files))] == [(b"a", b"c"), (b"b", b"d")]
    (tmp_path / "u").write_bytes("\ufeffa\nb\n".encode("utf-16-be"))
    with pytest.raises(UserError, match="u begins with the byte-order mark of UTF-16"):
        pairs.PairFiles(tmp_path / "u", tmp_path / "u").apply(bytes.decode, 0)
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf")
    assert lines.Lines(tmp_path / "mark")[0] == b""


HELD_OUT = {"valid": 0.2, "test": 0.1}


@pytest.mark.parametrize("held_out", [{}, HELD_OUT])
@pytest.mark.parametrize("longest", [0, 8])
def test_what_is_said_of_pairs_goes_back_to_the_lines_of_their_files(tmp_path, held_out, longest, monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", 7)
    monkeypatch.setattr(drawing.text, "SHARD", 200)
    examples = [*EXAMPLES[:20], ("", "x"), *EXAMPLES[20:50], ("y", " "), *EXAMPLES[50:]]
    files = [write_pairs(tmp_path, examples[:33], "a"), write_pairs(tmp_path, examples[33:], "b")]
    tokenizer, pairing, seen = (
        built("char", " ".join(map(" ".join, EXAMPLES)).encode()),
        pairs.Pairing(3, longest, held_out),
        [],
    )
    for split in ("train", *held_out):
        shards = pairs.plan_pairs(files, pairing, split=split)
        encoded = [piece.encode(tokenizer) for shard in shards for piece in shard]
        stream = tokenizer.decode(np.concatenate([one.tokens for one in encoded])).decode()
        targets = [line.split("\t")[1] for line in stream.split("\n")[1:-1]]
        entry = pairs.order_of_split(shards, [one.left_out for one in encoded], pairing, split) | {"pairs": len(targets)}
        entry = json.loads(json.dumps(entry))
        lines, order = pair_order.lines_of(entry, "here"), entry["order"]
        assert [examples[line][1] for line in lines] == targets
        whole = pair_order.in_order_of_lines(targets, lines, True, order["lines"])
        fits = [source and target.strip() and not 0 < longest < len(source) + len(target) + 2 for source, target in examples]
        if not held_out:
            assert whole == [target if fit else "" for (_, target), fit in zip(examples, fits, strict=True)]
        part = pair_order.in_order_of_lines(targets, lines, False, order["lines"])
        assert part == [text for text in whole if text]
        seen += lines.tolist()
    assert sorted(seen) == [line for line, fit in enumerate(fits) if fit]


@pytest.mark.parametrize(("share", "empty"), [(0.01, "valid"), (0.999, "train")])
def test_a_share_of_no_pairs_is_refused(tmp_path, share, empty):
    files, pairing = [write_pairs(tmp_path, EXAMPLES[:20], "a")], pairs.Pairing(1, 0, {"valid": share})
    with pytest.raises(UserError, match=f"the {empty} share of 20 pairs is none: it takes more pairs, or another fraction"):
        pairs.plan_pairs(files, pairing, split=empty)


@pytest.mark.parametrize("of", [["--train", "t"], ["--pairs", "s", "t"]])
def test_shares_that_leave_nothing_are_refused(of):
    words = [*of, "--valid-fraction", "0.5", "--tokenizer", "char", "--out", "o", "--test-fraction"]
    with pytest.raises(UserError, match="leave nothing to train: they must add up to less than 1"):
        prepare.arguments([*words, "0.5"])
    assert prepare.arguments([*words, "0.4"])[0].test_fraction == 0.4


DAMAGED_ORDERS = [
    {"seed": 4}, {"seed": "x"}, {"lines": 99}, {"lines": 1 << 60}, {"empty": [1]}, {"empty": [-1]}, {"long": [10**9]},
    {"long": 3}, {"stop": 7}, {"check": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED_ORDERS)
def test_an_order_that_is_damaged_is_refused(change):
    entry = pair_order.described(3, 60, [2], (0, 59), [5]) | {"pairs": 58}
    assert len(pair_order.lines_of(entry, "here")) == 58
    with pytest.raises(UserError, match="the order of pairs in here is damaged; prepare the data anew"):
        pair_order.lines_of({"pairs": 58, "order": entry["order"] | change}, "here")
    assert pair_order.lines_of({"pairs": 58}, "here") is None


def test_the_lines_are_those_of_the_whole_files_without_the_empty_ones():
    for empty in ([], [0], [7, 3, 3, 19], list(range(1, 20))):
        pairs_of = np.delete(np.arange(20), empty)
        stop = len(pairs_of)
        entry = pair_order.described(2, 20, empty, (0, stop), [0][: stop - 1])
        expected = pairs_of[np.random.default_rng(2).permutation(stop)][min(1, stop - 1) :]
        np.testing.assert_array_equal(pair_order.lines_of(entry | {"pairs": len(expected)}, "here"), expected)


@pytest.mark.parametrize("change", [{}, {"long": [1]}, {"start": 9, "stop": 69}, {"start": 1 << 27, "stop": (1 << 27) + 60}])
def test_a_few_pairs_of_endless_files_take_no_memory(change, monkeypatch):
    monkeypatch.setattr(pair_order, "drawn", lambda seed, pairs: pytest.fail(f"{pairs} are drawn"))
    order = {"seed": 1, "lines": 1 << 28, "start": 0, "stop": 60, "empty": [], "long": [], "check": 0}
    with pytest.raises(UserError, match="the order of pairs in here is damaged"):
        pair_order.lines_of({"pairs": 60, "order": order | change}, "here")


# losses and targets


@pytest.fixture(scope="module")
def model():
    """A model in float64 with weights that matter, for at most 7 lanes in windows of 5."""
    config = ModelConfig(embedding=9, hidden=13, layers=2, init=1.2, init_output=1.2)
    layout = Layout(config, 12, np.float64)
    model = LanguageModel(layout, 5, 7, theta=aligned((layout.size,), np.float64), training=False)
    model.initialise(3)
    return model


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(5)
    side = lambda: rng.integers(0, 10, rng.integers(1, 9)).tolist()
    return [(side(), side()) for _ in range(40)]


def plain_loss(model, tokenizer, source, target):
    """-log p of a target and its <end>."""
    row = np.array([tokenizer.end, *source, tokenizer.sep, *target, tokenizer.end])
    logits = reference(model, row[:-1, None])[0][len(source) + 1 :, 0]
    return (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), row[len(source) + 2 :]]).sum()


def test_the_loss_of_a_batch_is_that_of_each_target_by_itself(tmp_path, model, examples):
    tokenizer = make_corpus(tmp_path, examples).tokenizer
    losses = [answering.pair_losses(model, tokenizer, examples[start : start + 7]) for start in range(0, 40, 7)]
    expected = [plain_loss(model, tokenizer, *pair) for pair in examples]
    np.testing.assert_allclose(np.concatenate(losses), expected, rtol=1e-10)
    for pair, loss in zip(examples, np.concatenate(losses), strict=True):
        assert answering.pair_losses(model, tokenizer, [pair]) == [loss]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, examples):
    tokenizer = make_corpus(tmp_path_factory.mktemp("prompts"), examples).tokenizer
    return [source_prompt(tokenizer, np.array(source)) for source, _ in examples]


@pytest.fixture(scope="module")
def sources(examples):
    return [np.array(source) for source, _ in examples]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, examples):
    return make_corpus(tmp_path_factory.mktemp("tokenizer"), examples).tokenizer


def answered(decoder, tokenizer, sources, beam=GREEDY, stop=None):
    """The best answer to each source, of 9 tokens at most."""
    return [best for (best,) in search(DecoderStreams(decoder, tokenizer), sources, 9, beam, stop)]


@pytest.fixture(scope="module")
def stop(model, tokenizer, sources):
    """A token that the model says early, late and never: where answers end."""
    freely = [found.tokens for found in answered(Decoder(model, 40), tokenizer, sources)]
    return max(range(12), key=lambda token: len({found.index(token) for found in freely if token in found}))


def test_each_token_of_an_answer_is_the_likeliest(model, tokenizer, sources, prompts, stop):
    answers = [found.tokens for found in answered(Decoder(model, 40), tokenizer, sources, stop=stop)]
    assert len({tuple(found) for found in answers}) > 5
    assert len({len(found) for found in answers}) > 2
    for prompt, found in zip(prompts, answers, strict=True):
        said = [*found, *[stop] * (len(found) < 9)]
        logits, _, _ = reference(model, np.array([*prompt, *said[:-1]])[:, None])
        assert logits[len(prompt) - 1 :, 0].argmax(axis=1).tolist() == said


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_answers_and_losses_are_the_same_in_any_batch_to_the_bit(model, tokenizer, examples, sources, stop, dtype):
    """Greedy and beam answers, log-probabilities, states and losses: random batches and windows against single pairs."""
    rng, layout = np.random.default_rng(9), Layout(model.config, 12, dtype)
    theta = aligned((layout.size,), dtype)
    layout.unpack(model.layout.pack(model.theta).astype(dtype), theta)

    def outcome(numbers, window):
        """What each of these pairs gets."""
        model = LanguageModel(layout, window, len(numbers), theta=theta, training=False)
        decoder, asked = Decoder(model, 3 * len(numbers)), [sources[number] for number in numbers]
        found = [
            answered(decoder, tokenizer, asked, stop=stop),
            answered(decoder, tokenizer, asked, Beam(width=3, length_penalty=0), stop),
            answered(decoder, tokenizer, asked, Beam(width=3, length_penalty=3), stop),
            answering.pair_losses(model, tokenizer, [examples[number] for number in numbers]),
        ]
        return list(zip(*found, strict=True))

    alone = [outcome([number], 5)[0] for number in range(40)]
    assert len({len(found.tokens) for *_, found, _ in alone}) > 1
    for _ in range(12):
        batch = rng.permutation(40)[: rng.integers(2, 13)]
        assert outcome(batch, int(rng.integers(1, 12))) == [alone[number] for number in batch]


def test_an_answer_ends_before_its_end_token_and_more_beams_find_no_worse(model, tokenizer, sources):
    decoder = Decoder(model, 160)
    one, more = (answered(decoder, tokenizer, sources, Beam(width=width), tokenizer.end) for width in (1, 4))
    assert one != more
    assert all(tokenizer.end not in found.tokens for found in one + more)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 7])
def test_pairs_are_solved_alike_in_any_batches_by_any_number_of_ranks(model, tokenizer, examples, ranks, lanes, monkeypatch):
    pairs = [answering.Pair(np.array(source), np.array(target), "") for source, target in examples]
    comm = lambda rank, size: SimpleNamespace(rank=rank, size=size)
    how = lambda lanes: Answering(tokenizer=tokenizer, lanes=lanes, limit=9)
    alone = [answering.solve(comm(0, 1), model, how(1), [pair]) for pair in pairs]
    told = []

    def say(comm, mine, kind):
        told.append(mine)
        if len(told) < comm.size:
            raise StopIteration
        return told

    monkeypatch.setattr(answering, "together", lambda comm: nullcontext())
    monkeypatch.setattr(answering, "allgather", say)
    for rank in range(ranks - 1):
        with pytest.raises(StopIteration):
            answering.solve(comm(rank, ranks), model, how(lanes), pairs)
    texts, losses = answering.solve(comm(ranks - 1, ranks), model, how(lanes), pairs)
    assert texts == [text for (text,), _ in alone]
    assert losses.tolist() == [loss for _, (loss,) in alone]


def test_a_model_that_is_not_finite_gives_no_answer(model, tokenizer):
    broken = LanguageModel(model.layout, 5, 7, theta=np.full_like(model.theta, np.nan), training=False)
    with pytest.raises(UserError, match="not finite"):
        answered(Decoder(broken, 1), tokenizer, [np.array([1])])


def test_the_first_pairs_of_a_split_are_read_alone(tmp_path, examples):
    corpus = make_corpus(tmp_path, examples)
    found = [(source.tolist(), target.tolist()) for source, target, *_ in answering.read_split(corpus, "train")]
    assert found == examples
    for most in (1, 3, 40):
        some = answering.read_split(corpus, "train", most)
        assert [(source.tolist(), target.tolist()) for source, target, *_ in some] == examples[:most]
