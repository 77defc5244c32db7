"""Pairs of texts: their tokens, how lanes hold them, that targets alone count, on any number of ranks; a translation learnt."""

import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import REFUSED, complaint, mpirun, train_arguments
from runs import arrays, metrics, same_losses
from serving import Server

from dllm import tasks
from dllm.config import ModelConfig
from dllm.data import pair_lanes, pairs, shards
from dllm.data.lanes import Schedule, deal
from dllm.data.tokenizers import KINDS, load
from dllm.errors import UserError
from dllm.kernels.gemm import aligned
from dllm.layout import Layout
from dllm.model import LanguageModel

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks import translation

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TEXTS = st.text("ab <>sepnd/ß宋\t", max_size=12)


def built(kind, text):
    cls = KINDS[kind]
    tokenizer = cls.build(cls.count(text), 300 if kind == "bpe" else 0)
    tokenizer.pairs = True
    return tokenizer


# tokens


@pytest.mark.parametrize("kind", KINDS)
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
    assert shards.tokenizer_hash(again) == shards.tokenizer_hash(tokenizer) != shards.tokenizer_hash(plain)
    shown = tokenizer.decode([*tokens, tokenizer.sep, *tokens, tokenizer.end])
    assert shown == plain.decode(tokens) + b"\t" + plain.decode(tokens) + b"\n"


@FEW
@given(st.binary(max_size=40))
def test_lines_are_those_between_newlines(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(data)
    expected = data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs.text, "PIECE", 7)
        found = pairs.Lines(path)
    assert [found[number] for number in range(len(found))] == [line.removesuffix(b"\r") for line in expected]


def write_pairs(folder, examples, name="train"):
    """The source and target files of (source, target) strings."""
    paths = []
    for side, suffix in enumerate(("src", "tgt")):
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_bytes("".join(example[side] + "\n" for example in examples).encode())
    return paths


EXAMPLES = [(f"q{number}" * (1 + number % 3), "ß" * (number % 5 + 1) + str(number)) for number in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_every_pair_once_in_an_order_drawn_by_the_seed(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 7)
    monkeypatch.setattr(pairs.text, "SHARD", 200)
    tokenizer = built(kind, " ".join(map(" ".join, EXAMPLES)).encode())
    files = [write_pairs(tmp_path, EXAMPLES[:40], "a"), write_pairs(tmp_path, EXAMPLES[40:], "b")]
    streams = []
    for seed in (1, 1, 2):
        blocks = list(itertools.chain.from_iterable(pairs.plan(files, seed)))
        assert len(pairs.plan(files, seed)) > 2
        streams.append(np.concatenate([block.encode(tokenizer) for block in blocks]))
        assert streams[-1][0] == streams[-1][-1] == tokenizer.end
    text = [[part.strip() for part in line.split("\t")] for line in tokenizer.decode(streams[0]).decode().split("\n")[1:-1]]
    assert sorted(map(tuple, text)) == sorted(EXAMPLES)
    np.testing.assert_array_equal(streams[0], streams[1])
    assert len(streams[0]) == len(streams[2])
    assert (streams[0] != streams[2]).any()


# lanes


def make_corpus(folder, examples, shard_count=3):
    """A corpus of pairs: (source tokens, target tokens) below 10, in several shards."""
    tokenizer = KINDS["char"]([chr(0x4E00 + number) for number in range(10)])
    tokenizer.pairs = True
    entries, start = [], 0
    for number, (first, last) in enumerate(itertools.pairwise(np.linspace(0, len(examples), shard_count + 1).astype(int))):
        stream = [] if number else [tokenizer.end]
        for source, target in examples[first:last]:
            stream += [*source, tokenizer.sep, *target, tokenizer.end]
        path = folder / f"train-{number:05d}.h5"
        with shards.ShardWriter(path, np.uint8) as shard:
            shard.append(np.array(stream))
        entries.append({"name": path.name, "start": start, "stop": start + len(stream), "pairs": int(last - first)})
        entries[-1]["sha256"] = shards.storage.sha256(path)
        start += len(stream)
    longest = max(len(source) + len(target) + 2 for source, target in examples)
    split = {"tokens": start, "bytes": 1, "shards": entries, "pairs": len(examples), "longest": longest}
    shards.save_tokenizer(folder, tokenizer)
    manifest = {"format": shards.FORMAT, "kind": "char", "vocabulary": 12, "dtype": "uint8", "splits": {"train": split}}
    shards.storage.write_json(folder / "manifest.json", manifest | {"tokenizer": shards.tokenizer_hash(tokenizer)})
    return shards.Corpus(folder)


SIDE = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=25), st.data())
def test_a_window_of_a_lane_is_a_pair_each_comes_once_and_targets_alone_are_asked_for(tmp_path_factory, examples, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.storage, "flush", lambda path: None)  # which takes most of the time
        corpus = make_corpus(tmp_path_factory.mktemp("pairs"), examples)
    sep, end = corpus.tokenizer.sep, corpus.tokenizer.end
    count = data.draw(st.integers(1, len(examples)))
    window = corpus.split("train")["longest"] + data.draw(st.integers(0, 3))
    ranks = data.draw(st.integers(1, count + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_lanes, "GROUP", 4)
        patch.setattr(pair_lanes, "ORDER", np.array([2, 0, 3, 1]))
        parts = [pair_lanes.read_lanes(corpus, "train", deal(count, ranks, rank), count, window) for rank in range(ranks)]
        gather = lambda mine: [max(p.steps, default=0) if isinstance(mine, int) else p.shapes(len(mine[0])) for p in parts]
        schedule = Schedule(parts[0], gather=gather)
        assert schedule.windows == -(-len(examples) // count)
        assert schedule.per_epoch == sum(len(target) + 1 for _, target in examples)
        found = [[] for _ in range(count)]
        for number in range(schedule.windows):
            windows = [part.window(number, schedule.width(number)) for part in parts]
            tokens, targets = (np.concatenate([window[part] for window in windows], axis=1) for part in (0, 1))
            assert np.count_nonzero(targets != -1) == schedule.tokens(number)
            widest = 0
            for lane in range(count):
                if (targets[:, lane] == -1).all():
                    continue
                stop = int(np.flatnonzero(targets[:, lane] == end)[0]) + 1
                row, wanted = tokens[:stop, lane].tolist(), targets[:, lane].tolist()
                middle, widest = row.index(sep), max(widest, stop)
                assert row[0] == end
                assert wanted == [-1] * middle + row[middle + 1 :] + [end] + [-1] * (len(wanted) - stop)
                found[lane].append((row[1:middle], row[middle + 1 :]))
            assert schedule.width(number) == widest
    cuts = [len(examples) * lane // count for lane in range(count + 1)]
    for lane, (start, stop) in enumerate(itertools.pairwise(cuts)):
        assert sorted(found[lane]) == sorted((list(source), list(target)) for source, target in examples[start:stop])


def test_the_pairs_of_a_window_are_about_equally_long(tmp_path):
    rng = np.random.default_rng(3)
    corpus = make_corpus(tmp_path, [([1] * rng.integers(1, 40), [2] * rng.integers(1, 40)) for _ in range(2000)])
    reader = pair_lanes.read_lanes(corpus, "train", range(8), 8, 100)
    _, widths = reader.shapes(250)
    assert 8 * widths.sum() < 1.2 * (corpus.split("train")["tokens"] - 1)
    assert np.abs(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.3  # no order of lengths is left


def test_a_window_must_hold_the_longest_pair_and_lanes_need_pairs(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3]), ([4] * 5, [6] * 5)])
    with pytest.raises(UserError, match=r"has a pair of 12 tokens .* --set train.window=12"):
        pair_lanes.read_lanes(corpus, "train", range(1), 1, 11)
    with pytest.raises(UserError, match=r"has 2 pairs: too few for 3 lanes"):
        pair_lanes.read_lanes(corpus, "train", range(3), 3, 20)
    pair_lanes.read_lanes(corpus, "train", range(2), 2, 12)


def test_a_stream_that_is_not_made_of_pairs_is_refused(tmp_path):
    corpus = make_corpus(tmp_path, [([1], [2, 3]), ([4] * 5, [6, 11, 6])])  # 11: an <end> inside a target
    with pytest.raises(UserError, match="is not made of pairs"):
        pair_lanes.read_lanes(corpus, "train", range(1), 1, 30)


# losses and targets


@pytest.fixture(scope="module")
def model():
    """A model in float64 with weights that matter, for at most 7 lanes in windows of 5."""
    config = ModelConfig(embedding=9, hidden=13, layers=2, init=1.2, init_output=1.2)
    theta = aligned((Layout(config, 12, np.float64).size,), np.float64)
    model = LanguageModel(config, 12, np.float64, 5, 7, theta, training=False)
    model.initialise(3)
    return model


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(5)
    side = lambda: rng.integers(0, 10, rng.integers(1, 9)).tolist()
    return [(side(), side()) for _ in range(40)]


def plain_loss(model, tokenizer, source, target):
    """-log p of a target and its <end>, a token at a time."""
    h = np.zeros((2, 1, 13))
    c, loss = np.zeros_like(h), 0.0
    row = [tokenizer.end, *source, tokenizer.sep, *target, tokenizer.end]
    for place, token in enumerate(row[:-1]):
        logits = model.logits(np.array([[token]]), h, c)[0].copy()
        if place > len(source):
            loss -= logits[row[place + 1]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return loss


def test_the_loss_of_a_batch_is_that_of_each_target_by_itself(tmp_path, model, examples):
    tokenizer = make_corpus(tmp_path, examples).tokenizer
    for start in range(0, 40, 7):
        part = examples[start : start + 7]
        expected = [plain_loss(model, tokenizer, *pair) for pair in part]
        np.testing.assert_allclose(tasks.pair_losses(model, tokenizer, part), expected, rtol=1e-10)


def test_targets_do_not_depend_on_the_batch_and_each_token_is_the_likeliest(tmp_path, model, examples):
    tokenizer = make_corpus(tmp_path, examples).tokenizer
    prompts = sorted((tasks.prompt(tokenizer, np.array(source)) for source, _ in examples), key=len, reverse=True)
    freely = [tasks.greedy(model, tokenizer.end, [tokens], 9)[0] for tokens in prompts]
    stop = max(range(12), key=lambda token: len({found.index(token) for found in freely if token in found}))  # comes anywhere
    groups = [prompts[start : start + 7] for start in range(0, 40, 7)]
    together = [found for group in groups for found in tasks.greedy(model, stop, group, 9)]
    assert len({tuple(found) for found in together}) > 5
    assert len({len(found) for found in together}) > 2
    for tokens, found in zip(prompts, together, strict=True):
        assert tasks.greedy(model, stop, [tokens], 9) == [found]
        h = np.zeros((2, 1, 13))
        c = np.zeros_like(h)
        for token in tokens:
            logits = model.logits(np.array([[token]]), h, c)
        for token in [*found, *[stop] * (len(found) < 9)]:
            assert logits.argmax() == token
            logits = model.logits(np.array([[token]]), h, c)


def test_the_first_pairs_of_a_split_are_read_alone(tmp_path, examples):
    corpus = make_corpus(tmp_path, examples)
    found = [(source.tolist(), target.tolist()) for source, target, _ in tasks.read_split(corpus, "train")]
    assert found == examples
    for most in (1, 3, 40):
        some = tasks.read_split(corpus, "train", most)
        assert [(source.tolist(), target.tolist()) for source, target, _ in some] == examples[:most]


# commands


def prepare_arguments(folder, out, *options, kind="word", splits=("train", "valid", "test")):
    arguments = ["-m", "dllm.prepare", "--tokenizer", kind, "--out", out, *options]
    for split in splits:
        name = "--pairs" if split == "train" else f"--{split}-pairs"
        arguments += [name, folder / f"{split}.src", folder / f"{split}.tgt"]
    return arguments


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the files of 300 numbers, and a corpus of them."""
    folder = tmp_path_factory.mktemp("small")
    translation.write(folder, 300, spaced=True)
    mpirun(0, *prepare_arguments(folder, folder / "corpus"), check=True)
    return folder


SMALL = (
    "train.carry=window",
    "train.window=16",
    "train.lanes=10",
    "train.precision=fp64",
    "train.lr=0.01",
    "model.dropout=0.2",
)


@pytest.fixture(scope="module")
def straight(small):
    """70 steps of 3 ranks, and beside it the run `resumed`, 31 steps; an epoch of 10 lanes has 54."""
    commands = [
        train_arguments(small / "corpus", small / name, *SMALL, extra=("--max-steps", str(steps)))[2:]
        for name, steps in (("straight", 70), ("resumed", 31))
    ]
    (small / "commands.json").write_text(json.dumps(commands, default=str))
    mpirun(3, pathlib.Path(__file__).with_name("several.py"), small / "commands.json", check=True)
    return small / "straight"


def test_any_number_of_ranks_prepares_the_same_corpus_of_all_pairs(small, tmp_path):
    mpirun(3, *prepare_arguments(small, tmp_path / "same"), check=True)
    corpora = [shards.Corpus(folder) for folder in (small / "corpus", tmp_path / "same")]
    assert corpora[0].hash == corpora[1].hash
    lines = sorted(zip(*((small / f"train.{suffix}").read_text().splitlines() for suffix in ("src", "tgt")), strict=True))
    for corpus in corpora:
        pairs_of_split = tasks.read_split(corpus, "train")
        text = [tuple(tasks.as_text(corpus.tokenizer, side).strip() for side in pair[:2]) for pair in pairs_of_split]
        assert sorted(text) == lines


def test_one_rank_has_the_losses_of_three(small, straight):
    mpirun(1, *train_arguments(small / "corpus", small / "one-rank", *SMALL, extra=("--max-steps", 70)), check=True)
    same_losses(small / "one-rank", straight)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(small, straight):
    run = small / "resumed"
    mpirun(3, "-m", "dllm.train", "--resume", run, "--max-steps", 70, "--progress", "none", check=True)
    expected, scalars = arrays(straight, 70)
    found, others = arrays(run, 70)
    assert others == scalars
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert metrics(run, "train") == metrics(straight, "train")


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_the_losses_of_a_split_count_targets_alone_and_are_those_of_each_pair_by_itself(small, straight):
    plain = last_line(mpirun(1, "-m", "dllm.evaluate", straight, "--lanes", 7, check=True))
    targets = (small / "test.tgt").read_text().splitlines()
    assert plain["tokens"] == sum(len(target.split()) + 1 for target in targets)
    alone = last_line(mpirun(1, "-m", "dllm.evaluate", straight, "--pairs", check=True))
    np.testing.assert_allclose(alone["loss"], plain["loss"], rtol=1e-10)
    training = metrics(straight, "train")
    assert training[0]["loss"] == pytest.approx(np.log(shards.Corpus(small / "corpus").vocabulary), rel=0.05)


PREPARE = "dllm.prepare --tokenizer char --out new"
TRAIN = "dllm.train --data corpus --out new --progress none --set train.carry=window"
REFUSALS = {  # command: what the message says
    "lines differ": (f"{PREPARE} --pairs two one", "two has 2 lines, one has 1: line i of one"),
    "no lines": (f"{PREPARE} --pairs none none", "there are no pairs in none"),
    "a side always empty": (f"{PREPARE} --pairs one blank", "there are no pairs in one, blank"),
    "no UTF-8": (f"{PREPARE} --pairs two latin", "latin line 2 is not UTF-8; convert it, or"),
    "no file": (f"{PREPARE} --pairs two three", "cannot read three: No such file"),
    "all too long": (f"{PREPARE} --pairs two two --longest 3", "no pair of the train files is short enough"),
    "both kinds": (f"{PREPARE} --pairs two two --train one", "give either --train or --pairs"),
    "neither kind": (PREPARE, "give either --train or --pairs"),
    "kinds mixed": (f"{PREPARE} --pairs two two --valid one", "--valid and --test go with --train"),
    "dealt out": (f"{PREPARE}{{rank}} --pairs two two --deal evenly", "--deal is for text"),
    "one folder": (f"{PREPARE} --pairs {{rank}} two", "so --out must have it too"),
    "states carried": (f"{TRAIN} --set train.carry=epoch", "--preset pairs, or --set train.carry=window"),
    "narrow": (f"{TRAIN} --set train.window=10", "has a pair of 11 tokens and a window must hold it: --set train.window=11"),
    "many lanes": (f"{TRAIN} --set train.lanes=600", "has 540 pairs: too few for 600 lanes"),
    "one file": ("dllm.evaluate straight --pairs one", "it takes SRC and TGT, or nothing"),
    "write what": ("dllm.evaluate straight --write file", "--write goes with --pairs"),
    "an empty line": ("dllm.evaluate straight --pairs gap gap", "gap is empty at line 2: take the line out of both"),
    "an unknown word": ("dllm.evaluate straight --pairs one one", "'a' is not in the vocabulary"),
    "no folder to write to": ("dllm.evaluate straight --pairs --write no/file", "cannot write --write no/file: No such"),
    "prompt for pairs": ("dllm.generate straight --prompt a", "straight was trained on pairs: give --source"),
    "text and pairs": ("dllm.generate straight --prompt a --source b", "give either --prompt or --source"),
}


@pytest.fixture(scope="module")
def refused(small, straight, tmp_path_factory):
    """case -> (what two ranks wrote, exit codes), and whether something was made; all cases in one start."""
    files = {"two": b"a\nb\n", "one": b"a\n", "none": b"", "blank": b" \n", "latin": b"a\n\xff\n", "gap": b"en\n\nde\n"}
    for name, data in files.items():
        (small / name).write_bytes(data)
    folder, before = tmp_path_factory.mktemp("refused"), set(small.iterdir())
    (folder / "commands.json").write_text(json.dumps([command.split() for command, _ in REFUSALS.values()]))
    script = pathlib.Path(__file__).with_name("refusals.py")
    mpirun(2, script, folder / "commands.json", folder, cwd=small, check=True)
    ends = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    texts = [[(folder / f"{number}-{rank}.txt").read_text() for rank in range(2)] for number in range(len(REFUSALS))]
    found = {case: (texts[number], {end[number][0] for end in ends}) for number, case in enumerate(REFUSALS)}
    return found, set(small.iterdir()) == before


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_suit_pairs_is_refused_in_one_line(refused, case):
    texts, codes = refused[0][case]
    text = "".join(texts if "generate" not in REFUSALS[case][0] else texts[:1])  # generate knows nothing of ranks
    lines = [line for line in text.splitlines() if not re.match("counting|building|encoding|.* are left out", line)]
    assert len(lines) == 1
    assert REFUSALS[case][1] in lines[0]
    assert codes == {REFUSED}


def test_nothing_is_left_of_what_was_refused(refused):
    assert refused[1]


def test_a_model_of_text_has_no_pairs(world):
    for command, message in (
        ("evaluate run --pairs", "run was not trained on pairs"),
        ("generate run --source a", "give --prompt"),
    ):
        done = mpirun(0, "-m", *f"dllm.{command}".split(), cwd=world)
        assert done.returncode == REFUSED
        assert message in complaint(done)


def test_pairs_with_an_empty_side_and_long_ones_are_left_out_and_told_of(tmp_path):
    examples = [("a b", "c"), ("", "d"), ("e", "  "), ("f\r", "g"), ("h " * 9, "i")]
    write_pairs(tmp_path, examples)
    done = mpirun(0, *prepare_arguments(tmp_path, tmp_path / "out", "--longest", 9, splits=["train"]), check=True)
    assert f"2 of 5 pairs are left out, since a side is empty, the first at {tmp_path}/train.src line 2" in done.stdout
    assert "1 of 3 train pairs are left out: they have more than 9 tokens" in done.stdout
    corpus = shards.Corpus(tmp_path / "out")
    assert (corpus.split("train")["pairs"], corpus.split("train")["longest"]) == (2, 5)
    assert sorted(pair[2].strip() for pair in tasks.read_split(corpus, "train")) == ["c", "g"]


def test_each_rank_may_have_pairs_of_its_own(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_pairs(tmp_path / str(rank), [(f"a{number}", f"b{number % 3}") for number in range(10 * rank, 10 * rank + 12)])
    out = tmp_path / "corpus{rank}"
    mpirun(2, *prepare_arguments(tmp_path / "{rank}", out, splits=["train"]), check=True)
    assert [shards.Corpus(tmp_path / f"corpus{rank}").split("train")["pairs"] for rank in range(2)] == [12, 12]
    mpirun(2, *train_arguments(out, tmp_path / "run", *SMALL, extra=("--max-steps", 4)), check=True)
    assert len(metrics(tmp_path / "run", "train")) == 4


def test_numbers_are_spelt_in_two_languages_as_well_as_anybody_could_and_on_any_number_of_ranks_alike(tmp_path):
    translation.write(tmp_path, 10000, spaced=True)
    mpirun(2, *prepare_arguments(tmp_path, tmp_path / "corpus"), check=True)
    size = "model.embedding=64", "model.hidden=128", "train.lanes=64", "train.epochs=6", "train.lr=0.01"
    settings = [part for setting in size for part in ("--set", setting)]
    run = tmp_path / "run"
    training = ["-m", "dllm.train", "--preset", "pairs", "--data", tmp_path / "corpus", "--out", run, "--progress", "plain"]
    done = mpirun(2, *training, *settings, timeout=250, check=True)
    assert re.search(r"\| (en|de)( \d)+  -> \w+", done.stdout)
    results = []
    for ranks in (1, 3):
        files = tmp_path / "test.src", tmp_path / "test.tgt"
        options = "--pairs", *(files if ranks == 3 else ()), "--lanes", 64 * ranks, "--write", tmp_path / f"said-{ranks}"
        results.append(last_line(mpirun(ranks, "-m", "dllm.evaluate", run, *options, check=True)))
    assert [result.pop("split") for result in results] == ["test", str(files[0])]
    assert results[0] == results[1]
    said, wanted = ((tmp_path / name).read_text().splitlines() for name in ("said-3", "test.tgt"))
    assert len(said) == len(wanted) == results[0]["pairs"] == 1000
    assert results[0]["exact_match"] == pytest.approx(sum(map(str.__eq__, said, wanted)) / 10)
    assert results[0]["exact_match"] >= 99
    assert min(results[0]["bleu"], results[0]["rougeL"]) >= 99
    spoken = mpirun(0, "-m", "dllm.generate", run, "--source", "de 4 0 7 1", check=True).stdout
    assert spoken.split() == ["vier", "tausend", "ein", "und", "siebzig"]
    sources = files[0].read_text().splitlines()[:50]
    with Server(run, ranks=1) as server:
        answer = server.complete(sources, max_tokens=64, temperature=0).json()
    assert [" ".join(choice["text"].split()) for choice in answer["choices"]] == said[:50]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
