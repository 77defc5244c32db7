"""Runs of every kind of model: the same on any number of ranks, resumed, after a death, by gossip, on private pairs, and from a
model of text.
"""

import re
import signal
import wave

import numpy as np
import pytest
from helpers.launch import Job, flavour, mpirun, train_arguments, write_pairs
from helpers.run_files import arrays, column, metrics, same_losses
from helpers.several_commands import run_several

from benchmarks.translation import pair

STEPS, BREAK, DEATH = 24, 13, 60
SETTINGS = (
    "train.precision=fp64", "train.window=48", "train.lanes=8", "train.threads=1", "train.optimizer=adam", "train.clip=1.0",
    "train.lr=0.01", "train.eval_every=10", "model.dropout=0.2", "log.sample=0",
)  # fmt: skip
KINDS = {
    "seq2seq": ("pairs", "model.bidirectional=true", "model.layers=2", "model.tied=true", "model.copy=true", "train.smoothing=0.1"),
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


def test_gossip_private_pairs_and_beginnings_by_models_of_text(folder, tmp_path):
    """In one start of the ranks, since each takes longer than what it does."""
    private = train_arguments(
        folder / "own-{rank}", folder / "private", "model.kind=seq2seq", *SETTINGS, "train.max_steps=8", *KINDS["seq2seq"][1:]
    )
    pairs = [folder / f"own-{{rank}}.{side}" for side in ("src", "tgt")]
    unfrozen = "train.unfreeze=2", "train.max_steps=4", "train.eval_every=0"
    commands = [
        train(folder, "seq2seq", "gossip", "averaging.method=dpsgd"),
        ["dllm.prepare", "--tokenizer", "byte", "--pairs", *pairs, "--out", folder / "own-{rank}"],
        private[1:],
        *(
            train(folder, kind, f"{kind}-begun", *unfrozen, extra=("--init-from", folder / "bilm-2"))
            for kind in ("tagger", "classifier")
        ),
        train(folder, "tagger", "tagger-one", "train.max_steps=1", extra=("--init-from", folder / "bilm-2")),
    ]
    commands[3] = [word for word in commands[3] if word != "model.layers=1"]
    run_several(tmp_path / "all", 2, commands, check=True)
    gossip = column(metrics(folder / "gossip", "train"), "loss")
    assert gossip[-4:].mean() < 0.9 * gossip[:4].mean()
    assert np.isfinite(column(metrics(folder / "private", "train"), "loss")).all()
