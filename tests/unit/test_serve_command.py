"""What `dllm serve` makes of its arguments before anything is served."""

import pytest

from dllm.launching import interfaces
from dllm.serve import arguments, has_ranks_option
from dllm.serving import server


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


@pytest.mark.parametrize(
    ("bound", "host", "interface", "one_host", "found"),
    [
        ("127.0.0.1", "127.0.0.1", None, True, ("127.0.0.1", "127.0.0.1")),
        ("0.0.0.0", "0.0.0.0", "wg0", True, ("127.0.0.1", "127.0.0.1")),
        ("0.0.0.0", "0.0.0.0", "wg0", False, ("10.9.0.7", "10.9.0.7")),
        ("127.0.0.1", "127.0.0.1", "wg0", False, ("10.9.0.7", "10.9.0.7")),
        ("127.0.0.1", "127.0.0.1", None, False, ("127.0.0.1", "127.0.0.1")),
        ("192.0.2.7", "192.0.2.7", None, False, ("192.0.2.7", "192.0.2.7")),
    ],
)
def test_ranks_of_one_host_stay_on_it_and_those_of_several_on_their_interface(
    monkeypatch, bound, host, interface, one_host, found
):
    monkeypatch.setattr(interfaces, "address_of", {"wg0": "10.9.0.7"}.__getitem__)
    assert server.peer_addresses(bound, host, interface, one_host) == found
