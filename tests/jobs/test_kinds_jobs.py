"""Runs of every kind of model: the same on any number of ranks, resumed, after a death, by gossip, on private pairs, and from a
model of text.
"""

import re
import signal
import wave

import numpy as np
import pytest
from helpers.launch import REFUSED, Job, flavour, train_arguments, write_pairs
from helpers.run_files import arrays, column, metrics, same_losses
from helpers.several_commands import run_several

from benchmarks.translation import pair
from dllm.config import ModelConfig
from dllm.data.corpus import Corpus
from dllm.model.layout import Layout

STEPS, BREAK, DEATH = 24, 13, 60
SETTINGS = (
    "train.precision=fp64", "train.window=80", "train.lanes=8", "train.threads=1", "train.optimizer=adam", "train.clip=1.0",
    "train.lr=0.01", "train.eval_every=10", "model.dropout=0.2", "log.sample=0",
)  # fmt: skip
KINDS = {
    "seq2seq": (
        "pairs", "model.bidirectional=true", "model.layers=2", "model.tied=true", "model.copy=true", "train.smoothing=0.1",
    ),
    "tagger": ("tags", "model.bidirectional=true", "model.layers=2"),
    "classifier": ("classes", "model.bidirectional=true", "model.projection=8"),
    "bilm": ("text", "model.layers=2"),
    "ctc": ("transcripts", "model.bidirectional=true"),
}  # fmt: skip


def record(path, number):
    """A third of a second of a tone and noise."""
    rng = np.random.default_rng(number)
    sound = 3000 * np.sin(np.arange(2600 + 40 * number) * (0.1 + number % 7 / 10)) + rng.normal(0, 300, 2600 + 40 * number)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(sound.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpora of names of numbers, and NAME-RANKS, the runs of all kinds; NAME-resumed on 2 ranks."""
    folder = tmp_path_factory.mktemp("kinds")
    pairs = [pair(language, number) for number in range(40) for language in ("en", "de")]
    for split, part in {"train": pairs[8:], "valid": pairs[:8]}.items():
        write_pairs(folder, part, split)
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for _, name in part))
        (folder / f"{split}.tsv").write_text("".join(f"{source[:2]}\t{name}\n" for source, name in part))
        words = [name.replace("-", " ").split() for _, name in part]
        (folder / f"{split}.tags").write_text("\n".join("".join(f"{word}\t{word[0]}\n" for word in name) for name in words))
        lines = []
        for number in range(len(part)):
            record(folder / f"{split}-{number}.wav", number)
            lines.append(f"{'abcab'[number % 3 :][:2]}\t{split}-{number}.wav\n")
        (folder / f"{split}.said").write_text("".join(lines))
    for rank in range(2):
        write_pairs(folder, pairs[rank::3], f"own-{rank}")

    def prepare(name, tokenizer, option, suffix):
        files = [f"--{option}", folder / f"train.{suffix}", f"--valid-{option}", folder / f"valid.{suffix}"]
        if option == "train":
            files[2] = "--valid"
        return ["dllm.prepare", *tokenizer, *files, "--out", folder / name]

    same = "--tokenizer-from", folder / "text"
    pair_files = [folder / f"{split}.{side}" for split in ("train", "valid") for side in ("src", "tgt")]
    commands = [
        prepare("text", ("--tokenizer", "byte"), "train", "txt"),
        prepare("tags", same, "tags", "tags"),
        prepare("classes", same, "classes", "tsv"),
        prepare("transcripts", ("--tokenizer", "mel"), "transcripts", "said"),
        [
            "dllm.prepare",
            "--tokenizer",
            "char",
            "--pairs",
            *pair_files[:2],
            "--valid-pairs",
            *pair_files[2:],
            "--out",
            folder / "pairs",
        ],
    ]
    run_several(folder / "prepared", 0, commands, check=True)
    for ranks in (1, 2, 4):
        commands = [train(folder, name, f"{name}-{ranks}") for name in KINDS]
        if ranks == 2:
            for name in KINDS:
                commands.append(train(folder, name, f"{name}-resumed", f"train.max_steps={BREAK}"))
                commands.append(
                    ["dllm.train", "--resume", folder / f"{name}-resumed", "--max-steps", STEPS, "--progress", "none"]
                )
        run_several(folder / f"on-{ranks}", ranks, commands, check=True)
    return folder


def train(folder, kind, run, *settings, extra=()):
    """Words of a command that trains; they begin with the module."""
    data, *shape = KINDS[kind]
    chosen = f"model.kind={kind}", f"train.max_steps={STEPS}", *SETTINGS, *shape, *settings
    return train_arguments(folder / data, folder / run, *chosen, extra=extra)[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_trains_the_same_model(folder, kind):
    expected, scalars = arrays(folder / f"{kind}-1", STEPS)
    losses = column(metrics(folder / f"{kind}-1", "train"), "loss")
    assert np.isfinite(losses).all()
    assert losses[-4:].mean() < 0.95 * losses[:4].mean()
    for ranks in (2, 4):
        same_losses(folder / f"{kind}-{ranks}", folder / f"{kind}-1")
        found, others = arrays(folder / f"{kind}-{ranks}", STEPS)
        assert others["tokens"] == scalars["tokens"]
        assert np.linalg.norm(found["theta"] - expected["theta"]) <= 1e-12 * np.linalg.norm(expected["theta"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(folder, kind):
    (expected, scalars), (found, others) = (arrays(folder / f"{kind}-{name}", STEPS) for name in ("2", "resumed"))
    assert others == scalars
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert metrics(folder / f"{kind}-resumed", "train") == metrics(folder / f"{kind}-2", "train")


def test_gossip_private_pairs_and_beginnings_by_a_model_of_text(folder, tmp_path):
    """In one start of the ranks, since each takes longer than what it does."""
    private = "model.kind=seq2seq", *SETTINGS, *KINDS["seq2seq"][1:], "train.max_steps=8", "train.eval_every=0"
    pairs = [folder / f"own-{{rank}}.{side}" for side in ("src", "tgt")]
    frozen = "train.unfreeze=2", "train.max_steps=4", "train.eval_every=0"
    parent = "--init-from", folder / "bilm-2"
    commands = [
        train(folder, "seq2seq", "gossip", "averaging.method=dpsgd"),
        ["dllm.prepare", "--tokenizer", "byte", "--pairs", *pairs, "--out", folder / "own-{rank}"],
        train_arguments(folder / "own-{rank}", folder / "private", *private)[1:],
        train(folder, "tagger", "begun", *frozen, extra=parent),
        train(folder, "classifier", "refused", *frozen, "model.hidden=32", extra=parent),
    ]
    *done, refused = run_several(tmp_path / "all", 2, commands)
    for ended in done:
        assert ended.codes == {0}, ended.text
    gossip = column(metrics(folder / "gossip", "train"), "loss")
    assert gossip[-4:].mean() < 0.95 * gossip[:4].mean()
    assert np.isfinite(column(metrics(folder / "private", "train"), "loss")).all()
    check_begun(folder)
    assert refused.codes == {REFUSED}
    assert re.fullmatch(r"dllm: --init-from \S+ .*\n", refused.text), refused.text


def check_begun(folder):
    """After 4 steps, of which 2 moved the output alone and 2 the layer below it, the rest is what it was."""
    (found, _), (old, _) = arrays(folder / "begun", 4), arrays(folder / "bilm-2", STEPS)
    vocabulary = Corpus(folder / "text").vocabulary
    ours, theirs = (
        Layout(ModelConfig(embedding=16, hidden=16, layers=2, dropout=0.2, **shape), vocabulary, np.float64)
        for shape in (
            {"kind": "tagger", "bidirectional": True, "labels": len(Corpus(folder / "tags").labels)},
            {"kind": "bilm"},
        )
    )
    read = lambda layout, arrays, name: arrays["theta"][layout.tensors[name].start : layout.tensors[name].stop].reshape(
        layout.tensors[name].shape
    )
    for way in ("forward", "backward"):
        for tensor in ("weight_x", "weight_h", "bias"):
            old_one = read(theirs, old, f"{way}.0.{tensor}")
            np.testing.assert_array_equal(read(ours, found, f"encoder.0.{way}.{tensor}"), old_one)
            assert (read(ours, found, f"encoder.1.{way}.{tensor}")[:1] != read(theirs, old, f"{way}.1.{tensor}")[:1]).any()
    np.testing.assert_array_equal(read(ours, found, "embedding.weight"), read(theirs, old, "embedding.weight"))


@pytest.mark.skipif(flavour() == "mpich", reason="MPICH ends the job where a rank dies; test_launch.py has that")
@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_a_rank_dies_and_losses_are_as_if_it_had_not(folder, tmp_path, kind):
    steps = f"train.max_steps={DEATH}", "train.eval_every=25"
    run_several(tmp_path / "all", 2, [train(folder, kind, f"{kind}-whole", *steps)], check=True)
    words = ["-m", *train(folder, kind, f"{kind}-less", *steps)]
    with Job(0, "-m", "dllm.launch", "-n", 4, "--", *words[2:]) as job:
        job.until_step(folder / f"{kind}-less", 10)
        job.signal(signal.SIGKILL, [job.ranks()[2]])
        done = job.wait()
        assert done.returncode == 0, str(job)
    assert re.search(r"rank 2 of 4 died; 3 go on from step \d+", done.stderr), done.stderr
    same_losses(folder / f"{kind}-less", folder / f"{kind}-whole")
