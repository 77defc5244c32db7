"""Private counts: the noise against the divergence itself, the threshold against draws, what a line can do at most."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import pairs, private_counts, text
from dllm.data.private_counts import DELTA, PrivateCounting, gaussian_delta, gaussian_sigma
from dllm.data.tokenizers import BPETokenizer, CharTokenizer, WordTokenizer
from dllm.data.vocabulary import Vocabulary
from dllm.errors import UserError

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def divergence(sigma, epsilon):
    """The delta of N(0, sigma) and N(1, sigma) by its definition: the integral of max(0, p - exp(epsilon) q)."""
    x = np.linspace(1 - 40 * sigma, 40 * sigma, 2_000_001)
    p, q = (np.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi)) for mean in (1, 0))
    return np.maximum(0, p - math.exp(epsilon) * q).sum() * (x[1] - x[0])


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1, 4, 20])
@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-6])
def test_the_noise_has_the_delta_that_it_is_made_for_and_a_little_less_has_not(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta)
    assert divergence(sigma, epsilon) == pytest.approx(delta, rel=1e-5)
    assert gaussian_delta(sigma, epsilon) <= delta < gaussian_delta(0.999 * sigma, epsilon)


def test_the_noise_is_that_of_the_authors_program():
    assert gaussian_sigma(1, 1e-5) == pytest.approx(3.730631634815, rel=1e-9)


def test_the_limits_of_the_noise_are_those_of_the_formula():
    """epsilon = 0: 2 Phi(1 / 2s) - 1 = delta, which is 1 / (s sqrt(2 pi)); a large one: the two means are 1 apart, s -> 0."""
    assert gaussian_sigma(1e-300, 5e-7) == pytest.approx(1 / (5e-7 * math.sqrt(2 * math.pi)), rel=1e-6)
    large = [gaussian_sigma(epsilon, DELTA / 2) for epsilon in (100, 800, 1e5, 1e308)]
    assert all(0 < after < before for before, after in itertools.pairwise(large))


@pytest.mark.parametrize("units", [1, 2, 20, 10_000])
def test_the_threshold_is_passed_by_no_unit_of_one_line_alone_with_probability_1_minus_half_of_delta(units):
    counting = PrivateCounting(2.0, units, delta=0.2)
    below = 0.5 * math.erfc(-(counting.threshold - 1) / counting.sigma / math.sqrt(2))
    assert below**units == pytest.approx(0.9, rel=1e-9)
    fewer = PrivateCounting(2.0, units, delta=1e-6)
    assert fewer.threshold > counting.threshold


@pytest.mark.parametrize("units", [1, 5])
def test_a_line_that_is_alone_shows_as_often_as_delta_allows(units):
    """100,000 tables, of each the units of one line: in a tenth of them, half of delta, one is told."""
    counting, draws = PrivateCounting(1.0, units, delta=0.2), 100_000
    told = counting.release({f"{draw} {unit}": 1 for draw in range(draws) for unit in range(units)})
    seen = len({name.partition(" ")[0] for name in told})
    assert abs(seen - 0.1 * draws) < 5 * math.sqrt(0.09 * draws)
    assert all(count >= round(counting.threshold) for count in told.values())


def test_at_the_delta_of_the_program_no_unit_of_one_line_is_told():
    assert not PrivateCounting(1.0).release({str(number): 1 for number in range(100_000)})


def test_what_many_lines_have_is_told_with_noise_of_the_right_size():
    counting = PrivateCounting(1.0)
    told = counting.release({str(number): 1000 for number in range(20_000)})
    assert len(told) == 20_000
    noise = np.array(list(told.values())) - 1000
    assert all(isinstance(count, int) for count in told.values())
    assert abs(noise.mean()) < 5 * counting.sigma / math.sqrt(20_000)
    assert noise.std() == pytest.approx(counting.sigma, rel=0.03)


def test_the_noise_is_fresh_each_time():
    counts = {str(number): 1000 for number in range(100)}
    assert PrivateCounting(1.0).release(counts) != PrivateCounting(1.0).release(counts)


def test_the_order_in_which_units_came_is_not_told():
    words = [str(number) for number in range(100)]
    counting = PrivateCounting(1.0)
    told = [list(counting.release(dict.fromkeys(order, 1000))) for order in (words, words[::-1])]
    assert told[0] == told[1] == sorted(words)


def test_the_noise_is_normal():
    """Against the normal distribution: Kolmogorov and Smirnov's distance, which passes 2.2 / sqrt(n) once in 10,000 times."""
    n = 100_000
    found = np.sort(private_counts.normals(n))
    expected = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in found])
    assert np.abs(expected - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n)


@FEW
@given(st.lists(st.sets(st.sampled_from("abcdefghij"))), st.sets(st.sampled_from("abcdefghijkl")), st.integers(1, 8))
def test_a_line_changes_counts_of_at_most_so_many_units_by_one_each(lines, another, most):
    counting = PrivateCounting(1.0, most)
    chosen = [counting.choose(units) for units in [*lines, another]]  # what a line counts does not depend on the others
    without, with_it = (collections.Counter(unit for units in part for unit in units) for part in (chosen[:-1], chosen))
    difference = {unit: with_it[unit] - without[unit] for unit in with_it if with_it[unit] != without[unit]}
    assert set(difference.values()) <= {1}
    assert len(difference) == min(most, len(another))
    assert set(difference) <= another


def test_which_units_of_a_long_line_count_is_drawn_evenly():
    counts = PrivateCounting(1.0, 3).count(["abcdefghij"] * 10_000)
    assert counts.total() == 30_000
    assert all(abs(count - 3000) < 5 * math.sqrt(2100) for count in counts.values())


def examples(path, kind, piece=1 << 20, search=1 << 16, line=1 << 20):
    """How many pieces a file has, and its examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", piece)
        patch.setattr(text, "_SEARCH", search)
        patch.setattr(text, "LINE", line)
        pieces = [piece for part in text.plan_text([path]) for piece in part]
        return len(pieces), list(text.examples_of_text(pieces, kind))


@FEW
@given(st.text("abß \n", max_size=60), st.integers(1, 25), st.integers(1, 25))
def test_a_line_is_one_example_and_its_units_are_its_own_however_it_is_cut(tmp_path_factory, content, piece, line):
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_text(content)
    begins = [whole.encode()[:line].decode(errors="ignore") for whole in content.split("\n")]
    expected = [set(begin.split(" ")) - {""} for begin in begins]
    found = examples(path, WordTokenizer, piece, 4, line)[1]
    assert [units for units in found if units] == [units for units in expected if units]


@pytest.mark.parametrize(("kind", "size"), [(CharTokenizer, 700_000), (WordTokenizer, 700_000), (BPETokenizer, 200_000)])
def test_a_line_of_10_mb_is_one_example(tmp_path, kind, size):
    (tmp_path / "long").write_bytes(b"number 4711 of " * size + b"\nshort\n")
    pieces, found = examples(tmp_path / "long", kind)
    assert pieces > 2
    assert len([units for units in found if units]) == 2
    if kind is WordTokenizer:
        assert found[:2] == [{"number", "4711", "of", "n"}, {"short"}]  # of a long line its first MiB counts


def test_a_line_ends_with_its_file(tmp_path):
    (tmp_path / "one").write_bytes(b"a b")
    (tmp_path / "two").write_bytes(b"c\nd")
    plan = text.plan_text([tmp_path / "one", tmp_path / "two"])
    assert list(text.examples_of_text(plan[0], WordTokenizer)) == [{"a", "b"}, {"c"}, {"d"}]


def test_a_pair_is_one_example_with_both_its_sides(tmp_path):
    (tmp_path / "source").write_text("a b a\n\nc\n")
    (tmp_path / "target").write_text("b x\ny\nz\n")
    plan = pairs.plan_pairs([(tmp_path / "source", tmp_path / "target")], pairs.Pairing(1))
    found = list(pairs.examples_of_pairs(plan[0], WordTokenizer))
    assert sorted(map(sorted, found)) == [["a", "b", "x"], ["c", "z"]]


def test_what_every_line_ends_with_is_in_the_vocabulary_though_nobody_counted_it():
    wanted = Vocabulary("word", counting=PrivateCounting(1.0))
    assert wanted.of_counts({"the": 130, "of": 120}, pairs=False).units == ["<unk>", "<eos>", "the", "of"]
    assert wanted.of_counts({"the": 130, "of": 120}, pairs=True).units == ["<unk>", "the", "of"]
    assert Vocabulary("char", counting=PrivateCounting(1.0)).of_counts({"e": 130}, pairs=False).units == ["<unk>", "\n", "e"]
    with pytest.raises(UserError, match=r"no word is in enough lines .* more text, a larger --epsilon, or --tokenizer byte"):
        wanted.of_counts({}, pairs=False)


def test_what_only_other_splits_have_makes_exact_counts_know_the_unknown():
    assert Vocabulary("word").of_counts({"the": 2, "of": 1}, pairs=False).units == ["the", "of"]
    assert Vocabulary("word").of_counts({"the": 2, "of": 0}, pairs=False).units == ["<unk>", "the"]


def test_a_manifest_says_how_was_counted():
    described = PrivateCounting(2.0, 7).described("pair")
    private_counts.check_described(described)
    assert (described["epsilon"], described["delta"], described["units_per_example"]) == (2.0, 1e-6, 7)
    for key, value in (("epsilon", "2"), ("sigma", math.inf), ("delta", -1), ("example", "word"), ("threshold", None)):
        with pytest.raises(ValueError, match="not described"):
            private_counts.check_described(described | {key: value})
