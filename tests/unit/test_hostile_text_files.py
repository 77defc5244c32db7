"""Text files made to harm, and settings: refused in one line, soon, and in little memory, whoever reads them."""

import json
import os
import pathlib
import re
import shutil
import socket
import stat

import pytest
from helpers.limited import refusals

from dllm import config
from dllm.data.tokenizers import ByteTokenizer
from dllm.errors import UserError, line, printable, shown
from dllm.files import storage
from dllm.launching.mpirun import read_hosts

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
    "open strings": ("x = " + '"\\' * 65_000, "Unescaped"),
    "open strings in lines": ("x = '" * 20_000 + "\n", "Expected|Unclosed|Invalid|Unescaped|Unterminated"),
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
    "train.\x1b[31m\n=1": r"unknown key 'train\.\\u001b\[31m'",
}


def test_hostile_settings_are_refused_soon(tmp_path):
    cases, expected = [], []
    for number, (text, says) in enumerate(HOSTILE_TOML.values()):
        for name in ("settings.toml", "config.toml"):
            path = tmp_path / str(number) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            cases.append(("configuration" if name == "settings.toml" else "run", path))
            expected.append(f"dllm: .*{number}/{name}.*({says})")
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


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path, user = tmp_path / "file", os.geteuid()
    path.touch(mode=0)
    os.seteuid(user or 65534)  # root may read anything
    try:
        with pytest.raises(UserError, match=f"^cannot read the hosts in {path}: Permission denied$"):
            read_hosts(path)
    finally:
        os.seteuid(user)


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


@pytest.mark.slow
@pytest.mark.parametrize("case", JSON_BOMBS)
def test_json_of_many_values_is_refused_in_the_memory_of_its_text(tmp_path, case):
    path = tmp_path / "manifest.json"
    path.write_text(JSON_BOMBS[case])
    ((text, code),) = refusals([("json", path)], memory=200 << 20)
    assert re.match(r"dllm: .*manifest.json holds too much: over 4,194,304 values", text), text
    assert code == 2


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
