"""A folder that is made aside: of several that make it exactly one succeeds, and what a crash left is in nobody's way."""

import os
import pathlib
import time

import pytest

from dllm.data.new_folder import OLD, NewFolder, left_over
from dllm.errors import UserError


@pytest.mark.parametrize("inside", [False, True])
def test_of_two_that_make_a_folder_one_succeeds(tmp_path, inside):
    out = tmp_path / "some" / "corpus"
    if inside:
        out.mkdir(parents=True)
    first, second = NewFolder(out, "1"), NewFolder(out, "2")
    for one in (first, second):
        one.make()
        for name in ("manifest.json", "tokenizer.json"):
            (one.place / name).write_text(one.place.name)
    (second.place / "test-00000.h5").touch()
    first.finish()
    with pytest.raises(UserError, match=f"another prepare has made --out {out} meanwhile"):
        second.finish()
    second.undo()
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "manifest.json": first.place.name,
        "tokenizer.json": first.place.name,
    }
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        NewFolder(out, "3")
    first.undo()
    assert list(tmp_path.iterdir()) == ([] if not inside else [tmp_path / "some"])


def test_of_two_in_the_same_moment_one_moves_its_files(tmp_path, monkeypatch):
    first, second = NewFolder(tmp_path, "1"), NewFolder(tmp_path, "2")
    for one, names in ((first, "btm"), (second, "abcm")):
        one.make()
        for name in names:
            (one.place / {"m": "manifest.json", "t": "tokenizer.json"}.get(name, name)).write_text(one.place.name)
    rename, lost = os.rename, []

    def meanwhile(source, target):
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(UserError, match="another prepare has made --out"):
            second.finish()  # between two steps of the first
        second.undo()
        lost.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    first.finish()
    assert len(lost) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"b", "manifest.json", "tokenizer.json"}
    assert {path.read_text() for path in tmp_path.iterdir()} == {first.place.name}


def test_nothing_but_what_was_made_is_undone(tmp_path):
    out = tmp_path / "corpus"
    (out / ".corpus.0123.tmp").mkdir(parents=True)
    one = NewFolder(out, "1")
    one.make()
    for name in ("a.h5", "manifest.json"):
        (one.place / name).touch()
    one.finish()
    (out / "of another").touch()
    one.undo()
    assert sorted(path.name for path in out.iterdir()) == [".corpus.0123.tmp", "of another"]


@pytest.mark.parametrize("name", [".", "corpus", "../here"])
def test_a_folder_is_made_where_its_maker_is(tmp_path, name, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    one = NewFolder(pathlib.Path(name), "1")
    one.make()
    (one.place / "manifest.json").touch()
    one.finish()
    assert os.listdir(name) == ["manifest.json"]
    assert os.getcwd() == str(tmp_path / "here")


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_an_empty_folder_or_to_none_yet_is_followed(tmp_path, there):
    there and (tmp_path / "disk" / "corpus").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "corpus")
    one = NewFolder(tmp_path / "link", "1")
    one.make()
    (one.place / "manifest.json").touch()
    one.finish()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "link") == os.listdir(tmp_path / "disk" / "corpus") == ["manifest.json"]
    with pytest.raises(UserError, match=f"--out {tmp_path}/link exists and is not an empty folder"):
        NewFolder(tmp_path / "link", "2")


def test_a_link_in_a_circle_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UserError, match=f"--out {tmp_path}/link"):
        NewFolder(tmp_path / "link", "1").make()


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_crash_left_is_in_nobodys_way(tmp_path, inside):
    out = tmp_path / "corpus"
    if inside:
        out.mkdir()
    left = (out if inside else tmp_path) / ".corpus.0123.tmp"
    left.mkdir()
    (left / "train-00000.h5").touch()
    texts = tmp_path / ".text-0123.tmp"
    texts.mkdir()
    again = NewFolder(out, "1")
    again.make()
    assert left_over(out, tmp_path) == []
    for path in (texts, left, left / "train-00000.h5"):
        assert left not in left_over(out, tmp_path)
        os.utime(path, (0, time.time() - OLD - 60))
    assert left_over(out, tmp_path) == sorted([left, texts])
    (again.place / "manifest.json").touch()
    again.finish()
    assert (out / "manifest.json").is_file()
