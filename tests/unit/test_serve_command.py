"""What `dllm serve` makes of its arguments before anything is served."""

import pytest

from dllm.serve import arguments, has_ranks_option


@pytest.mark.parametrize("words", [["-n", "4"], ["-n4"], ["-n=4"], ["--ranks", "4"], ["--ranks=4"]], ids=" ".join)
def test_every_form_of_the_ranks_option_starts_ranks(words):
    for line in (["model", *words], [*words, "model", "--port", "1"]):
        assert has_ranks_option(line)
        assert arguments(line).ranks == 4


@pytest.mark.parametrize(
    "words",
    [["-nothing"], ["--ranksack", "4"], ["--no-such", "4"], ["-na", "4"], ["--", "-n"], ["--host", "n"], []],
    ids=" ".join,
)
def test_other_words_do_not(words):
    assert not has_ranks_option(["model", *words])
