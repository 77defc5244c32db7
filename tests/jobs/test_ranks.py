"""The number of ranks changes who computes, not what: the same run on 1, 2, 4 and 8 ranks; private text on 3."""

import json
import math

import numpy as np
import pytest
from helpers.launch import mpirun, train_arguments
from helpers.run_files import arrays, checkpoints, column, metrics
from helpers.several_commands import run_several

from dllm.config import ModelConfig
from dllm.data.corpus import Corpus
from dllm.data.lanes import deal
from dllm.model.layout import Layout

RANKS = (1, 2, 4, 8)
STEPS = 30  # the corpora are so small that an epoch ends before
COMMON = (
    "train.precision=fp64", "model.dropout=0.3", "averaging.bucket_mb=0.004", f"train.max_steps={STEPS}",
    "train.schedule=cosine", "train.warmup=5",
)  # fmt: skip
CASES = {  # 8 ranks share 20 lanes unevenly, 16 evenly; words: only some rows of the embedding are sent
    "untied-adam-clip": (
        "words", "model.layers=2", "model.embedding=12", "train.optimizer=adam", "train.lr=0.01", "train.clip=0.5",
        "train.lanes=20",
    ),
    "tied-momentum-window": (
        "chars", "model.tied=true", "train.optimizer=sgd", "train.momentum=0.9", "train.lr=0.1",
        "train.loss_norm=window", "train.lanes=16", "train.carry=run",
    ),
    "onehot-rmsprop-value": (
        "chars", "model.embedding=0", "train.optimizer=rmsprop", "train.lr=0.002", "train.alpha=0.95",
        "train.clip=0.02", "train.clip_by=value", "train.lanes=20", "train.last_window=drop",
    ),
    "untied-sgd": ("words", "train.optimizer=sgd", "train.lr=0.5", "model.biases=2", "train.lanes=16"),
}  # fmt: skip

PROBE = """
import json, pathlib, sys
from dllm import train
from dllm.model import kinds
from dllm.model.language_model import LanguageModel

class Probe(LanguageModel):
    seen = []

    def forward(self, batch, *rest, **options):
        if self.training and self.vocabulary > 5:  # 5: the kernels' warm-up
            self.seen.append(batch.targets[batch.targets >= 0].tolist())
        return super().forward(batch, *rest, **options)

kinds.KINDS["lm"] = Probe
code = train.main(sys.argv[2:])
from mpi4py import MPI
pathlib.Path(sys.argv[1], f"{MPI.COMM_WORLD.rank}.json").write_text(json.dumps(Probe.seen))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def corpora(prepare, text):
    return {
        "chars": prepare("char", train=text[:3_000], valid=text[-2_000:]),
        "words": prepare("word", train=text[:15_000], valid=text[-4_000:]),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpora):
    """(case, ranks) -> run folder; all cases of a number of ranks in one start."""
    folder, made = tmp_path_factory.mktemp("ranks"), {}
    for ranks in RANKS:
        commands = []
        for name, (corpus, *settings) in CASES.items():
            made[name, ranks] = folder / f"{name}-{ranks}"
            commands.append(train_arguments(corpora[corpus], made[name, ranks], *COMMON, *settings)[1:])
        run_several(folder / f"out-{ranks}", ranks, commands, timeout=150, check=True)
    return made


@pytest.mark.parametrize("case", CASES)
def test_losses_on_2_4_and_8_ranks_are_those_of_one_rank(runs, case):
    for split in ("train", "valid"):
        alone = metrics(runs[case, 1], split)
        assert column(alone, "step").max() == STEPS
        for ranks in RANKS[1:]:
            together = metrics(runs[case, ranks], split)
            assert column(together, "step").tolist() == column(alone, "step").tolist()
            losses, expected = column(together, "loss"), column(alone, "loss")
            np.testing.assert_allclose(losses, expected, rtol=1e-12, err_msg=f"{ranks} ranks")


@pytest.mark.parametrize("case", CASES)
def test_every_training_line_has_the_same_schedule_and_a_hash_of_the_parameters(runs, case):
    alone = metrics(runs[case, 1], "train")
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    assert alone[-1]["epoch"] > 1
    for ranks in RANKS:
        lines = metrics(runs[case, ranks], "train")
        assert [(line["epoch"], line["lr"]) for line in lines] == [(line["epoch"], line["lr"]) for line in alone]
        np.testing.assert_allclose(column(lines, "grad_norm"), column(alone, "grad_norm"), rtol=1e-9)
        assert all(int(line["parameters"], 16) > 0 for line in lines)
        assert len({line["parameters"] for line in lines}) == STEPS
        assert all((line["bytes_sent"] > 0) == (ranks > 1) for line in lines)


@pytest.mark.parametrize("case", CASES)
def test_parameters_moments_and_states_of_lanes_are_those_of_one_rank(runs, case):
    alone, scalars = arrays(runs[case, 1], STEPS)
    for ranks in RANKS[1:]:
        together, others = arrays(runs[case, ranks], STEPS)
        assert together.keys() == alone.keys()
        for name, array in alone.items():
            np.testing.assert_allclose(together[name], array, rtol=1e-8, atol=1e-11, err_msg=f"{name}, {ranks} ranks")
        for name in ("step", "epoch", "place", "tokens", "seen"):
            assert others[name] == scalars[name]


def test_a_command_repeated_writes_the_same_metrics_and_the_same_checkpoint_bit_for_bit(runs, corpora, tmp_path):
    case = "untied-adam-clip"
    corpus, *settings = CASES[case]
    mpirun(2, *train_arguments(corpora[corpus], tmp_path / "again", *COMMON, *settings), check=True)
    assert metrics(tmp_path / "again") == metrics(runs[case, 2])
    again, first = (arrays(run, STEPS)[0] for run in (tmp_path / "again", runs[case, 2]))
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert metrics(tmp_path / "again") != metrics(runs[case, 1])  # else the comparison above says little


def test_only_rows_in_use_of_a_large_embedding_are_sent(runs, corpora):
    vocabulary = Corpus(corpora["words"]).vocabulary
    assert vocabulary // 2 > 8 * 24  # the tokens of a window of 20 lanes on 8 ranks: rows are sent in all cases
    run = runs["untied-sgd", 4]
    model = json.loads((run / "summary.json").read_text())["config"]["model"]
    layout = Layout(ModelConfig(**model), vocabulary, np.float64)
    table = layout.table.stop - layout.table.start
    copies = 2 * 3 / 4  # of each number: 3 of 4 ranks read a quarter of it from this one, and their own shard comes back
    assert column(metrics(run, "train"), "bytes_sent").max() < copies * 8 * (layout.size - table / 2)


def probe(folder, ranks, data, *settings):
    """Train an epoch; (run, for every rank the targets of each of its windows)."""
    (folder / "probe.py").write_text(PROBE)
    arguments = train_arguments(data, folder / "run", "train.epochs=1", "train.lanes=7", *settings)[2:]
    mpirun(ranks, folder / "probe.py", folder, *arguments, check=True)
    return folder / "run", [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def of_lanes(corpus, split, lanes, of):
    """How often each token is predicted in an epoch of these lanes."""
    length = corpus.split(split)["tokens"] // of
    parts = [corpus.read(split, lane * length + 1, (lane + 1) * length) for lane in lanes]
    return np.bincount(np.concatenate(parts), minlength=corpus.vocabulary)


def counted(windows, vocabulary):
    return np.bincount(np.concatenate([np.array(window, np.int64) for window in windows]), minlength=vocabulary)


def test_each_token_of_shared_text_is_seen_once_in_an_epoch(corpora, tmp_path):
    _, seen = probe(tmp_path, 2, corpora["chars"])
    corpus = Corpus(corpora["chars"])
    for rank in range(2):
        lanes = deal(7, 2, rank)
        assert counted(seen[rank], corpus.vocabulary).tolist() == of_lanes(corpus, "train", lanes, 7).tolist()


def test_private_text_of_different_length_shares_a_vocabulary_and_each_token_is_seen_once(text, tmp_path):
    sizes, start = (1_500, 9_000, 6_000), 0
    for rank, size in enumerate(sizes):
        (tmp_path / f"site{rank}.txt").write_bytes(text[start : start + size])
        (tmp_path / f"valid{rank}.txt").write_bytes(text[-(start + size) : -start or None])
        start += size
    out = tmp_path / "site{rank}"
    texts = "--train", tmp_path / "site{rank}.txt", "--valid", tmp_path / "valid{rank}.txt"
    mpirun(3, "-m", "dllm.prepare", *texts, "--tokenizer", "char", "--share-vocabulary", "--out", out, check=True)
    corpora = [Corpus(tmp_path / f"site{rank}") for rank in range(3)]
    assert [corpus.split("train")["tokens"] for corpus in corpora] == list(sizes)
    vocabularies = {(tmp_path / f"site{rank}" / "tokenizer.json").read_bytes() for rank in range(3)}
    assert len(vocabularies) == 1
    letters = set(text[: sum(sizes)].decode())
    assert letters <= set(json.loads(vocabularies.pop())["units"])

    run, seen = probe(tmp_path, 3, out, "checkpoint.every_steps=1000")
    lanes = [len(deal(7, 3, rank)) for rank in range(3)]
    longest = max(size // count - 1 for size, count in zip(sizes, lanes, strict=True))
    for rank, (corpus, count) in enumerate(zip(corpora, lanes, strict=True)):
        assert len(seen[rank]) == math.ceil(longest / 8)  # ranks whose lanes have ended go on with the others
        expected = of_lanes(corpus, "train", range(count), count)
        assert counted(seen[rank], corpus.vocabulary).tolist() == expected.tolist()
    assert seen[0][-1] == []
    assert checkpoints(run) == [len(seen[0])]
    lines = metrics(run, "train")
    assert len(lines) == len(seen[0])
    assert all(math.isfinite(line["loss"]) for line in lines)

    done = mpirun(3, "-m", "dllm.evaluate", run, "--split", "valid", check=True)
    result, last = json.loads(done.stdout.splitlines()[-1]), metrics(run, "valid")[-1]
    assert result["tokens"] == last["tokens"] == sum(size - count for size, count in zip(sizes, (2, 2, 2), strict=True))
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-6)
