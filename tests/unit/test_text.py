"""Text cut into pieces: no byte is lost, no character split, shards get their size; and which files are embedded."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import embedded, text
from dllm.errors import UserError

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def planned(paths, piece, shard=1 << 30, search=1 << 16):
    """The plan of files for other sizes of pieces and shards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PIECE", piece), ("SHARD", shard), ("_SEARCH", search)):
            patch.setattr(text, name, value)
        return text.plan_text(paths)


def check_plan(plan, paths):
    """Pieces cover the files in order, without gap or overlap. Returns the bytes of each piece."""
    pieces = [piece for part in plan for piece in part]
    expected = [str(path) for path in paths if path.stat().st_size]
    assert [path for path, _ in itertools.groupby(pieces, lambda piece: piece.file.path)] == expected
    for path in expected:
        own = [piece for piece in pieces if piece.file.path == path]
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own)][:-1]
        assert [piece.last for piece in own] == [False] * (len(own) - 1) + [True]
        with open(path, "rb") as file:
            assert b"".join(piece.read() for piece in own) == file.read()
    assert all(plan)
    return [piece.read() for piece in pieces]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file to write to over and over."""
    return tmp_path_factory.mktemp("text") / "text"


@FEW
@given(st.text("a宋ß🙂 \n", max_size=60), st.integers(1, 25))
def test_pieces_end_behind_the_first_line_or_space_or_character_after_their_size(scratch, content, size):
    data = content.encode()
    scratch.write_bytes(data)
    for piece in check_plan(planned([scratch], size), [scratch]):
        piece.decode()  # no character is split
    for piece in planned([scratch], size)[0] if data else ():
        near, behind = piece.start + size, data[piece.start + size :]
        mark = next((mark for mark in (b"\n", b" ") if mark in behind), None)
        if mark:
            assert piece.stop == near + behind.index(mark) + 1
        else:
            assert piece.stop - near < 4 or piece.last


@FEW
@given(st.binary(max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_any_bytes_at_all_are_covered(scratch, data, size, search):
    scratch.write_bytes(data)
    check_plan(planned([scratch], size, search=search), [scratch])


@pytest.mark.parametrize("letter", ["x", "ß", "宋", "🙂"])
def test_one_long_line_without_blanks_is_cut_between_characters(scratch, letter):
    for count, size in itertools.product(range(1, 9), range(1, 17)):
        scratch.write_text(letter * count, encoding="utf-8")
        pieces = check_plan(planned([scratch], size), [scratch])
        assert "".join(piece.decode() for piece in pieces) == letter * count
        assert all(len(piece) >= size for piece in pieces[:-1])


@pytest.mark.parametrize(("length", "pieces"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 1), (33, 2), (96, 3)])
def test_sizes_around_that_of_a_piece(scratch, length, pieces):
    scratch.write_bytes((b"fifteen letters\n" * 9)[:length])  # the search begins behind the sixteenth byte
    assert len(check_plan(planned([scratch], 16), [scratch])) == pieces


def test_many_small_files_share_shards_of_the_wanted_size(tmp_path):
    rng, paths = np.random.default_rng(1), [tmp_path / f"{number:03d}" for number in range(100)]
    for path in paths:
        path.write_bytes(b"x" * int(rng.integers(0, 30)))
    paths[7].write_bytes(b"a line\n" * 50)  # more than a shard
    plan = planned(paths, piece=16, shard=64)
    check_plan(plan, paths)
    sizes = [sum(piece.stop - piece.start for piece in part) for part in plan]
    assert len(sizes) > 10
    assert all(size >= 64 for size in sizes[:-1])
    assert all(size - (part[-1].stop - part[-1].start) < 64 for size, part in zip(sizes, plan, strict=True))


def test_empty_files_have_no_pieces(tmp_path):
    (tmp_path / "empty").touch()
    assert text.plan_text([tmp_path / "empty"]) == text.plan_text([]) == []


@FEW
@given(st.lists(st.text("aß\n", max_size=40), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 99))
def test_what_is_dealt_out_is_all_there_once_in_order_and_cut_at_line_ends(tmp_path_factory, contents, ranks, seed):
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / f"dealt{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    for shares in (text.evenly(paths, ranks), text.by_file(paths, ranks), text.by_dirichlet(paths, ranks, 0.5, seed)):
        assert shares.shape == (len(paths), ranks)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        dealt = text.deal_out(paths, shares)
        for path, content in zip(paths, contents, strict=True):
            parts = [span for spans in dealt for span in spans if span.file.path == str(path)]
            read = [b"".join(piece.read() for pieces in text.plan_text([part]) for piece in pieces).decode() for part in parts]
            assert "".join(read) == content
            for number in range(1, len(read)):
                assert read[number - 1].endswith("\n") or "\n" not in "".join(read[number:])


def test_files_go_to_the_rank_with_least_and_small_alphas_make_uneven_shares(tmp_path):
    paths = [tmp_path / str(size) for size in (5, 40, 10, 30, 20)]
    for path in paths:
        path.write_text("x" * int(path.name))
    assert text.by_file(paths, 2).argmax(axis=1).tolist() == [0, 0, 0, 1, 1]
    uneven, even = (text.by_dirichlet(["f"] * 500, 8, alpha, 1) for alpha in (0.1, 100))
    assert 0.6 < uneven.max(axis=1).mean() < 0.8  # by simulation: 0.70
    assert 0.12 < even.max(axis=1).mean() < 0.16
    np.testing.assert_array_equal(even, text.by_dirichlet(["f"] * 500, 8, 100, 1))
    assert not np.array_equal(even, text.by_dirichlet(["f"] * 500, 8, 100, 2))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*/missing: No such file"):
        text.plan_text([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"cannot read .*: it is not a file"):
        text.plan_text([tmp_path])


def test_the_embedded_corpus_is_the_standard_library_with_one_file_in_twenty_held_out():
    train, valid = embedded.standard_library()
    assert not set(train) & set(valid)
    assert train == sorted(train)
    assert 0.04 < len(valid) / len(train + valid) < 0.06
    assert any(path.name == "argparse.py" for path in train + valid)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in train + valid)
