"""Private text: what is in its vocabulary, from where, and who may read what was made of it."""

import json
import os
import stat

import pytest
from helpers.launch import REFUSED, mpirun, write_pairs
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus
from dllm.data.tokenizer_files import tokenizer_hash

NUMBERS = [f"A{48 * number + 100_003}X{number % 7}" for number in range(63)]  # insurance numbers, made up
COMMON = "the patient was seen again and the finding is the same as before\n"
WAYS = {  # what a corpus is called: the options that it is made with
    "byte": "--tokenizer byte",
    "from": "--tokenizer-from public",
    "noisy-word": "--tokenizer word --epsilon 2",
    "noisy-char": "--tokenizer char --epsilon 4 --words-per-line 5",
    "noisy-bpe": "--tokenizer bpe --vocab-size 300 --epsilon 2",
    "shared": "--tokenizer word --share-vocabulary",
}
UNSAID = {kind: f"--tokenizer {kind}" for kind in ("word", "char", "bpe")}


def prepare(name, options, train="site{rank}.txt"):
    """The words of a command that prepares private text."""
    return ["dllm.prepare", "--train", train, *options.split(), "--out", f"{name}-{{rank}}"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """A folder with the text of two sites, one of which has insurance numbers, and a public corpus."""
    folder = tmp_path_factory.mktemp("sites")
    (folder / "site0.txt").write_text(COMMON * 600)
    (folder / "site1.txt").write_text(COMMON * 600 + "".join(f"{number}\n" for number in NUMBERS))
    (folder / "valid1.txt").write_text("".join(f"V{number}\n" for number in NUMBERS))
    (folder / "valid0.txt").write_text(COMMON)
    (folder / "public.txt").write_text(COMMON * 3 + "other words are <unk>\n")
    mpirun(0, "-m", "dllm.prepare", "--train", "public.txt", "--tokenizer", "word", "--out", "public", cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def ends(sites):
    """name -> how two ranks ended that prepared the sites' text."""
    named = WAYS | {f"unsaid-{kind}": options for kind, options in UNSAID.items()}
    commands = [[*prepare(name, options), "--valid", "valid{rank}.txt"] for name, options in named.items()]
    return dict(zip(named, run_several(sites / "out", 2, commands, cwd=sites), strict=True))


@pytest.mark.parametrize("kind", UNSAID)
def test_a_vocabulary_of_private_text_is_made_only_where_the_user_says_how(ends, sites, kind):
    end = ends[f"unsaid-{kind}"]
    assert end.codes == {REFUSED}
    assert end.text.count("\n") == 1
    for way in ("--tokenizer byte", "--tokenizer-from DIR", "--epsilon E", "--share-vocabulary"):
        assert way in end.text
    assert not list(sites.glob("unsaid-*"))


@pytest.mark.parametrize("name", [name for name in WAYS if name != "shared"])
def test_no_number_of_a_site_is_in_anybody_s_vocabulary(ends, sites, name):
    assert ends[name].codes == {0}, ends[name].text
    for rank in range(2):
        told = (sites / f"{name}-{rank}" / "tokenizer.json").read_text()
        assert not [number for number in NUMBERS if number in told]
    everything = b"".join(path.read_bytes() for path in (sites / f"{name}-0").iterdir())
    assert not [number for number in NUMBERS if number.encode() in everything]


def test_where_the_user_shares_the_vocabulary_all_numbers_of_the_train_text_are_in_it(ends, sites):
    assert ends["shared"].codes == {0}
    units = Corpus(sites / "shared-0").tokenizer.units
    assert set(NUMBERS) <= set(units)
    assert "<unk>" in units  # the validation text has other words
    assert not [unit for unit in units if unit.startswith("V")]


@pytest.mark.parametrize("name", WAYS)
def test_all_sites_have_one_vocabulary_and_each_its_own_text(ends, sites, name):
    corpora = [Corpus(sites / f"{name}-{rank}") for rank in range(2)]
    assert len({corpus.tokenizer_hash for corpus in corpora}) == 1
    tokens = [corpora[rank].read("train", 0, corpora[rank].split("train")["tokens"]) for rank in range(2)]
    texts = [corpora[0].tokenizer.decode(part).decode().splitlines() for part in tokens]
    assert texts[0][:600] == texts[1][:600]
    assert (len(texts[0]), len(texts[1])) == (600, 663)


def test_what_many_lines_have_is_in_a_noisy_vocabulary(ends, sites):
    assert {*COMMON.split(), "<eos>", "<unk>"} == set(Corpus(sites / "noisy-word-0").tokenizer.units)
    letters = set(Corpus(sites / "noisy-char-1").tokenizer.units)
    assert {*COMMON, "<unk>"} <= letters  # digits are in 63 lines, so they may be there or not
    corpus = Corpus(sites / "noisy-bpe-0")
    assert b" patient" in {corpus.tokenizer.decode([token]) for token in range(corpus.vocabulary)}


def test_the_manifest_says_how_private_counts_were_made(ends, sites):
    manifests = [Corpus(sites / f"noisy-word-{rank}").manifest for rank in range(2)]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    counts = manifests[0]["counts"]
    assert (counts["epsilon"], counts["delta"], counts["units_per_example"], counts["example"]) == (2.0, 1e-6, 20, "line")
    assert counts["sigma"] == pytest.approx(10.277, abs=1e-3)
    assert counts["threshold"] == pytest.approx(57.023, abs=1e-3)
    assert "Gopi" in counts["method"]
    assert Corpus(sites / "noisy-char-0").manifest["counts"]["units_per_example"] == 5
    assert not [name for name in ("byte", "from", "shared") if "counts" in Corpus(sites / f"{name}-0").manifest]


def test_only_the_total_of_private_sizes_is_told(ends):
    tokens = 600 * 14, 600 * 14 + 2 * len(NUMBERS)
    text = "".join(ends["from"].texts)
    assert f"train tokens: {sum(tokens):,} in all" in text
    assert f"{tokens[1]:,}" not in text


def modes(folder):
    """name -> permissions of a folder, "", and of what is in it."""
    return {str(path.relative_to(folder)).strip("."): stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


@pytest.mark.parametrize(("out", "options", "folder", "file"), [
    ("mine/{rank}", "--epsilon 2", 0o700, 0o600),
    ("all", "", 0o755, 0o644),
    ("dealt/{rank}", "--deal evenly", 0o755, 0o644),
])  # fmt: skip
def test_what_is_made_of_private_text_is_its_owner_s_alone_to_read(sites, tmp_path, out, options, folder, file):
    before = os.umask(0o022)
    try:
        words = ["--train", sites / "site0.txt", "--tokenizer", "word", *options.split(), "--out", tmp_path / out]
        mpirun(2, "-m", "dllm.prepare", *words, check=True)
    finally:
        os.umask(before)
    for place in {out.format(rank=rank) for rank in range(2)}:
        expected = {"manifest.json": file, "tokenizer.json": file, "train-00000.h5": file, "": folder}
        assert modes(tmp_path / place) == expected


def test_another_text_may_take_the_vocabulary_of_a_run(world, tmp_path):
    (tmp_path / "text").write_text("import os\nimport sys\n" * 20)
    words = ["--train", tmp_path / "text", "--test", tmp_path / "text", "--tokenizer-from", world / "run"]
    mpirun(2, "-m", "dllm.prepare", *words, "--out", tmp_path / "corpus", check=True)
    assert Corpus(tmp_path / "corpus").tokenizer_hash == Corpus(world / "tiny").tokenizer_hash
    done = mpirun(1, "-m", "dllm.evaluate", world / "run", "--data", tmp_path / "corpus", "--split", "test", check=True)
    assert json.loads(done.stdout.splitlines()[-1])["perplexity"] > 1


def test_text_and_pairs_may_take_each_other_s_vocabulary(sites, tmp_path):
    """The two tokens of pairs come and go; a vocabulary of words needs what ends a line of text."""
    write_pairs(tmp_path, [("the patient", "was seen"), ("the finding", "is new")])
    sides = ["--pairs", tmp_path / "train.src", tmp_path / "train.tgt"]
    text = ["--train", sites / "public.txt"]
    ends = run_several(
        tmp_path / "out",
        2,
        [
            ["dllm.prepare", *sides, "--tokenizer-from", sites / "public", "--out", tmp_path / "pairs"],
            ["dllm.prepare", *text, "--tokenizer-from", tmp_path / "pairs", "--out", tmp_path / "text"],
            ["dllm.prepare", *sides, "--tokenizer", "word", "--out", tmp_path / "words"],
            ["dllm.prepare", *text, "--tokenizer-from", tmp_path / "words", "--out", tmp_path / "none"],
        ],
    )
    assert [end.codes for end in ends] == [{0}, {0}, {0}, {REFUSED}], "\n".join(end.text for end in ends)
    public, pairs, plain = (Corpus(folder) for folder in (sites / "public", tmp_path / "pairs", tmp_path / "text"))
    assert pairs.vocabulary == public.vocabulary + 2
    assert pairs.split("train")["pairs"] == 2
    assert tokenizer_hash(plain.tokenizer) == public.tokenizer_hash
    assert "has no <eos>, with which lines of text end: take one made of text" in ends[3].text


def test_each_site_s_pairs_are_counted_privately(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_pairs(tmp_path / str(rank), [("ja genau", "yes exactly")] * 200 + [("nur " + NUMBERS[rank], NUMBERS[rank])])
    sides = ["--pairs", tmp_path / "{rank}/train.src", tmp_path / "{rank}/train.tgt"]
    words = ["-m", "dllm.prepare", *sides, "--tokenizer", "word", "--epsilon", 4, "--out", tmp_path / "out{rank}"]
    done = mpirun(2, *words, check=True)
    corpus = Corpus(tmp_path / "out1")
    assert corpus.tokenizer.units[0] == "<unk>"
    assert set(corpus.tokenizer.units) == {"<unk>", "ja", "genau", "yes", "exactly"}
    assert corpus.manifest["counts"]["example"] == "pair"
    assert "pairs: train 201" in done.stdout


PRIVATE = "--train site{rank}.txt --out new-{rank}"
HOSTILE = {  # what is wrong: (options, what the line says)
    "no epsilon": (f"{PRIVATE} --tokenizer word --epsilon 0", "--epsilon: 0 is not a number of at least 0.001 and at most 100"),
    "a negative epsilon": (f"{PRIVATE} --tokenizer word --epsilon=-1", "-1 is not a number of at least"),
    "epsilon nan": (f"{PRIVATE} --tokenizer word --epsilon nan", "nan is not a number of at least"),
    "epsilon inf": (f"{PRIVATE} --tokenizer word --epsilon inf", "inf is not a number of at least"),
    "epsilon 1e308": (f"{PRIVATE} --tokenizer word --epsilon 1e308", "1e308 is not a number of at least 0.001 and at most 100"),
    "epsilon 1e-300": (f"{PRIVATE} --tokenizer word --epsilon 1e-300", "1e-300 is not a number of at least 0.001"),
    "a small epsilon": (f"{PRIVATE} --tokenizer word --epsilon 0.001", "no word is in enough lines of a rank"),
    "epsilon of letters": (f"{PRIVATE} --tokenizer word --epsilon small", "--epsilon: invalid float value: 'small'"),
    "no words": (f"{PRIVATE} --tokenizer word --epsilon 1 --words-per-line 0", "0 is not a number of at least 1 and at most"),
    "many words": (f"{PRIVATE} --tokenizer word --epsilon 1 --words-per-line 1{'0' * 400}", "and at most 1,000,000"),
    "words alone": (f"{PRIVATE} --tokenizer byte --words-per-line 9", "--words-per-line goes with --epsilon"),
    "both": (f"{PRIVATE} --tokenizer word --epsilon 1 --share-vocabulary", "give either --epsilon or --share-vocabulary"),
    "bytes counted": (f"{PRIVATE} --tokenizer byte --epsilon 1", "--epsilon goes with --tokenizer char, word or bpe"),
    "a folder counted": (f"{PRIVATE} --tokenizer-from public --epsilon 1", "--epsilon goes with --tokenizer char, word"),
    "a folder shared": (f"{PRIVATE} --tokenizer-from public --share-vocabulary", "--share-vocabulary goes with --tokenizer"),
    "public and noisy": ("--train site0.txt --out new --tokenizer word --epsilon 1", "--epsilon is for private text"),
    "public and shared": ("--train site0.txt --out new --tokenizer word --share-vocabulary", "--share-vocabulary is for priv"),
    "dealt and noisy": (
        "--train site0.txt --out new{rank} --deal evenly --tokenizer word --epsilon 1",
        "with {rank} in --out and without --deal",
    ),
    "two tokenizers": (f"{PRIVATE} --tokenizer-from public --tokenizer word", "not allowed with argument --tokenizer"),
    "no tokenizer": (PRIVATE, "one of the arguments --tokenizer --tokenizer-from is required"),
    "a size": (f"{PRIVATE} --tokenizer-from public --vocab-size 9", "--vocab-size goes with --tokenizer"),
    "a folder of no name": (f"{PRIVATE} --tokenizer-from=", "--tokenizer-from names no folder"),
    "no folder": (f"{PRIVATE} --tokenizer-from nothing", "cannot read nothing/tokenizer.json: No such file"),
    "a file": (f"{PRIVATE} --tokenizer-from site0.txt", "cannot read site0.txt/tokenizer.json: Not a directory"),
    "damaged": (f"{PRIVATE} --tokenizer-from damaged", "damaged/tokenizer.json is not valid JSON"),
    "of another program": (f"{PRIVATE} --tokenizer-from foreign", "foreign/tokenizer.json has no 'kind'"),
    "of another kind": (f"{PRIVATE} --tokenizer-from morse", "morse/tokenizer.json holds no tokenizer"),
    "one for each": (f"{PRIVATE} --tokenizer-from own{{rank}}", "do not agree on the tokenizer that is taken: rank 0 has"),
    "words that it lacks": (f"{PRIVATE} --tokenizer-from strict", "site1.txt has a word that is not among the vocabulary's"),
    "chars that it lacks": (f"{PRIVATE} --tokenizer-from letters", "site1.txt has a char that is not among the vocabulary's"),
    "an empty text": ("--train empty{rank} --out new-{rank} --tokenizer word --epsilon 1", "the train text is empty: empty1"),
    "no UTF-8": ("--train latin{rank} --out new-{rank} --tokenizer word --epsilon 1", "latin1 is not UTF-8 at byte 12;"),
    "one line": ("--train long{rank} --out new-{rank} --tokenizer word --epsilon 1", "no word is in enough lines of a rank"),
}


@pytest.fixture(scope="module")
def refused(sites, tmp_path_factory):
    """case -> how two ranks ended, and whether something was made; all cases in one start."""
    tokenizers = {
        "damaged": '{"kind": "word", "units": [',
        "foreign": '{"version": "1.0", "model": {}}',
        "morse": '{"kind": "morse", "units": ["."]}',
        "own0": '{"kind": "word", "units": ["<unk>", "<eos>", "a"]}',
        "own1": '{"kind": "word", "units": ["<unk>", "<eos>", "b"]}',
        "strict": json.dumps({"kind": "word", "units": ["<eos>", *sorted(set(COMMON.split()))]}),
        "letters": json.dumps({"kind": "char", "units": sorted(set(COMMON))}),
    }
    for name, text in tokenizers.items():
        (sites / name).mkdir()
        (sites / name / "tokenizer.json").write_text(text)
    for rank, (empty, latin) in enumerate(((b"a\n", b"a\n"), (b"", b"two lines,\nFian\xe7ailles\n".replace(b"Fian", b"F")))):
        (sites / f"empty{rank}").write_bytes(empty)
        (sites / f"latin{rank}").write_bytes(latin)
        (sites / f"long{rank}").write_bytes(b"word " * 2_000_000)
    before = set(sites.iterdir())
    commands = [["dllm.prepare", *options.split()] for options, _ in HOSTILE.values()]
    ends = run_several(tmp_path_factory.mktemp("refused") / "out", 2, commands, cwd=sites)
    return dict(zip(HOSTILE, ends, strict=True)), set(sites.iterdir()) == before


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_is_refused_in_one_line(refused, case):
    end = refused[0][case]
    lines = [
        line for line in end.text.splitlines() if not line.startswith(("counting", "private counts", "building", "encoding"))
    ]
    assert len(lines) == 1, end.text
    assert HOSTILE[case][1] in lines[0]
    assert end.codes == {REFUSED}
    assert not [number for number in NUMBERS if number in end.text]  # an error may be seen by others


def test_nothing_is_left_of_what_was_refused(ends, refused):
    assert refused[1]


ODD = """
import os, sys
from dllm import prepare
rank = int(os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
sys.exit(prepare.main(sys.argv[2:] + (sys.argv[1].split() if rank == 1 else [])))
"""


def test_sites_that_do_not_agree_on_the_way_are_told_before_anything_is_counted(sites, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    words = ["dllm.prepare", *f"{PRIVATE} --tokenizer word --epsilon 2".split()]
    done = mpirun(2, tmp_path / "odd.py", "--epsilon 8", *words[1:], cwd=sites)
    assert done.returncode == REFUSED
    assert "dllm: the ranks do not agree on the --epsilon: rank 0 has 2.0, rank 1 has 8.0" in done.stderr
    assert not list(sites.glob("new-*"))
