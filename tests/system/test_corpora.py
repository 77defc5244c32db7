"""What is published of real corpora, and a model of Chinese poems. They lie beside the project, not in it."""

import subprocess
import sys

import pytest
from helpers.launch import environment, mpirun, train_arguments
from helpers.run_files import metrics
from paths import DATA

from dllm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, WordTokenizer


def corpus(name, limit=None):
    """The bytes of a file in the data folder, cut at the end of a line near `limit`."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no data: {path} is not there; DLLM_DATA names the data folder")
    with open(path, "rb") as file:
        data = file.read(limit or -1)
    return data[: data.rfind(b"\n") + 1] if limit else data


CORPORA = ["tinyshakespeare/input.txt", "wikitext-2/train.txt", "songci/songci.txt"]


@pytest.mark.parametrize("name", CORPORA)
def test_round_trips_are_exact_on_the_corpora(name):
    data = corpus(name, None if "tiny" in name else 1 << 20)
    for tokenizer in (
        ByteTokenizer(),
        CharTokenizer.build(CharTokenizer.count(data), 0),
        BPETokenizer.build(BPETokenizer.count(data[: data.find(b"\n", 100_000) + 1]), 384),
    ):
        assert tokenizer.decode(tokenizer.encode(data)) == data, tokenizer.kind


def test_tinyshakespeare_has_65_symbols():
    data = corpus("tinyshakespeare/input.txt")
    assert len(data) == 1_115_394
    assert CharTokenizer.build(CharTokenizer.count(data), 0).size == 65


def test_wikitext_2_has_the_published_words_and_types():
    counts = WordTokenizer.count(corpus("wikitext-2/train.txt"))
    assert counts.total() == 2_088_628
    assert len(counts) == 33_278
    assert WordTokenizer.count(corpus("wikitext-2/valid.txt")).total() == 217_646
    assert WordTokenizer.count(corpus("wikitext-2/test.txt")).total() == 245_569


def test_songci_is_utf8_of_about_two_million_characters():
    counts = CharTokenizer.count(corpus("songci/songci.txt"))  # raises where it is not
    assert 1_900_000 < counts.total() < 2_100_000


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_chinese_poems_are_learnt_and_continued_in_valid_utf8(tokenizer, tmp_path):
    text = corpus("songci/songci.txt", 240_000).decode()
    (tmp_path / "poems.txt").write_text(text[2000:], encoding="utf-8")
    (tmp_path / "valid.txt").write_text(text[:2000], encoding="utf-8")
    options = "--train", "poems.txt", "--valid", "valid.txt", "--tokenizer", tokenizer, "--out", "poems"
    size = ("--vocab-size", 600) if tokenizer == "bpe" else ()
    mpirun(2, "-m", "dllm.prepare", *options, *size, cwd=tmp_path, check=True)
    mpirun(2, *train_arguments("poems", "run", extra=("--max-steps", 30)), cwd=tmp_path, check=True)
    losses = [line["loss"] for line in metrics(tmp_path / "run", "train")]
    assert len(losses) == 30
    assert losses[-1] < losses[0]
    command = [sys.executable, "-m", "dllm.generate", "run", "--prompt", "春", "--tokens", "80", "--temperature", "1"]
    plain = environment({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=plain, timeout=60, check=True)
    assert done.stdout.decode("utf-8").startswith("春")
    assert tokenizer == "bpe" or set(done.stdout.decode()) <= {*text, "<", "u", "n", "k", ">"}
