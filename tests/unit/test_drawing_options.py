"""How dllm generate is told to draw: what its options become, and what is refused in one line."""

import pytest

from dllm import cli
from dllm.data.tokenizers import CharTokenizer, MulawTokenizer, WordTokenizer
from dllm.errors import UserError
from dllm.inference.drawing_options import add_drawing, check_drawing, drawing_asked, sampling_of
from dllm.inference.generation import Sampling

WORDS = WordTokenizer(["<unk>", "<eos>", "the", "cat", "7"])


def parsed(*words):
    parser = cli.Parser("generate", None, "")
    add_drawing(parser)
    options = parser.parse_args(words)
    check_drawing(parser, options)
    return options


def sampled(*words, tokenizer=WORDS):
    return sampling_of(parsed(*words), tokenizer, 0.5)


def test_options_become_what_they_are_called():
    assert sampled() == Sampling(temperature=0.5)
    given = sampled(
        "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--presence-penalty", "-1", "--frequency-penalty", "1.5",
        "--repetition-penalty", "1.2", "--best-of", "4", "--seed", "9",
    )  # fmt: skip
    assert given == Sampling(
        temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, presence_penalty=-1, frequency_penalty=1.5, repetition_penalty=1.2,
        best_of=4, seed=9,
    )  # fmt: skip


def test_a_token_has_its_number_or_its_text():
    words = [word for text in ("<unk>=0", "the=-3.5", "3=2", "the=4") for word in ("--logit-bias", text)]
    assert sampled(*words).logit_bias == ((0, 0.0), (2, 4.0), (3, 2.0))
    assert sampled("--logit-bias", "==1", tokenizer=CharTokenizer(["=", "b"])).logit_bias == ((0, 1.0),)
    assert sampled("--logit-bias", "200=1", tokenizer=MulawTokenizer()).logit_bias == ((200, 1.0),)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--logit-bias", "the"], "it takes TOKEN=X, with X from -100 to 100"),
        (["--logit-bias", "=1"], "it takes TOKEN=X"),
        (["--logit-bias", "the=101"], "it takes TOKEN=X"),
        (["--logit-bias", "the=nan"], "it takes TOKEN=X"),
        (["--logit-bias", "5=1"], "tokens are numbers from 0 to 4"),
        (["--logit-bias", "99999999999=1"], "tokens are numbers from 0 to 4"),
        (["--logit-bias", "the cat=1"], "'the cat' is not one token: give the number of a token"),
        (["--logit-bias", "dog=1"], "'dog' is not one token"),
        (["--top-p", "1.5"], "--top-p: it is a probability, at most 1"),
        (["--min-p", "1.5"], "--min-p: it is a probability, at most 1"),
        (["--presence-penalty", "2.5"], "not a number of at least -2.0 and at most 2.0"),
        (["--repetition-penalty", "0"], "not a number of at least 0.01"),
        (["--best-of", "0"], "not a number of at least 1"),
    ],
)
def test_what_says_nothing_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        sampled(*words)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], ""), (["--temperature", "0"], ""), (["--temperature", "1"], "--temperature"), (["--min-p", "0"], "--min-p"),
        (["--logit-bias", "a=1"], "--logit-bias"), (["--best-of", "2"], "--best-of"), (["--seed", "1"], "--seed"),
    ],
)  # fmt: skip
def test_a_search_is_told_which_option_draws(words, asked):
    assert drawing_asked(parsed(*words)) == asked
