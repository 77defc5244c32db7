"""What texts are worth in any language, by the packages that others measure with and by plain recursions."""

import importlib.util
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from dllm.errors import UserError
from dllm.inference import scores

ENGLISH = ["The cat sat on the mat .", "A dog runs through the grass", "two men, one ball"]
SAID = ["The cat sat on a mat .", "a dog is running through grass", "two men and one ball"]
PERFECT = {  # texts, and what cuts them into words that BLEU can count
    "Chinese": (["我喜欢在公园里跑步。", "他们今天去学校了。"], "zh"),
    "Japanese": (["私は公園を走るのが好きです。", "彼らは今日学校に行きました。"], "char"),
    "Thai": (["ฉันชอบวิ่งในสวนสาธารณะ", "วันนี้พวกเขาไปโรงเรียน"], "char"),
    "Hindi": (["मुझे पार्क में दौड़ना पसंद है", "वे आज स्कूल गए"], "13a"),
    "Russian": (["Я люблю бегать в парке.", "Сегодня они пошли в школу."], "13a"),
}


def test_english_has_the_scores_that_the_packages_give_alone():
    found = scores.measure(ENGLISH, SAID)
    assert found["bleu"] == BLEU().corpus_score(SAID, [ENGLISH]).score
    assert found["chrf"] == CHRF().corpus_score(SAID, [ENGLISH]).score
    rouge = [RougeScorer(["rougeL"]).score(*both)["rougeL"].fmeasure for both in zip(ENGLISH, SAID, strict=True)]
    assert found["rougeL"] == 100 * np.mean(rouge)
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found["exact_match"] == 0


@pytest.mark.parametrize("language", PERFECT)
def test_a_perfect_output_is_perfect_in_every_language(language):
    texts, tokenize = PERFECT[language]
    found = scores.measure(texts, texts, tokenize)
    assert [found[name] for name in ("exact_match", "bleu", "chrf", "rougeL")] == pytest.approx([100] * 4)
    assert f"|tok:{tokenize}|" in found["bleu_signature"]
    worse = scores.measure(texts, [text[: len(text) // 2] for text in texts], tokenize)
    assert 0 < worse["rougeL"] < 100
    assert 0 < worse["chrf"] < 100


@pytest.mark.parametrize("tokenize", ["13a", "intl", "none"])
@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai"])
def test_what_makes_one_word_of_a_sentence_gives_no_bleu(language, tokenize):
    texts = [*PERFECT[language][0], "a b c d"]  # a reference with four words does not make it defined
    found = scores.measure(texts, texts, tokenize)
    assert found["bleu"] is None
    assert "without spaces: use --bleu-tokenize" in found["bleu_reason"]
    assert (found["chrf"], found["rougeL"]) == (100, 100)


def test_text_that_is_cut_into_words_already_has_bleu():
    texts = [" ".join(text) for text in PERFECT["Chinese"][0]]
    assert scores.measure(texts, texts, "none")["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("wanted", "undefined"),
    [
        (["", " "], {"bleu", "chrf", "rougeL"}),
        (["a b c", "d"], {"bleu"}),
        (["? !", "..."], {"bleu", "rougeL"}),
        (["? ! . ,"], {"rougeL"}),
        (["好", "你好"], {"bleu"}),
    ],
)
def test_what_is_not_defined_is_null_with_the_reason(wanted, undefined):
    found = scores.measure(wanted, wanted)
    assert {name.removesuffix("_reason") for name in found if name.endswith("_reason")} == undefined
    assert {name for name in ("bleu", "chrf", "rougeL") if found[name] is None} == undefined
    assert all(found[name] == pytest.approx(100) for name in {"bleu", "chrf", "rougeL"} - undefined)


def test_a_bad_text_has_a_score_of_nothing():
    found = scores.measure(["a b c d e", "?"], ["x y z v w", "?"])
    assert (found["rougeL"], found["exact_match"]) == (0, 50)
    assert 0 < found["bleu"] < 15  # what sacrebleu smooths


def test_words_have_their_marks_and_those_without_spaces_are_letters():
    assert scores.words("Don't STOP_now 3.5 Straße") == ["don", "t", "stop", "now", "3", "5", "straße"]
    assert scores.words("हिन्दी में") == ["हिन्दी", "में"]
    assert scores.words("cafe\u0301 naïve") == ["café", "naïve"]
    assert scores.words("東京ab タワー") == ["東", "京", "ab", "タ", "ワ", "ー"]
    assert scores.words("ที่นี่") == ["ที่", "นี่"]


@pytest.mark.parametrize("tokenize", scores.BLEU_TOKENIZERS)
def test_words_that_nothing_cuts_are_refused_with_what_to_install(tokenize):
    try:
        BLEU(tokenize=tokenize)
    except RuntimeError:
        with pytest.raises(UserError, match=rf"^--bleu-tokenize {tokenize} needs \w+.*: pip install 'sacrebleu\[\w\w\]'$"):
            scores.check(tokenize)
    else:
        scores.check(tokenize)


def test_without_the_packages_a_line_says_which(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="BLEU and ROUGE need sacrebleu and rouge_score: pip install"):
        scores.check("13a")


def plain_edits(one, other):
    d = {(i, j): i + j for i, j in itertools.product(range(len(one) + 1), range(len(other) + 1))}
    for i, j in itertools.product(range(1, len(one) + 1), range(1, len(other) + 1)):
        d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (one[i - 1] != other[j - 1]))
    return d[len(one), len(other)]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text("ab c", max_size=9), st.text("ab c", max_size=9))
def test_edits_are_those_of_the_plain_recursion(one, other):
    assert scores.edits(one, other) == plain_edits(one, other)
    assert scores.edits(one.split(), other.split()) == plain_edits(one.split(), other.split())


def test_errors_add_up_to_the_rates_of_the_whole():
    wanted, texts = ["one two  three", "four", ""], ["one too three", "four five", "six"]
    words, letters = sum(map(scores.errors, wanted, texts))
    assert words.tolist() == [3, 4]
    assert letters.tolist() == [1 + 5 + 3, 17]
    assert scores.errors("cafe\u0301", "café").tolist() == [[0, 1], [0, 4]]
    assert scores.errors(" ", "a").tolist() == [[1, 0], [1, 0]]
    assert scores.errors("a", "").tolist() == [[1, 1], [1, 1]]
