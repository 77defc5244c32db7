"""By which names a server may be called, and pages of which sites may ask it."""

import pytest

from dllm.engines.errors import Refused
from dllm.serving.guard import request_id
from dllm.serving.origins import MOST_NAMES, Origins

APP = "https://app.example.com"


def code(origins, host, origin=None):
    """Of the refusal of a request; "": it is none."""
    headers = {b"host": host.encode("latin-1")} | ({b"origin": origin.encode("latin-1")} if origin is not None else {})
    try:
        origins.check(headers)
    except Refused as refused:
        return refused.code if refused.status == 403 else refused
    return ""


@pytest.mark.parametrize(
    ("host", "origin", "found"),
    [
        ("127.0.0.1:8000", None, ""), ("localhost:8000", None, ""), ("[::1]:8000", None, ""), ("127.0.0.2", None, ""),
        ("LOCALHOST", None, ""), ("[::ffff:127.0.0.1]:80", None, ""),
        ("evil.example", None, "wrong_host"), ("evil.example:8000", None, "wrong_host"), ("", None, "wrong_host"),
        ("127.0.0.1.evil.example", None, "wrong_host"), ("localhost.evil.example", None, "wrong_host"),
        ("10.0.0.1", None, "wrong_host"),
        ("0.0.0.0:8000", None, "wrong_host"), ("\xe4.example", None, "wrong_host"), ("a" * 60_000, None, "wrong_host"),
        ("llm.example.com", None, "wrong_host"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", ""), ("Localhost:8000", "http://localhost:8000", ""),
        ("127.0.0.1:8000", "http://localhost:8000", "wrong_origin"),
        ("127.0.0.1:8000", "http://127.0.0.1:3000", "wrong_origin"),
        ("127.0.0.1:8000", "null", "wrong_origin"), ("127.0.0.1:8000", APP, "wrong_origin"),
        ("localhost", "localhost", "wrong_origin"),
        ("127.0.0.1:8000", "https://llm.example.com", "wrong_origin"),
    ],
)  # fmt: skip
def test_a_server_at_loopback_answers_to_its_names_and_to_its_own_pages(host, origin, found):
    assert code(Origins(False), host, origin) == found


@pytest.mark.parametrize(
    ("host", "origin", "found"),
    [
        ("llm.example.com", None, ""), ("LLM.example.com", None, ""), ("127.0.0.1:8000", None, ""),
        ("other.example", None, "wrong_host"),
        ("127.0.0.1:8000", "https://llm.example.com", ""), ("llm.example.com", "https://llm.example.com", ""),
        ("127.0.0.1:8000", "https://llm.example.com:444", "wrong_origin"), ("127.0.0.1:8000", APP, "wrong_origin"),
        ("two.example.com", "https://two.example.com:8443", ""), ("127.0.0.1:8000", "https://two.example.com", "wrong_origin"),
        ("127.0.0.1:8000", "https://evil.example/llm.example.com", "wrong_origin"), ("127.0.0.1:8000", "null", "wrong_origin"),
        ("127.0.0.1:8000", "https://llm.example.com.evil.example", "wrong_origin"), ("llm.example.com:9", None, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("anyone", [False, True])
def test_other_names_are_those_that_are_allowed(anyone, host, origin, found):
    assert code(Origins(anyone, ["LLM.example.com", "two.example.com:8443"]), host, origin) == found


def test_a_server_that_others_reach_answers_to_every_name_but_not_to_every_page():
    for host in ("10.0.0.1:8000", "anything.example"):
        assert code(Origins(), host) == code(Origins(), host, f"http://{host}") == ""
        assert code(Origins(), host, APP) == "wrong_origin"
    assert code(Origins(), "", "null") == "wrong_origin"


def test_pages_of_an_allowed_origin_are_told_so():
    origins = Origins(False, pages=["HTTPS://app.example.com:443/", "http://localhost:3000", "tauri://localhost"])
    told = dict(origins.check({b"host": b"127.0.0.1:8000", b"origin": APP.encode()}))
    assert (told[b"access-control-allow-origin"], told[b"vary"]) == (APP.encode(), b"Origin")
    assert {b"x-request-id", b"x-dllm-rank"} <= set(told[b"access-control-expose-headers"].split(b", "))
    assert b"access-control-allow-credentials" not in told
    for page in ("http://localhost:3000", "tauri://localhost"):
        assert code(origins, "127.0.0.1:8000", page) == ""
    for page in ("http://app.example.com", f"{APP}:8443", "http://localhost", "null", f"{APP}.evil.example", f"{APP}\n"):
        assert code(origins, "127.0.0.1:8000", page) == "wrong_origin"
    assert code(origins, "evil.example", APP) == "wrong_host"
    assert origins.check({b"host": b"localhost"}) == [(b"vary", b"Origin")]  # a cache may not give it to a page


def test_all_pages_are_allowed_where_that_is_said():
    origins = Origins(False, pages=["*"])
    for page in (APP, "null", "http://evil.example"):
        assert dict(origins.check({b"host": b"localhost", b"origin": page.encode()}))[b"access-control-allow-origin"] == b"*"
    assert code(origins, "evil.example", APP) == "wrong_host"


def test_a_browser_that_asks_first_is_told_what_its_page_may_send():
    question = {b"origin": APP.encode(), b"access-control-request-method": b"POST"}
    names = b"authorization,content-type,x-stainless-os"
    told = dict(Origins.preflight("OPTIONS", question | {b"access-control-request-headers": names}))
    assert told[b"access-control-allow-headers"] == names
    assert b"POST" in told[b"access-control-allow-methods"]
    assert int(told[b"access-control-max-age"]) > 0
    for wrong in (b"", b"a\r\nb: c", b"a b", b"x," * 10_000, b"a" * (MOST_NAMES + 1), b"*"):
        assert b"access-control-allow-headers" not in dict(
            Origins.preflight("OPTIONS", question | {b"access-control-request-headers": wrong})
        )
    assert Origins.preflight("POST", question) is None
    assert Origins.preflight("OPTIONS", {b"origin": APP.encode()}) is None


def test_a_request_keeps_its_name_where_that_is_well_formed():
    named = lambda *values: request_id({"headers": [(b"x-request-id", value) for value in values]})
    for value in ("a", "3f2c-77.b_9:x/y+z=@", "x" * 128):
        assert named(value.encode()) == value
    made = [named(), named(b"a", b"b"), *map(named, (b"", b"a b", b"x" * 129, b"a\nb", b"\xe4", b'"', b"a\x1b[2J"))]
    assert len(set(made)) == len(made)
    assert all(len(one) == 32 and set(one) <= set("0123456789abcdef") for one in made)
