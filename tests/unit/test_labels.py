"""Texts with labels: how files are read, what is refused, and what becomes of them in a corpus."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers.labels import conllu, make_corpus, records, sentences
from mpi4py import MPI

from dllm import prepare
from dllm.data import drawing, text
from dllm.data.corpus import Corpus
from dllm.data.label_files import ClassFile, LabelledFile, TagFile
from dllm.data.label_names import public_names
from dllm.data.labelling import Classing, Tagging
from dllm.data.preparation import prepare_corpus
from dllm.data.source_names import listed
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError
from dllm.files import storage
from dllm.tools import facts, info


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(storage, "flush", lambda path: None)  # which takes most of the time


def tags_of(path, data, column=0):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    file = TagFile(LabelledFile(path), column)
    return [
        ([unit.decode() for unit in record.units], record.labels) for record in (file[number] for number in range(len(file)))
    ]


def test_conllu_is_read_without_ranges_empty_words_and_comments(tmp_path):
    examples = [(["ab", "c d", "#"], ["X", "Y", "X"]), (["e"], ["_"])]
    for end in ("", "\n\n\n"):
        found = tags_of(tmp_path / "file", "\ufeff" + conllu(examples).rstrip("\n").replace("\n", "\r\n") + end)
        assert found == [(["ab", " c d", " #"], ["X", "Y", "X"]), (["e"], [None])]
    assert tags_of(tmp_path / "file", conllu(examples), 10)[0][1] == ["SpaceAfter=No"] * 3


@pytest.mark.parametrize("between", ["\t", " ", "   "])
def test_columns_are_read_with_the_last_as_tag_unless_another_is_named(tmp_path, between):
    data = "-DOCSTART- -X- O\n\n# a comment of five words\nEU B I\n# P O\nno D E\n\nend\tA\tB\n".replace(" ", between)
    if between != "\t":
        data = data.replace("\t", between)
    else:
        data = data.replace("# a", "#a").replace("#a\tcomment\tof\tfive\twords", "# a comment of five words")
    assert tags_of(tmp_path / "file", data) == [(["EU", " #", " no"], ["I", "O", "E"]), (["end"], ["B"])]
    assert tags_of(tmp_path / "file", data, 2) == [(["EU", " #", " no"], ["B", "P", "D"]), (["end"], ["A"])]


WORD = "1\tab\t_\tX\t_\t_\t_\t_\t_\t_\n"
BAD_TAGS = {
    "one column": ("ab\n", 0, "line 1 has one column, where a word and its tag are two"),
    "no such column": ("ab X\n", 4, "line 1 has 2 columns: there is no --tag-column 4"),
    "another number": ("ab X\ncd Y Z\n", 0, "line 2 has 3 columns, the lines before have 2"),
    "a column less": (WORD + "2\tcd\t_\tX\n", 0, "line 2 has 4 columns, the lines before have 10"),
    "no number": (WORD + WORD.replace("1", "x"), 0, "line 2 does not begin with the number of a word"),
    "no word": ("ab\tX\n \tX\n", 0, "line 2 has no word"),
    "no tag": ("ab\tX\ncd\t \n", 0, "line 2 has a label that is empty"),
    "control": ("ab X\ncd a\x1b[1m\n", 0, "line 2 has a label that has characters that cannot be shown"),
    "bidi": ("ab X\ncd a\u202eb\n", 0, "line 2 has a label that has characters that cannot be shown"),
    "long": (f"ab {'x' * 300}\n", 0, "line 1 has a label that has more than 200 characters"),
    "not UTF-8": (b"ab X\ncd \xff\n", 0, "the label of .*file line 2 is not UTF-8"),
    "UTF-16": ("ab\tX\n".encode("utf-16"), 0, "begins with the byte-order mark of UTF-16"),
    "only comments": (WORD + "\n# none\n1-2\tab\t_\tX\t_\t_\t_\t_\t_\t_\n", 0, "line 4 begins a sentence of no words"),
}


@pytest.mark.parametrize("case", BAD_TAGS)
def test_a_line_that_is_no_word_with_a_tag_is_named(tmp_path, case):
    data, column, message = BAD_TAGS[case]
    with pytest.raises(UserError, match=message) as error:
        tags_of(tmp_path / "file", data, column)
    assert "\n" not in str(error.value)


BAD_CLASSES = {
    "no tab": (b"a\tfine\nb no tab\n", "line 2 has no tab: it should be a label, a tab and a text"),
    "two tabs": (b"a\tfine\nb\tone\ttwo\n", "line 2 has 2 tabs"),
    "no text": (b"a\t \n", "line 1 has no text"),
    "an empty line": (b"a\tfine\n\nb\tfine\n", "line 2 is empty"),
    "no label": (b"\tfine\n", "line 1 has a label that is empty"),
    "not UTF-8": (b"a\tfine\n\xe4\tfine\n", "the label of .*file line 2 is not UTF-8"),
    "control": (b"a\0\tfine\n", "line 1 has a label that has characters that cannot be shown"),
    "UTF-16": ("a\tfine\n".encode("utf-16"), "begins with the byte-order mark of UTF-16"),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_a_line_that_is_no_text_with_a_class_is_named(tmp_path, case):
    data, message = BAD_CLASSES[case]
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=message):
        [*ClassFile(LabelledFile(tmp_path / "file"))]


def test_an_empty_line_of_a_class_is_no_text(tmp_path):
    (tmp_path / "file").write_bytes(b"one\r\n \ntwo")
    file = ClassFile(LabelledFile(tmp_path / "file", "pos"))
    assert [*file] == [([b"one"], ["pos"], [0]), ([b"two"], ["pos"], [2])]


def test_a_number_sign_is_a_word_of_columns_and_a_text_of_classes(tmp_path):
    assert tags_of(tmp_path / "file", "# this is a comment\n#\tP\nx\tN\n\n#\tQ\n") == [
        (["#", " x"], ["P", "N"]),
        (["#"], ["Q"]),
    ]
    (tmp_path / "file").write_text("# one\n#two\n")
    assert [record.units for record in ClassFile(LabelledFile(tmp_path / "file", "pos"))] == [[b"# one"], [b"#two"]]


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_a_label_stands_on_the_first_token_of_a_word_as_it_is_in_text(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(drawing, "BLOCK", 7)
    monkeypatch.setattr(text, "SHARD", 900)
    examples = sentences(np.random.default_rng(2), 60)
    (tmp_path / "train").write_text(conllu(examples[:50]))
    (tmp_path / "valid").write_text(conllu(examples[50:]))
    corpus = make_corpus(tmp_path / "out", Tagging(1), {name: [tmp_path / name] for name in ("train", "valid")}, kind)
    assert corpus.content == "tags"
    assert corpus.labels == ["Ta", "Tb", "Tc", "Td", "Te"]
    assert len(corpus.split("train")["shards"]) > 2
    for split, wanted in (("train", examples[:50]), ("valid", examples[50:])):
        found = records(corpus, split)
        entry = corpus.split(split)
        assert (entry["records"], entry["longest"]) == (len(wanted), max(len(tokens) for tokens, _ in found))
        assert entry["bytes"] == sum(len(" ".join(words)) + 1 for words, _ in wanted)
        texts = Counter()
        for tokens, tags in found:
            assert tokens == corpus.tokenizer.encode(corpus.tokenizer.decode(tokens), False).tolist()  # as of running text
            starts = [place for place, tag in enumerate(tags) if tag is not None]
            words = [corpus.tokenizer.decode(part.tolist()).decode() for part in np.split(tokens, starts[1:])]
            assert all(kind == "word" or word.startswith(" ") for word in words[1:])
            texts[tuple(word.strip() for word in words), tuple(tags[place] for place in starts)] += 1
        if kind != "word" or split == "train":  # else some are unknown
            assert texts == Counter((tuple(words), tuple(tags)) for words, tags in wanted)


def test_classes_are_held_out_and_cut_off_as_pairs_are(tmp_path):
    for name, letter in (("pos", "p"), ("neg", "n")):
        (tmp_path / name).write_text("".join(f"{letter}{'x' * (number % 10)} \n" for number in range(100)))
    files = {"train": [(tmp_path / "pos", "pos"), (tmp_path / "neg", "neg")]}
    corpus = make_corpus(tmp_path / "out", Classing(3, 8, {"valid": 0.1, "test": 0.2}), files)
    assert corpus.labels == ["neg", "pos"]
    found = {split: records(corpus, split) for split in ("train", "valid", "test")}
    everything = [corpus.tokenizer.decode(tokens).decode() for split in found.values() for tokens, _ in split]
    assert Counter(everything) == {f"{letter}{'x' * number}": 10 for letter in "pn" for number in range(8)}
    assert all(label == ["pos" if corpus.tokenizer.decode(tokens)[:1] == b"p" else "neg"] for tokens, label in found["train"])
    assert 12 <= len(found["valid"]) <= 20 < 26 <= len(found["test"]) <= 40
    other = make_corpus(tmp_path / "other", Classing(4, 8, {"valid": 0.1, "test": 0.2}), files)
    assert other.hash != corpus.hash


REFUSED = {
    "unknown label": ({"valid": "x\ta\nz\tb\n"}, "valid line 2 has a label that is none of the 2 of the train text"),
    "one label": ({"train": "x\ta\nx\tb\n"}, "the train text has one label: there is nothing to learn"),
    "nothing": ({"train": ""}, "there is no text in .*train"),
    "white space": ({"valid": "x\ta\nx\t\u2003\n"}, "valid line 2 has nothing but white space"),
    "white space to words": ({"valid": "x\ta\nx\t\x1e\n"}, "valid line 2 has nothing but white space"),
    "all too long": ({"valid": "x\tone two three four\n"}, "no text of the valid files is short enough"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_classes_that_nothing_can_be_made_of_are_refused_and_nothing_is_left(tmp_path, case):
    contents, message = REFUSED[case]
    for name, data in ({"train": "x\ta\ny\tb\n", "valid": "x\ta\n"} | contents).items():
        (tmp_path / name).write_text(data)
    with pytest.raises(UserError, match=message):
        make_corpus(tmp_path / "out", Classing(1, 3), {name: [tmp_path / name] for name in ("train", "valid")}, "word")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_manifest_of_labels_is_checked_and_files_of_others_are_refused(tmp_path):
    (tmp_path / "train").write_text("x\ta\ny\tb\n")
    out = make_corpus(tmp_path / "out", Classing(1), {"train": [tmp_path / "train"]}).folder
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    changes = [{"content": "pairs"}, {"content": "text"}, {"labels": ["y", "x"]}, {"labels": ["x"]}, {"labels": ["x", "y\n"]},
               {"labels": "xy"}, {"format": 1}, {"splits": {"train": entry | {"records": 3}}},
               {"splits": {"train": entry | {"longest": 99}}}]  # fmt: skip
    for change in changes:
        storage.write_json(out / "manifest.json", manifest | change)
        with pytest.raises(UserError, match="prepare"):
            Corpus(out)
    storage.write_json(out / "manifest.json", manifest | {"labels": ["x", "y", "z"]})
    with pytest.raises(UserError, match=r"tokenizer\.json is not the one its manifest names"):
        Corpus(out)
    storage.write_json(out / "manifest.json", manifest | {"splits": {"train": entry | {"longest": 2}}})
    assert len(records(Corpus(out))) == 2
    longer = entry["shards"][0] | {"records": 1}
    storage.write_json(out / "manifest.json", manifest | {"splits": {"train": entry | {"records": 1, "shards": [longer]}}})
    with pytest.raises(UserError, match="expected"):
        records(Corpus(out))


OPTIONS = {
    "two forms": ("--tags a --classes b", "give either --train or --pairs, --tags, --classes, --class or --transcripts"),
    "text and classes": ("--train a --class x=b", "give either"),
    "valid of others": ("--tags a --valid-classes b", "--valid-classes goes with --classes, which is not given"),
    "column of classes": ("--classes a --tag-column 2", "--tag-column goes with --tags"),
    "column of 0": ("--tags a --tag-column 0", "0 is not a number of at least 1"),
    "no file": ("--class pos", "--class pos: it takes LABEL=FILE"),
    "no label": ("--class =f", "--class =f: the label is empty"),
    "control": ("--class a\x1bb=f", "the label has characters that cannot be shown"),
    "field": ("--classes a --field text", "--field goes with --train: --classes reads lines of plain text"),
    "dealt": ("--tags a --deal evenly", "--deal is for text that all ranks can read"),
    "both valid": ("--class a=b --valid-class a=b --valid-fraction 0.1", "--valid-fraction takes valid from train"),
    "alone": ("--tags {rank}", "--tags has {rank}, so --out must have it too"),
    "long text": ("--train a --longest 9", "--longest goes with --pairs, --tags and --classes"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_labels_that_contradict_each_other_are_refused(tmp_path, capsys, case):
    words, message = OPTIONS[case]
    with pytest.raises((UserError, SystemExit)) as error:
        prepare.arguments([*words.split(" "), "--tokenizer", "byte", "--out", "new"])
    assert message in str(error.value) + capsys.readouterr().err


def test_the_command_takes_files_of_classes_packed_or_in_patterns(tmp_path, monkeypatch, capsys):
    import gzip

    monkeypatch.chdir(tmp_path)
    for number in range(3):
        (tmp_path / f"neg{number}.txt").write_text(f"bad {number}\n")
    (tmp_path / "pos.gz").write_bytes(gzip.compress(b"good 1\ngood 2\n"))
    (tmp_path / "more.tsv").write_text("new=er\tnews\n")
    words = "--class pos=pos.gz --class neg=neg*.txt --classes more.tsv --valid-class pos=pos.gz --tokenizer byte --out new"
    assert prepare.prepare(words.split(), MPI.COMM_SELF) == 0
    corpus = Corpus("new")
    assert sorted((bytes(tokens).decode(), *label) for tokens, label in records(corpus)) == [
        ("bad 0", "neg"), ("bad 1", "neg"), ("bad 2", "neg"), ("good 1", "pos"), ("good 2", "pos"), ("news", "new=er")
    ]  # fmt: skip
    assert "--preset classifier" in info.next_command(facts.look("new", tmp_path / "new"))
    assert info.info(["new"]) == 0
    said = capsys.readouterr().out
    assert "classes     3 labels: neg, new=er, pos" in said
    assert "train       6 records, " in said
    assert "texts: train 6, valid 2\n3 labels: neg, new=er, pos\n" in said
    assert "--preset classifier\n" in said


def asked(words):
    return prepare.arguments([*words.split(" "), "--out", "new{rank}"])[0]


UNSAID = {
    "classes": "--classes {rank}.tsv --tokenizer byte",
    "tags": "--tags {rank} --tokenizer-from public",
    "transcripts": "--transcripts {rank}.tsv --tokenizer mel",
    "classes beside a class": "--class a={rank} --classes {rank}.tsv --tokenizer byte",
}


@pytest.mark.parametrize("case", UNSAID)
def test_labels_of_private_text_are_told_only_where_the_user_says_so(case):
    with pytest.raises(UserError, match=r"--labels A,B,C or --labels FILE .* --share-labels tells"):
        asked(UNSAID[case])
    assert asked(f"{UNSAID[case]} --labels a,b").labels == "a,b"
    assert asked(f"{UNSAID[case]} --share-labels").share_labels


def test_epsilon_promises_nothing_beside_labels_that_are_shared(capsys):
    words = "--classes {rank}.tsv --tokenizer word --epsilon 2"
    with pytest.raises(UserError, match="--share-labels tells its labels: give --labels"):
        asked(f"{words} --share-labels")
    assert asked(f"{words} --labels a,b").epsilon == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"secret one\n" + b"x" * 300, "list line 2 has a label that has more than 200 characters"),
        (b"a\nsecret \x1b\n", "list line 2 has a label that has characters"),
        (b"secret\n\n", "--labels gives 1 names"),
    ],
)
def test_a_list_of_labels_that_is_none_is_refused_and_not_quoted(tmp_path, data, message):
    (tmp_path / "list").write_bytes(data)
    options = asked(f"--classes {{rank}}.tsv --tokenizer byte --labels {tmp_path}/list")
    with pytest.raises(UserError, match=message) as error:
        public_names(options, 0)
    assert "secret" not in str(error.value)


def test_names_come_from_a_list_from_classes_and_letters_from_transcripts(tmp_path):
    (tmp_path / "list").write_bytes(b"b,\r\n\na\x85c\xc2\xa0d\r\n".replace(b"\x85", b""))
    for words, names in (
        ("--class b={rank} --class a={rank}", ("a", "b")),
        ("--classes {rank} --labels b,a", ("a", "b")),
        (f"--classes {{rank}} --labels {tmp_path}/list", None),
        ("--transcripts {rank} --labels ba,c", (" ", "a", "b", "c")),
    ):
        options = asked(f"{words} --tokenizer byte")
        if names is None:  # a space that does not break is no label's
            with pytest.raises(UserError, match="list line 3 has a label"):
                public_names(options, 0)
        else:
            assert public_names(options, 0) == names


@pytest.mark.parametrize(
    ("lines", "why"),
    [([f"secret {number}" for number in range(300)], "300 labels, and 256 are"), (["secret" * 20, "b"], "more than 64 char")],
)
def test_shared_labels_of_private_text_have_limits(tmp_path, lines, why):
    (tmp_path / "text").write_text("".join(f"{line}\tx\n" for line in lines))
    names = {"train": [LabelledFile(tmp_path / "text")]}
    with pytest.raises(UserError, match=f"{why}.*right column") as error:
        prepare_corpus(MPI.COMM_SELF, names, Vocabulary("byte"), tmp_path / "out", private=True, drawing=Classing(1))
    assert "secret" not in str(error.value)
    assert len(make_corpus(tmp_path / "public", Classing(1), {"train": [tmp_path / "text"]}).labels) == len(lines)


def test_a_list_of_files_that_is_a_text_is_refused_and_not_quoted(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "list").write_text(f"{tmp_path}/real\nsecret line\n")
    with pytest.raises(UserError, match="list line 2 names no file") as error:
        listed(str(tmp_path / "list"))
    assert "secret" not in str(error.value)
    (tmp_path / "odd\x85name").write_text("x")
    (tmp_path / "list").write_text(f"{tmp_path}/odd\x85name\r\n")
    assert listed(str(tmp_path / "list")) == [f"{tmp_path}/odd\x85name"]
