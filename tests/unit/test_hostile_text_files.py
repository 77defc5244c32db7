"""Text files made to harm, and settings: refused in one line, soon, and in little memory, whoever reads them."""

import json
import os
import pathlib
import re
import shutil
import socket
import stat

import pytest
from helpers.limited import limited

from dllm import config
from dllm.data import tokenizer_files, tokenizers
from dllm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, WordTokenizer
from dllm.errors import UserError, line, printable, shown
from dllm.files import storage
from dllm.launching.mpirun import read_hosts

MEMORY = 300 << 20  # bytes that a refusal may take
SECONDS = 5  # that it may take; none takes a tenth of that where nothing else runs
REFUSE = """
import json, resource, signal
from dllm import api, cli, config
from dllm.comm import topology
from dllm.data import tokenizer_files
from dllm.files import storage
from dllm.launching import mpirun
from dllm.runs import ownership, run_folder

READERS = {
    "configuration": config.load_toml,
    "run": lambda path: run_folder.read_settings(pathlib.Path(path).parent),
    "hosts": mpirun.read_hosts,
    "edges": lambda path: topology._read(path, 2),
    "json": lambda path: storage.read_json(path, ["x"]),
    "tokenizer": lambda path: tokenizer_files.load_tokenizer(pathlib.Path(path).parent),
    "metrics": lambda path: api.metrics(pathlib.Path(path).parent),
    "owner": lambda path: ownership.owner(pathlib.Path(path).parent),
    "resize": lambda path: run_folder.take_resize_request(pathlib.Path(path).parent),
    "set": lambda path: config.from_dict(config.parse_settings(json.loads(pathlib.Path(path).read_text()))),
}
limit(int(sys.argv[1]))
for kind, path in json.loads(sys.argv[2]):
    signal.alarm(int(sys.argv[3]))  # ends a process that hangs, even in C
    code = cli.run(lambda words: print(kind, "gave", repr(READERS[kind](path))[:60], file=sys.stderr) or 0)
    print(code, flush=True)
    signal.alarm(0)
"""
NAMES = {
    "configuration": "settings.toml", "run": "config.toml", "hosts": "hosts", "edges": "edges", "json": "manifest.json",
    "tokenizer": "tokenizer.json", "metrics": "metrics.jsonl", "owner": "owner", "resize": "resize",
}  # fmt: skip
SILENT = ("owner", "resize")  # what is no such file is none


def link_to(target):
    return lambda path: path.symlink_to(target)


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 40)


NO_FILES = {  # what lies at a path: (how it comes there, what is said)
    "a pipe": (os.mkfifo, "it is not a file"),
    "a folder": (pathlib.Path.mkdir, "it is not a file"),
    "a socket": (a_socket, "it is not a file"),
    "endless zeros": (link_to("/dev/zero"), "it is not a file"),
    "a terminal": (link_to("/dev/tty"), "it is not a file|No such"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links|has no config.toml"),
    "a terabyte": (sparse, "too large: over"),
    "other bytes": (lambda path: path.write_bytes(b"\xff\xfe\0x"), "codec can't decode|is not valid JSON|is no edge"),
}


def refusals(cases, memory=MEMORY, seconds=SECONDS):
    """What each of (kind of reader, path or settings) gives on standard error, a line; and their exit codes."""
    words = [(kind, str(path)) for kind, path in cases]
    done = limited(REFUSE, memory, json.dumps(words), seconds, seconds=60 + seconds * len(words))
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases), done.stderr
    return list(zip(lines, map(int, done.stdout.split()), strict=True))


def test_what_is_no_small_file_is_refused_by_all_who_read_one(tmp_path):
    cases, expected = [], []
    for number, (case, (make, says)) in enumerate(NO_FILES.items()):
        for kind, name in NAMES.items():
            folder = tmp_path / f"{number}-{kind}"
            folder.mkdir()
            make(folder / name)
            cases.append((kind, folder / name))
            expected.append((case, kind, f"{kind} gave None" if kind in SILENT else f"dllm: .*{kind}/{name}.*({says})"))
            if (case, kind) == ("a link to itself", "run"):
                expected[-1] = case, kind, "dllm: .*is not the folder of a run"
            if (case, kind) == ("other bytes", "configuration"):
                expected[-1] = case, kind, "dllm: cannot read the configuration .*codec can't decode"
    for (text, code), (case, kind, says) in zip(refusals(cases), expected, strict=True):
        assert re.match(says, text), (case, kind, text)
        assert code == (0 if kind in SILENT else 2), (case, kind)


HOSTILE_TOML = {  # (what a file holds, what is said)
    "a long key": ("a" + ".a" * 50_000 + " = 1", "a key of so many parts"),
    "a long key with spaces": ("a" + "\t. a" * 9_000 + " = 1", "a key of so many parts"),
    "a long quoted key": ("'=' " + '. "#\\"\'"' * 9_000 + " = 1", "a key of so many parts"),
    "a long key behind strings": ('x = """"\n# " ' + "'''\n\"\"\"\ny" + ".y" * 40_000 + " = 1", "a key of so many parts"),
    "a long key of a table": ("[" + "a." * 50_000 + "a]", "a key of so many parts"),
    "a long key of an inline table": ("x = {" + "a." * 50_000 + "a = 1}", "a key of so many parts"),
    "deep lists": ("x = " + "[" * 60_000, "nested too deeply"),
    "deep tables": ("x = " + "{a = " * 20_000, "nested too deeply"),
    "a megabyte": ("#" * (1 << 20), "too large: over 128 kB"),
    "endless digits": ("x = " + "1" * 100_000, "4300 digits"),
    "NUL": ("x = '\0'", r"Found invalid character '\\x00'"),
    "an unended string": ('x = """' + '\\"""' * 30_000, "Unterminated string|Expected"),
}
HOSTILE_SETTINGS = {
    "train.lr=" + "[" * 100_000: r"train\.lr = '\[\[\[.*\.\.\.: it takes a number",
    "train.lr=" + "{a=" * 40_000: r"train\.lr = '\{a=.*: it takes a number",
    "train.lr={" + "a." * 5 + "a=1}": r"train\.lr = \{'a': .*: it takes a number",
    "train.lr=[" + "[" * 80 + "]" * 81: r"train\.lr = \[\[.*: it takes a number",
    "train.lanes=0x" + "f" * 100_000: r"train\.lanes = a number of too many digits: it must be",
    "train.lr=0x" + "f" * 100_000: r"train\.lr = inf: it must be a finite number",
    "train.optimizer=" + "x" * 5000: r"train\.optimizer = 'xxx.*\.\.\.: it has 5,000 characters, at most 4,096",
    "train.optimizer=" + "x" * 4000: r"train\.optimizer = x+: it is one of",
    'data.path="a\\u001b[31m"': r"data\.path = 'a\\x1b\[31m': it must have printable characters alone",
    'averaging.topology="a\\u0000"': r"averaging\.topology = 'a\\x00': it must have printable",
    'data.path="\u202e"': r"data\.path = '\\u202e': it must have printable",
    "log.prompt=\udcff": r"log\.prompt = '\\udcff': it must be UTF-8",
    "x" * 100_000: "--set x{80}: write it as section.key=value",
    "x" * 50_000 + ".y=1": "unknown section 'x{80}'",
    "train." + "y" * 50_000 + "=1": r"unknown key 'train\.y{80}'",
    "train.\x1b[31m\n=1": r"unknown key 'train\.\\u001b\[31m\\n?.*'",
}


def test_hostile_settings_are_refused_soon(tmp_path):
    cases, expected = [], []
    for number, (text, says) in enumerate(HOSTILE_TOML.values()):
        for name in ("settings.toml", "config.toml"):
            path = tmp_path / str(number) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            cases.append(("configuration" if name == "settings.toml" else "run", path))
            expected.append(f"dllm: .*{number}/{name}.*{says}")
    for number, (setting, says) in enumerate(HOSTILE_SETTINGS.items()):
        path = tmp_path / f"set{number}"
        path.write_text(json.dumps([setting]))
        cases.append(("set", path))
        expected.append(f"dllm: {says}")
    for (text, code), says in zip(refusals(cases), expected, strict=True):
        assert re.match(says, text), (says, text)
        assert code == 2
        assert text.isprintable()
        assert len(text) < 600


def test_a_prompt_may_have_lines_and_dots(tmp_path):
    prompt = "a.b.c.d.e.f.g.h.i.j.k.l\n\t\"'''#"
    path = tmp_path / "settings.toml"
    path.write_text(f"[log]\nprompt = {json.dumps(prompt)}\n")
    assert config.resolve("default", path).log.prompt == prompt
    for setting in ("log.prompt=a.b.c.d.e.f.g.h.i.j.k.l.m.n", "log.prompt='a.b.c.d.e.f.g.h.i.j.k.l.m.n'"):
        assert config.resolve("default", settings=[setting]).log.prompt == "a.b.c.d.e.f.g.h.i.j.k.l.m.n"


def test_what_a_run_writes_of_the_longest_settings_is_read(tmp_path):
    from dllm.runs import run_folder

    long = {"data.path": "\U00010000", "averaging.topology": "\u4e00", "averaging.method": "\\", "log.prompt": "\0"}
    sections = {}
    for name, letter in long.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = letter * 4096
    settings = config.from_dict(sections)
    run_folder.create(tmp_path / "run", settings, ByteTokenizer())
    assert run_folder.read_settings(tmp_path / "run") == settings


def test_marks_and_ends_of_lines_of_other_systems_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf[model]\r\nhidden = 7\r\n")
    assert config.load_toml(path) == {"model": {"hidden": 7}}
    path.write_bytes(b"\xef\xbb\xbfnode1 slots=2\r\n# more\r\nnode2\r\n")
    assert read_hosts(path) == {"node1": 2, "node2": 1}


@pytest.mark.parametrize("text", ["node1 slots=" + "9" * 5000, "n" * 100_000, "node1:0", "\x1b[31m", "-oProxyCommand=x"])
def test_hosts_that_are_none_are_refused_in_a_short_line(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=r"hosts, line 1: .* is no host") as error:
        read_hosts(path)
    assert len(str(error.value)) < 250 + len(str(path))
    assert str(error.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "file"
    path.touch(mode=0)
    with pytest.raises(UserError, match=f"^cannot read the hosts in {path}: Permission denied$"):
        read_hosts(path)


@pytest.mark.parametrize("read", [storage.read_text, config.load_toml, read_hosts, lambda path: storage.read_json(path, [])])
def test_a_name_with_nul_is_refused(read):
    with pytest.raises(UserError, match="null"):
        read("a\0b")


def test_what_takes_a_files_place_after_it_was_looked_at_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(storage, "check_regular", lambda path, what="": None)
    with pytest.raises(UserError, match=r"pipe: it is not a file$"):
        storage.read_text(tmp_path / "pipe")


JSON_BOMBS = {
    "lists": "[" + "[]," * 20_000_000 + "[]]",
    "objects": '{"x":[' + "{}," * 20_000_000 + "{}]}",
    "numbers": "[" + "1," * 30_000_000 + "1]",
}


@pytest.mark.parametrize("case", JSON_BOMBS)
def test_json_of_many_values_is_refused_in_the_memory_of_its_text(tmp_path, case):
    path = tmp_path / "manifest.json"
    path.write_text(JSON_BOMBS[case])
    ((text, code),) = refusals([("json", path)], memory=200 << 20)
    assert re.match(r"dllm: .*manifest.json holds too much: over 4,194,304 values", text), text
    assert code == 2


# --- tokenizers


def bpe(**changes):
    """tokenizer.json of a byte-pair encoding of three tokens, with changes in its model."""
    blank = json.loads(BPETokenizer._blank().to_str())
    blank["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]} | changes
    return {"kind": "bpe", "model": blank}


HOSTILE_TOKENIZERS = {  # those marked made the library panic, or end the process, when they were let through
    "a prefix": bpe(continuing_subword_prefix="##"),  # panicked
    "a long prefix": bpe(continuing_subword_prefix="#" * 6),  # panicked
    "a prefix of two bytes": bpe(continuing_subword_prefix="\u00e9"),  # panicked
    "a prefix that cuts a letter": bpe(
        continuing_subword_prefix="##", vocab={"x": 0, "a\u00fc": 1, "x\u00bc": 2}, merges=[["x", "a\u00fc"]]
    ),  # ended the process
    "a suffix": bpe(end_of_word_suffix="</w>"),
    "an unknown token": bpe(unk_token="zz"),
    "bytes as a last resort": bpe(byte_fallback=True),
    "drawn merges": bpe(dropout=0.5),
    "another model": {"kind": "bpe", "model": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "u"}}},
    "a key too many": bpe(more=1),
    "no model": {"kind": "bpe", "model": None},
    "an empty token": bpe(vocab={"": 0, "a": 1}, merges=[["", "a"]]),
    "a gap": bpe(vocab={"a": 0, "b": 4_000_000_000}, merges=[]),
    "a number twice": bpe(vocab={"a": 0, "b": 0}, merges=[]),
    "true for 1": bpe(vocab={"a": 0, "b": True}, merges=[]),
    "a negative number": bpe(vocab={"a": 0, "b": -1}, merges=[]),
    "a merge of nothing": bpe(merges=[["a", "x"]]),
    "a merge of three": bpe(merges=[["a", "b", "a"]]),
    "a merge twice": bpe(merges=[["a", "b"], ["a", "b"]]),
    "a merge of numbers": bpe(merges=[[0, 1]]),
    "no byte": bpe(vocab={"a": 0, "\u4e00": 1}, merges=[]),
    "merges of text": bpe(merges="ab"),
    "a long token": bpe(vocab={"a": 0, "a" * 5000: 1}, merges=[]),
    "a list for a vocabulary": bpe(vocab=["a"], merges=[]),
    "a word twice": {"kind": "word", "units": ["a", "a"]},
    "an empty word": {"kind": "word", "units": [""]},
    "a long word": {"kind": "word", "units": ["x" * 5000]},
    "words of one string": {"kind": "word", "units": "abc"},
    "words of an object": {"kind": "word", "units": {"a": 0}},
    "a kind that is a list": {"kind": ["word"], "units": []},
    "two million words": {"kind": "word", "units": [f"{number:x}" for number in range(2_000_000)]},
}


@pytest.fixture(scope="module")
def of_tokenizers(tmp_path_factory):
    """case -> (the line, the exit code) of every hostile tokenizer, in one process."""
    world = tmp_path_factory.mktemp("tokenizers")
    for number, value in enumerate(HOSTILE_TOKENIZERS.values()):
        (world / str(number)).mkdir()
        (world / str(number) / "tokenizer.json").write_text(json.dumps(value))
    paths = [("tokenizer", world / str(number) / "tokenizer.json") for number in range(len(HOSTILE_TOKENIZERS))]
    return dict(zip(HOSTILE_TOKENIZERS, refusals(paths, memory=500 << 20), strict=True))


@pytest.mark.parametrize("case", HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_is_one_line(of_tokenizers, case):
    text, code = of_tokenizers[case]
    assert re.match(r"dllm: \S+/tokenizer.json holds no tokenizer that this version knows.*; prepare the data anew$", text), (
        text
    )
    assert code == 2
    assert len(text) < 400


def test_what_was_not_attacked_is_a_tokenizer():
    assert tokenizers.load(bpe(), "x").encode(b"abba").tolist() == [2, 1, 0]
    assert tokenizers.load(bpe(merges=["a b"]), "x").encode(b"ab").tolist() == [2]  # as older versions of the library write it


def test_a_tokenizer_of_76_megabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "word", "units": [f"word{number:08d}" for number in range(4_750_000)]}))
    assert path.stat().st_size > 75_000_000
    ((text, code),) = refusals([("tokenizer", path)], memory=100 << 20)
    assert text == f"dllm: {path} is too large: over 65,536 kB"
    assert code == 2


LARGEST = """
from dllm.data import tokenizer_files
limit(1 << 30)
print(tokenizer_files.load_tokenizer(sys.argv[1]).size)
"""


def test_the_largest_tokenizer_that_prepare_makes_is_read(tmp_path):
    """A million words of a language of three bytes a letter, within a minute on a busy machine and 1 GB."""
    counts = {f"\u0905\u0906\u0907{number:06x}": 1 for number in range(tokenizers.MOST_TOKENS - 1)}
    tokenizer = WordTokenizer.build(counts | {"x" * 5000: 9}, 0)
    assert tokenizer.size == tokenizers.MOST_TOKENS
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    done = limited(LARGEST, tmp_path, seconds=60)
    assert done.stdout == f"{tokenizers.MOST_TOKENS}\n", done.stderr[-500:]


def test_prepare_refuses_what_it_would_not_read():
    with pytest.raises(UserError, match=r"the text has 1,048,577 words: keep the most frequent 1,048,576 by --vocab-size"):
        WordTokenizer.build({f"{number:x}": 1 for number in range(tokenizers.MOST_TOKENS + 1)}, 0)
    with pytest.raises(UserError, match=r"--vocab-size 262145: bpe has at most 262,144 tokens"):
        BPETokenizer.build({}, 262_145)


def test_words_that_are_too_long_are_unknown(tmp_path):
    long = "x" * (tokenizers.LONGEST_TOKEN + 1)
    tokenizer = WordTokenizer.build(WordTokenizer.count(f"a b {long} a\n".encode()), 0)
    assert long not in tokenizer.units
    assert tokenizer.decode(tokenizer.encode(f"a {long} b\n".encode())) == b"a <unk> b\n"
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    assert tokenizer_files.load_tokenizer(tmp_path).size == tokenizer.size


def test_byte_pair_encoding_makes_no_tokens_that_are_too_long(tmp_path):
    text = ("x" * 20_000 + "\n").encode()
    tokenizer = BPETokenizer.build(BPETokenizer.count(text), 300)
    assert max(map(len, tokenizer._pieces)) <= tokenizers.LONGEST_TOKEN
    tokenizer_files.save_tokenizer(tmp_path, tokenizer)
    found = tokenizer_files.load_tokenizer(tmp_path)
    assert tokenizer_files.tokenizer_hash(found) == tokenizer_files.tokenizer_hash(tokenizer)
    assert found.decode(found.encode(text)) == text


def test_a_vocabulary_too_large_for_its_file_is_refused_when_it_is_written(tmp_path):
    units = [f"{number:05d}" + "x" * 4000 for number in range(20_000)]
    with pytest.raises(UserError, match=r"tokenizer.json is too large: over 65,536 kB"):
        tokenizer_files.save_tokenizer(tmp_path, CharTokenizer(units))
    assert list(tmp_path.iterdir()) == []


# --- what is written of an error, and names


def test_a_message_is_one_printable_line():
    hostile = "a\x1b[2J\r\nb\u202ec\u2028d\x9b\0\udcff\U000e0001e\u00e9\u4e00"
    text = line(UserError(hostile))
    assert text == "dllm: a\\u001b[2J\\u000d\\u000ab\\u202ec\\u2028d\\u009b\\u0000\\udcff\\U000e0001e\u00e9\u4e00\n"
    assert printable("plain words: 'x' = 1.5%") == "plain words: 'x' = 1.5%"
    assert len(line(UserError("x" * 1_000_000), " (rank 3)")) < 4100
    assert line(UserError("x" * 1_000_000), " (rank 3)").endswith("... (rank 3)\n")


def test_values_are_shown_in_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "values nested too deeply"
    assert shown(1 << 100_000) == "a number of too many digits"
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown(1.5) == "1.5"
    while deep:  # so that Python does not recurse when it is freed
        (deep,) = deep


def test_nobody_can_foresee_the_name_of_a_temporary_file(tmp_path):
    """In a folder where others may write, a link under that name would lead what is written elsewhere."""
    victim, names = tmp_path / "victim", set()
    victim.write_text("mine")
    for _ in range(3):
        with storage.atomic(tmp_path / "file") as temporary:
            names.add(temporary.name)
            temporary.touch()
    assert len(names) == 3
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(victim)  # what it was called
    storage.write_text(tmp_path / "file", "new")
    assert victim.read_text() == "mine"
    assert stat.S_ISREG(os.lstat(tmp_path / "file").st_mode)


def test_a_link_where_a_temporary_file_is_to_be_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(os, "urandom", bytes)
    for write in (lambda path: storage.write_text(path, "new"), lambda path: _hdf5(path)):
        (tmp_path / f".file.{'00' * 8}.tmp").symlink_to(victim)
        with pytest.raises(FileExistsError):
            write(tmp_path / "file")
        assert victim.read_text() == "mine"
        shutil.rmtree(tmp_path / "file", ignore_errors=True)


def _hdf5(path):
    from dllm.files import hdf5

    hdf5.write_arrays(path, {})
