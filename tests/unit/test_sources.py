"""Texts as people have them: packed, in records, with marks and line ends of other systems, from pipes, folders and URLs."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import pathlib
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from dllm.comm import runtime
from dllm.data import formats, preparation, source_names, sources, text
from dllm.data.sources import Reading, plain_files
from dllm.data.tokenizer_files import save_tokenizer
from dllm.data.tokenizers import KINDS, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError

LINES = [f"wört {number} says {number * 7919 % 1000}" * (number % 7) for number in range(3000)]
PLAIN = "".join(f"{line}\n" for line in LINES).encode()
RECORDS = "".join(json.dumps({"id": n, "text": line, "more": [{"text": 1}]}) + "\n" for n, line in enumerate(LINES)).encode()
ALONE = SimpleNamespace(rank=0, size=1)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """One rank without MPI."""
    monkeypatch.setattr(sources, "together", lambda comm: __import__("contextlib").nullcontext())
    for module in (sources, source_names):
        monkeypatch.setattr(module.messages, "allgather", lambda comm, mine, kind: [mine])
        monkeypatch.setattr(module.messages, "broadcast", lambda comm, mine, kind: mine)


def read(tmp_path, names, reading=None, split="train", **more):
    """What the files of a split hold, and that nothing is left."""
    names = source_names.named(map(str, names))
    before = sorted(tmp_path.rglob("*"))
    with plain_files(ALONE, {"train": names, **more}, tmp_path / "new" / "er", reading or Reading(), False, print) as files:
        found = b"".join(pathlib.Path(file.path).read_bytes() for file in files[split])
    assert sorted(tmp_path.rglob("*")) == before
    return found


def zstd(data):
    return pytest.importorskip("backports.zstd").compress(data)


def parquet(path, column, rows):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({column: rows, "n": list(range(len(rows)))}), path, row_group_size=700)


PACKINGS = {
    "gz": gzip.compress, "two gz in a row": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd, "gz in zst": lambda data: zstd(gzip.compress(data)),
    "two zst in a row": lambda data: zstd(data[:999]) + zstd(data[999:]), "as it is": lambda data: data,
}  # fmt: skip


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_packed_text_and_records_are_found_by_what_they_hold(tmp_path, pack):
    (tmp_path / "text.dat").write_bytes(pack(PLAIN))
    (tmp_path / "records.dat").write_bytes(pack(RECORDS))
    assert read(tmp_path, [tmp_path / "text.dat"]) == PLAIN
    assert read(tmp_path, [tmp_path / "records.dat"], Reading("text")) == PLAIN


def test_parquet_from_a_file_packed_and_by_a_pipe(tmp_path):
    parquet(tmp_path / "p", "text", LINES)
    assert read(tmp_path, [tmp_path / "p"], Reading("text")) == PLAIN
    (tmp_path / "p.gz").write_bytes(gzip.compress((tmp_path / "p").read_bytes()))
    assert read(tmp_path, [tmp_path / "p.gz"], Reading("text")) == PLAIN
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "p").read_bytes()), daemon=True).start()
    assert read(tmp_path, [tmp_path / "pipe"], Reading("text")) == PLAIN


@pytest.mark.parametrize("data", [PLAIN, gzip.compress(PLAIN), b"x"])
def test_a_pipe_is_read_to_its_end(tmp_path, data):
    os.mkfifo(tmp_path / "pipe")

    def write():
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            pipe.write(data[:1])
            pipe.write(data[1:])

    threading.Thread(target=write, daemon=True).start()
    assert read(tmp_path, [tmp_path / "pipe"]) == (PLAIN if len(data) > 1 else data)


def test_what_says_it_is_empty_and_is_not(tmp_path):
    assert read(tmp_path, ["/proc/self/status"]).startswith(b"Name:")


def test_a_document_ends_with_a_line(tmp_path):
    texts = ["a", "b\n", "", "c\nd", "e\r\n", "\n"]
    (tmp_path / "r").write_text("\ufeff" + "\n\r\n".join(json.dumps({"text": one}) for one in texts))
    assert read(tmp_path, [tmp_path / "r"], Reading("text")) == b"a\nb\n\nc\nd\ne\r\n\n"


HOSTILE = {  # what a file holds: (bytes, field, what is said)
    "a cut gz": (gzip.compress(PLAIN)[:-20], "", "Compressed file ended|end-of-stream"),
    "a cut xz": (lzma.compress(PLAIN)[:-20], "", "Compressed file ended"),
    "a cut bz2": (bz2.compress(PLAIN)[:-20], "", "Compressed file ended"),
    "a damaged gz": (gzip.compress(PLAIN)[:99] + b"\0" * 99, "", "Error -3|invalid|incorrect|end-of-stream|CRC"),
    "gz in gz in gz": (gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"x")))), "", "packed more than 3 times"),
    "no field": (b'{"text": "a"}\n{"txt": "a"}\n', "text", "line 2 is no record of JSON with a text 'text' .*missing"),
    "null": (b'{"text": null}\n', "text", "line 1 is no record of JSON .*got `null`"),
    "a number": (b'{"text": 3}\n', "text", "line 1 is no record of JSON"),
    "plain text": (b"some words\n", "text", "line 1 is no record of JSON"),
    "a list": (b'[{"text": "a"},\n{"text": "b"}]\n', "text", "line 1 is no record of JSON"),
    "half a character": (b'{"text": "\\ud800"}\n', "text", "line 1 is no record of JSON"),
    "no UTF-8": (b'{"text": "\xff"}\n', "text", "line 1 is no record of JSON"),
    "deep lists": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b', "text": "x"}\n', "text", "line 1 is nested too deeply"),
    "a cut zst": (lambda: zstd(PLAIN)[:-20], "", "Compressed file ended"),
    "no Parquet": (b"PAR1 is not all that it takes", "text", "Parquet|pip install 'dllm"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_read_is_named_in_one_line_and_nothing_is_left(tmp_path, case):
    data, field, says = HOSTILE[case]
    (tmp_path / "bad").write_bytes(data() if callable(data) else data)
    with pytest.raises(UserError, match=f"cannot read .*bad: .*({says})"):
        read(tmp_path, [tmp_path / "bad"], Reading(field))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "bad"]


def test_a_parquet_without_the_column_with_gaps_or_numbers(tmp_path):
    parquet(tmp_path / "p", "txt", LINES)
    for field, says in ("text", r"it has no column 'text'; it has txt, n"), ("n", "its column 'n' is no text, but int64"):
        with pytest.raises(UserError, match=f"cannot read .*/p: {says}"):
            read(tmp_path, [tmp_path / "p"], Reading(field))
    with pytest.raises(UserError, match="Parquet file: say by --field"):
        read(tmp_path, [tmp_path / "p"])
    parquet(tmp_path / "q", "text", ["a", None])
    with pytest.raises(UserError, match="row 2 has no 'text'"):
        read(tmp_path, [tmp_path / "q"], Reading("text"))


def test_a_record_of_endless_length_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_RECORD", 1000)
    (tmp_path / "r").write_bytes(b'{"text": "' + b"x" * 5000)
    with pytest.raises(UserError, match="line 1 has over 0 MiB"):
        read(tmp_path, [tmp_path / "r"], Reading("text"))


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_a_line_of_endless_length_is_not_held_out(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_RECORD", 1000)
    (tmp_path / "t").write_bytes(pack(b"short\n" * 2 + b"x" * 5000))
    with pytest.raises(UserError, match=r"cannot read .*/t: line 3 has over 0 MiB"):
        read(tmp_path, [tmp_path / "t"], Reading(held_out={"valid": 0.5}))
    assert len(read(tmp_path, [tmp_path / "t"])) == 5012


def test_what_unpacks_to_more_than_the_disk_is_stopped_before_it_is_full(tmp_path, monkeypatch):
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(48 << 20), 1))
    left, usage = iter([1 << 30, 1 << 28, 1 << 20]), sources.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage._replace(total=1 << 34, free=next(left)))
    with pytest.raises(UserError, match=r"bomb has over 33,554,432 bytes of text, and the disk of .* is nearly full"):
        read(tmp_path, [tmp_path / "bomb"])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "bomb"]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
def test_a_packed_file_takes_little_memory_whatever_comes_out_of_it(tmp_path, pack):
    (tmp_path / "much").write_bytes(pack(b"some words, again and again\n" * 1_500_000))
    folder = tmp_path / "folder"
    folder.mkdir()
    tracemalloc.start()
    try:
        sources._write(sources._Source("train", str(tmp_path / "much")), 0, folder, Reading())
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (folder / "000000-train").stat().st_size == 1_500_000 * 28
    assert most < 16 << 20  # of 42 MB; a decoder of xz has 9


def test_names_of_files_folders_patterns_and_lists(tmp_path):
    for name in ("b.txt", "a.txt", "in/c.txt", "in/.hidden", ".git/x", "empty/.keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list").write_text(f"{tmp_path}/b.txt\r\n\n{tmp_path}/in\n")
    named = lambda *words: [name.removeprefix(f"{tmp_path}/") for name in source_names.named(f"{tmp_path}/{w}" for w in words)]
    assert named("b.txt", "nothing") == ["b.txt", "nothing"]
    assert named("*.txt") == ["a.txt", "b.txt"]
    assert named("**/*.txt") == ["a.txt", "b.txt", "in/c.txt"]
    assert named("in", "a.txt") == ["in/c.txt", "a.txt"]
    assert source_names.named(source_names.listed(tmp_path / "list")) == [f"{tmp_path}/b.txt", f"{tmp_path}/in/c.txt"]
    (tmp_path / "[x]*").touch()
    assert named("[x]*") == ["[x]*"]  # what is there is no pattern
    for nothing in ("*.md", "empty"):
        with pytest.raises(UserError, match="no file is at"):
            named(nothing)
    assert source_names.named(["-", "/dev/stdin"]) == ["-", "-"]


def test_a_folder_below_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").touch()
    look = os.scandir

    def scandir(path):  # root may look everywhere
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}/in/closed: Permission denied$"):
        source_names.named([f"{tmp_path}/in"])


def test_urls_are_read_by_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe({"/texts/b.gz": gzip.compress(b"b\n"), "/texts/a": b"a\n"})
    assert read(tmp_path, ["memory://texts/b.gz"]) == b"b\n"
    assert read(tmp_path, ["memory://texts"]) == read(tmp_path, ["memory://texts/*"]) == b"a\nb\n"
    with pytest.raises(UserError, match=r"cannot read memory://nothing: "):
        read(tmp_path, ["memory://nothing"])
    with pytest.raises(UserError, match=r"cannot read nothing://x: Protocol not known"):
        source_names.named(["nothing://x"])


def test_a_stream_twice_or_for_several_disks_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is given twice: a stream can be read once"):
        read(tmp_path, [tmp_path / "pipe"], valid=[str(tmp_path / "pipe")])
    made = [sources._Source("train", str(tmp_path / "pipe"))]
    two = sources.Domains(0, (0, 1), ("here", "there"))
    with pytest.raises(UserError, match=r"pipe can be read once, but ranks \(here and there\) see different disks"):
        sources._check_streams(SimpleNamespace(size=2), made, two, False)
    with pytest.raises(UserError, match="mpirun does not hand on a long standard input: name a pipe that mkfifo makes"):
        sources._check_streams(
            SimpleNamespace(size=2), [sources._Source("train", "-")], sources.Domains(0, (0, 0), ("a", "a")), False
        )


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_closed_standard_input_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setattr(sources.sys, "stdin", None)  # as Python has it then
    with pytest.raises(UserError, match=r"^cannot read -: standard input is closed$"):
        read(tmp_path, [name])


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_share_the_reading_and_each_source_has_one_reader(ranks):
    all_of_them = [sources._Source("train", str(number)) for number in range(7)]
    domains = [sources.Domains(rank, (0,) * ranks, ("a",) * ranks) for rank in range(ranks)]
    shares = [sources._my_share(all_of_them, {1, 2, 4, 6}, domain) for domain in domains]
    assert sorted(itertools.chain(*shares)) == [1, 2, 4, 6]
    assert max(map(len, shares)) == -(-4 // ranks)


# parts of the train text


def test_a_share_of_lines_or_documents_is_held_out_by_the_seed(tmp_path):
    (tmp_path / "t").write_bytes(PLAIN)
    (tmp_path / "r").write_bytes(RECORDS)
    reading = lambda field, seed=1: Reading(field, False, {"valid": 0.1, "test": 0.05}, seed)
    parts = {split: read(tmp_path, [tmp_path / "t"], reading(""), split) for split in ("train", "valid", "test")}
    assert sorted(b"".join(parts.values()).split(b"\n")) == sorted(PLAIN.split(b"\n"))
    sizes = {split: part.count(b"\n") for split, part in parts.items()}
    assert abs(sizes["valid"] - 300) < 60
    assert abs(sizes["test"] - 150) < 45
    assert parts == {split: read(tmp_path, [tmp_path / "r"], reading("text"), split) for split in parts}
    assert parts["valid"] != read(tmp_path, [tmp_path / "t"], reading("", 2), "valid")
    places = [PLAIN.index(line) for line in parts["valid"].splitlines() if len(line) > 20]
    assert len(places) > 100
    assert places == sorted(places)


@pytest.mark.parametrize(("lines", "share", "empty"), [(50, 0.0001, "valid"), (3, 0.999, "train")])
def test_a_share_of_too_few_lines_is_named_by_its_fraction(tmp_path, lines, share, empty):
    (tmp_path / "t").write_bytes(b"a line\n" * lines)
    with pytest.raises(UserError, match=f"^--valid-fraction {share} gives {empty} none of so few documents or lines"):
        read(tmp_path, [tmp_path / "t"], Reading(held_out={"valid": share}))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "t"]


def test_no_text_at_all_is_not_the_fault_of_a_fraction(tmp_path):
    (tmp_path / "t").touch()
    assert read(tmp_path, [tmp_path / "t"], Reading(held_out={"valid": 0.1})) == b""


# what a file of text is


def encoded(kind, paths, exact=False, piece=1 << 20):
    """The text that the tokens of files say, and its bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", piece)
        patch.setattr(text, "SHARD", 2 * piece)
        plan = text.plan_text([text.TextFile(str(path), str(path), exact) for path in paths])
    pieces = list(itertools.chain.from_iterable(plan))
    counts = sum((piece.count(kind) for piece in pieces), kind.count(b""))
    tokenizer = kind.build(counts, 300 if kind is BPETokenizer else 0)
    parts = [piece.encode(tokenizer) for piece in pieces]
    return tokenizer.decode(np.concatenate([part.tokens for part in parts])), sum(part.size for part in parts)


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("kind", [CharTokenizer, WordTokenizer, BPETokenizer])
def test_text_has_no_mark_one_kind_of_line_end_and_files_are_not_glued_together(tmp_path, kind, piece):
    files = b"\xef\xbb\xbfone two\r\nthree\r\n\r\n", b"four", b"\xef\xbb\xbf", b"\xef\xbb\xbffive \xc3\x9f\n", b"six"
    for number, data in enumerate(files):
        (tmp_path / str(number)).write_bytes(data)
    whole = "one two\nthree\n\nfour\nfive ß\nsix".encode()
    found, size = encoded(kind, sorted(tmp_path.iterdir()), piece=piece)
    assert (found.removesuffix(b"\n"), size) == (whole, len(whole))


@pytest.mark.parametrize("kind", [ByteTokenizer, BPETokenizer, CharTokenizer])
def test_bytes_are_kept_by_the_byte_tokenizer_and_where_that_is_wanted(tmp_path, kind):
    files = b"\xef\xbb\xbfone\r\n", b"two", b"three\r\n"
    for number, data in enumerate(files):
        (tmp_path / str(number)).write_bytes(data)
    assert encoded(kind, sorted(tmp_path.iterdir()), exact=kind is not ByteTokenizer)[0] == b"".join(files)


@pytest.mark.parametrize("kind", [name for name, cls in KINDS.items() if not cls.fixed])
@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path, kind, codec):
    (tmp_path / "t").write_bytes(("\ufeff" if codec.endswith("be") else "").encode(codec) + "wörter".encode(codec))
    with pytest.raises(UserError, match=r"t begins with the byte-order mark of UTF-16, and is not UTF-8; convert it"):
        encoded(KINDS[kind], [tmp_path / "t"])


def test_the_place_of_a_byte_that_is_not_utf8_is_that_in_the_file(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\xff")
    with pytest.raises(UserError, match="t is not UTF-8 at byte 9;"):
        encoded(CharTokenizer, [tmp_path / "t"])


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_kind_that_is_taken_is_warmed_up_and_no_other(tmp_path, kind, monkeypatch):
    warmed = []
    monkeypatch.setattr(runtime, "allgather", lambda comm, mine, kind: [mine])
    monkeypatch.setattr(Tokenizer, "warm_up", classmethod(lambda cls: warmed.append(cls.kind)))
    monkeypatch.delattr(BPETokenizer, "warm_up")
    save_tokenizer(tmp_path, KINDS[kind].build(KINDS[kind].count(b"some text"), 256 + 10))
    work = preparation._Preparation(ALONE, sources.Domains(0, (0,), ("",)), tmp_path, 0, print, None)
    assert work.tokenizer({}, Vocabulary(folder=tmp_path)).kind == kind
    assert warmed == [kind]
