"""What `dllm serve` makes of its arguments before anything is served."""

import os
import stat
from types import SimpleNamespace

import pytest

from dllm import serve
from dllm.errors import UserError
from dllm.launching import interfaces, mpirun
from dllm.remote.http import is_loopback
from dllm.serve import arguments, has_ranks_option
from dllm.serving import server, tokens
from dllm.serving.origins import Origins


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


def test_names_origins_and_a_path_may_be_given():
    found = arguments(
        ["--allow-host", "a.example", "--allow-host", "B.example:8443", "--allow-origin", "*", "--root-path", "/x/y/", "m"]
    )
    assert (found.allow_host, found.allow_origin, found.root_path) == (["a.example", "B.example:8443"], ["*"], "/x/y")
    plain = arguments(["m"])
    assert (plain.allow_host, plain.allow_origin, plain.root_path) == ([], [], "")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--allow-host", value) for value in ("", "https://a.example", "a/b", "a b", "*", "a:x", "-a", "\u00e4.example")],
        *[
            ("--allow-origin", value)
            for value in ("", "a.example", "null", "https://a.example/x", "https://", "https://a b", "**")
        ],
        *[("--root-path", value) for value in ("llm", "/a//b", "/..", "/a/../b", "/a b", "/a?b", "//evil.example", "/a%2f")],
    ],
)
def test_what_is_no_name_no_origin_and_no_path_is_refused_in_one_line(option, value):
    with pytest.raises(UserError, match=f"{option}.*write it as ") as error:
        arguments([f"{option}={value}", "m"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "well"),
    [
        ("127.0.0.1", True), ("127.0.0.2", True), ("127.255.0.9", True), ("::1", True), ("localhost", True),
        ("LOCALHOST", True), ("::ffff:127.0.0.1", True), ("::ffff:7f00:2", True), ("0.0.0.0", False), ("::", False),
        ("10.0.0.1", False), ("", False),
        ("::ffff:10.0.0.1", False),
        ("localhost.example", False), ("127.0.0.1.example", False), ("127.1", False),
    ],
)  # fmt: skip
def test_loopback_is_the_same_for_the_token_and_for_the_name(monkeypatch, host, well):
    monkeypatch.delenv(tokens.VARIABLE, raising=False)
    assert is_loopback(host) == well
    options = SimpleNamespace(host=host, token_file=None)
    if well:
        assert serve.tokens_of(options) == ()
        assert (
            Origins(not is_loopback(host)).check({b"host": f"[{host}]:8000".encode() if ":" in host else host.encode()}) == []
        )
    else:
        with pytest.raises(UserError, match="give a token"):
            serve.tokens_of(options)


@pytest.mark.parametrize(
    ("bound", "host", "interface", "one_host", "found"),
    [
        ("127.0.0.1", "127.0.0.1", None, True, ("127.0.0.1", "127.0.0.1")),
        ("0.0.0.0", "0.0.0.0", "wg0", True, ("127.0.0.1", "127.0.0.1")),
        ("0.0.0.0", "0.0.0.0", "wg0", False, ("10.9.0.7", "10.9.0.7")),
        ("127.0.0.1", "127.0.0.1", "wg0", False, ("10.9.0.7", "10.9.0.7")),
        ("127.0.0.1", "127.0.0.1", None, False, ("127.0.0.1", "127.0.0.1")),
        ("127.0.0.2", "127.0.0.2", None, False, ("127.0.0.1", "127.0.0.1")),
        ("192.0.2.7", "192.0.2.7", None, False, ("192.0.2.7", "192.0.2.7")),
    ],
)
def test_ranks_of_one_host_stay_on_it_and_those_of_several_on_their_interface(
    monkeypatch, bound, host, interface, one_host, found
):
    monkeypatch.setattr(interfaces, "address_of", {"wg0": "10.9.0.7"}.__getitem__)
    assert server.peer_addresses(bound, host, interface, one_host) == found


def test_an_interface_that_is_asked_for_wins_over_what_a_cluster_has_set(monkeypatch):
    for name in ("UCX_NET_DEVICES", "FI_PROVIDER", "OMPI_MCA_pml"):
        monkeypatch.setenv(name, "fast")
    assert {mpirun.environment()[name] for name in ("UCX_NET_DEVICES", "FI_PROVIDER", "OMPI_MCA_pml")} == {"fast"}
    found = mpirun.environment(interface="wg0")
    assert (found["UCX_NET_DEVICES"], found["FI_PROVIDER"], found["OMPI_MCA_pml"]) == ("wg0", "tcp", "ob1")


@pytest.mark.parametrize(
    ("mode", "group", "well"),
    [(0o440, 7, True), (0o600, 7, True), (0o444, 7, False), (0o460, 7, False), (0o440, 8, False), (0o600, 8, True)],
)
def test_a_token_file_of_root_may_be_read_by_the_group_of_this_process_alone(monkeypatch, tmp_path, mode, group, well):
    path = tmp_path / "tokens"
    path.write_text("a-token-of-some-client\n")
    like = {"st_mode": stat.S_IFREG | mode, "st_uid": 0, "st_gid": group, "st_size": path.stat().st_size, "st_blksize": 4096}
    monkeypatch.setattr(os, "fstat", lambda number: SimpleNamespace(**like))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [7])
    if well:
        assert tokens.read_tokens(str(path)) == ("a-token-of-some-client",)
    else:
        with pytest.raises(UserError, match="can be read or written by others"):
            tokens.read_tokens(str(path))
