"""What a server must bear: every kind of request that is wrong, slow or too large, while /health answers all along."""

import contextlib
import json
import pathlib
import socket
import subprocess
import threading
import time

import httpx
import pytest
from helpers.launch import BIN
from helpers.server import Server, texts

TOKEN = "a-token-for-these-tests"
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
SLOW, UPLOAD = 10, 20  # seconds in which a request's head and its body must be there, see dllm/engines/limits.py


@pytest.fixture(scope="module")
def server(world):
    with Server(world / "run", "--max-prompt", 20_000, "--max-connections", 300, ranks=2, token=TOKEN) as server:
        yield server


class Watch(threading.Thread):
    """Asks for /health all the time, on new connections."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.address, self.over, self.slowest, self.count = address(server), threading.Event(), 0.0, 0

    def run(self):
        while not self.over.wait(0.02):
            begin = time.monotonic()
            assert b" 200 OK" in talk(self.address, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            self.slowest, self.count = max(self.slowest, time.monotonic() - begin), self.count + 1


@contextlib.contextmanager
def healthy(server):
    """A block during which /health answers in less than a second, and after which memory has hardly grown."""
    before, watch = memory(server), Watch(server)
    watch.start()
    yield
    watch.over.set()
    watch.join(5)
    assert not watch.is_alive()
    assert watch.count > 3
    assert watch.slowest < 1
    assert memory(server) < before + (100 << 20)


def memory(server):
    """Resident bytes of all ranks."""
    pages = [int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.alive().values()]
    return sum(pages) * 4096


def address(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def talk(where, data, limit=5.0):
    """All that comes back for some bytes, until the other side closes; fails where it does not."""
    with socket.create_connection(where, timeout=limit) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        return answer


def body(data, *headers):
    lines = [f"Content-Length: {len(data)}", "Connection: close", *headers]
    return HEAD.encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD.encode() + b"Content-Length: 1073741824\r\n\r\n", 413),
        (HEAD.encode() + b"Content-Length: 1073741824\r\n\r\n" + b"x" * 4_000_000, 413),
        (HEAD.encode() + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 400),
        (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nxxxx\r\n", 400),
        (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%s\r\n" % (b"x" * 65536) * 40, 413),
        (HEAD.encode() + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 401),
        (HEAD.replace("POST /v1/completions", "GET /%2e%2e/%2e%2e/etc/passwd").encode() + b"Connection: close\r\n\r\n", 404),
        (HEAD.replace(TOKEN, TOKEN[:-1] + "x").encode() + b"Content-Length: 2\r\n\r\n{}", 401),
        (HEAD.encode() + b"Authorization: Bearer another\r\nContent-Length: 2\r\n\r\n{}", 400),
        ((HEAD.replace(TOKEN, "other") + f"Authorization: Bearer {TOKEN}\r\n\r\n").encode(), 400),
        (HEAD.encode() + b"Host: elsewhere\r\nContent-Length: 2\r\n\r\n{}", 400),
        (HEAD.replace("Bearer", "Basic").encode() + b"Content-Length: 2\r\n\r\n{}", 401),
        (HEAD.replace(TOKEN, "t\u00f6ken").encode() + b"Content-Length: 2\r\n\r\n{}", 401),
        (HEAD.replace("localhost", "elsewhere").encode() + b"Content-Length: 2\r\n\r\n{}", 403),
        (body(b"{"), 400),
        (body(b'{"prompt": "\xff\xfe"}'), 400),
        (body(b'{"prompt": "a", "temperature": NaN}'), 400),
        (body(b'{"prompt": "a", "temperature": 1e999}'), 400),
        (body(b'{"prompt": "a", "max_tokens": 1000000000}'), 400),
        (body(b'{"prompt": "a", "n": 64, "max_tokens": 4096}'), 400),
        (body(b'{"prompt": "\\ud800"}'), 400),
        (body(b'{"prompt": "%s"}' % (b"a" * 100_000)), 400),
        (body(b'{"prompt": [%s1]}' % (b"1," * 100_000)), 400),
        (body(b"[" * 500_000), 400),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)  # fmt: skip
def test_a_bad_request_is_refused_at_once(server, data, status):
    """Not by one of the timers, of which the first would end the connection after SLOW seconds."""
    begin = time.monotonic()
    answer = talk(address(server), data, limit=SLOW)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert time.monotonic() - begin < SLOW
    head, _, text = answer.partition(b"\r\n\r\n")
    if b"application/json" in head:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


CHUNKED = b"Transfer-Encoding: chunked\r\n"
TWO_ENDS = {
    "both lengths": b"Content-Length: 5\r\n" + CHUNKED,
    "both, the other first": CHUNKED + b"Content-Length: 5\r\n",
    "both, in other letters": b"content-LENGTH:5\r\nTRANSFER-encoding:\tchunked\r\n",
    "both, folded": b"Content-Length: 5\r\nTransfer-Encoding:\r\n chunked\r\n",
    "the same length twice": b"Content-Length: 5\r\nContent-Length: 5\r\n",
    "a list of lengths": b"Content-Length: 5, 5\r\n",
    "chunked twice": CHUNKED + CHUNKED,
    "another coding": b"Transfer-Encoding: gzip, chunked\r\n",
    "no coding that there is": b"Transfer-Encoding: xchunked\r\n",
    "identity": b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n",
    "a sign": b"Content-Length: +5\r\n",
    "hexadecimal": b"Content-Length: 0x5\r\n",
    "a space before the colon": b"Content-Length : 5\r\n",
    "a lonely return": b"X: 1\rContent-Length: 5\r\n" + CHUNKED,
}


@pytest.mark.parametrize("kind", [*TWO_ENDS, "chunked in HTTP/1.0"])
def test_a_request_that_may_end_in_two_places_is_refused_and_what_is_behind_it_is_not_read(server, kind):
    """RFC 9112, section 11.2: a proxy that sees the other end would pass on a request of somebody else as a body."""
    head = HEAD.encode() + TWO_ENDS.get(kind, CHUNKED)
    if kind.endswith("1.0"):
        head = head.replace(b"HTTP/1.1", b"HTTP/1.0")
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = talk(address(server), head + b"\r\n0\r\n\r\n" + smuggled)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    top, _, text = answer.lower().partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in top
    assert b"\r\ncontent-type: application/json" in top
    assert json.loads(text)["error"]["type"] == "invalid_request_error"


def test_a_body_that_breaks_off_in_the_midst_of_an_answer_is_no_error_of_the_server(server):
    """The answer begins before the body ends, here: a refusal."""
    before = len(server.log("message"))
    for _ in range(5):
        data = HEAD.replace(TOKEN, "wrong").encode() + CHUNKED + b"\r\n5\r\nhello\r\n"
        with socket.create_connection(address(server), timeout=5) as connection:
            connection.sendall(data)
            assert connection.recv(12) == b"HTTP/1.1 401"
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"ZZZ\r\n")
                connection.recv(1000)
    server.complete(max_tokens=1)
    assert not any("Fatal" in line["text"] or "trace" in line for line in server.log("message")[before:])


def test_the_log_grows_by_no_more_than_some_lines_a_minute_whatever_strangers_send(server):
    """Malformed requests, upgrades that there are none of, wrong tokens, long names; what clients do is still written."""
    end = b"Connection: close\r\n\r\n"
    kinds = [
        b"\x16\x03\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer no\r\n" + end,
        b"GET /%s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: %s\r\n" % (b"p" * 20_000, b"u" * 20_000) + end,
        b"%s / HTTP/1.1\r\nHost: %s\r\n" % (b"M" * 20_000, b"h" * 20_000) + end,
    ]
    begin = len(server.err)
    with healthy(server):
        for data in kinds * 200:
            talk(address(server), data)
    lines = server.err[begin:].splitlines()
    assert len(lines) < 2 * 6 * 25  # of two ranks, six kinds, in a minute or two
    assert max(map(len, lines)) < 1500
    server.complete("Is it still written?", max_tokens=2)
    server.until(lambda: any(line.get("completion_tokens") == 2 for line in server.log()), "a line of a client", 10)


def test_who_has_no_token_learns_only_that_the_server_is_there(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/").status_code == 200
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
        assert httpx.get(server.url + path).status_code == 401


def test_slow_heads_and_idle_sockets_are_borne_and_closed(server):
    """500 sockets that say nothing and 50 that say their head a byte at a time, while clients are served."""
    with healthy(server), contextlib.ExitStack() as stack:
        connect = lambda: stack.enter_context(socket.create_connection(address(server), timeout=5))
        late = connect()
        late.sendall(HEAD.encode() + b"Content-Length: 10\r\n\r\n{")
        idle, slow, begin = [connect() for _ in range(500)], [connect() for _ in range(50)], time.monotonic()
        for place in range(SLOW + 3):
            for one in slow:
                with contextlib.suppress(ConnectionError):
                    one.sendall(HEAD[place : place + 1].encode())
            assert len(texts(server.complete(max_tokens=20))) == 1
            time.sleep(max(0.0, begin + place + 1 - time.monotonic()))
        for one in [*idle, *slow]:  # a reset where something that was sent was not read any more
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
        late.settimeout(UPLOAD)
        assert late.recv(12) == b"HTTP/1.1 408"


def test_many_large_requests_at_once_are_served_or_refused(server):
    """Long prompts, many choices, with and without a reader, from 30 clients."""
    statuses = []

    def ask(number):
        request = {"prompt": "ab " * 5000, "n": 4, "max_tokens": 50, "logprobs": 5, "seed": number}
        data = body(json.dumps(request).encode())
        if number % 3 == 0:  # goes away at once
            with socket.create_connection(address(server), timeout=5) as connection:
                connection.sendall(data)
            return
        statuses.append(int(talk(address(server), data, limit=60).split(b" ")[1]))

    with healthy(server):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(statuses) == 20
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    server.until(
        lambda: not any(rank["active"] + rank["queued"] for rank in server.health()["ranks"]), "an end of all streams", 20
    )


def test_a_request_that_takes_too_long_is_ended(world):
    """By its deadline: not by UPLOAD, the shortest of the other timers, nor because all tokens were there."""
    with Server(world / "run", "--deadline", 1, "--max-tokens", 10**7, ranks=1) as server:
        answer = server.complete(max_tokens=10**7)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
        slow = HEAD.encode() + b"Content-Length: 10\r\n\r\n{"
        assert talk(address(server), slow, limit=UPLOAD).startswith(b"HTTP/1.1 504")
        server.until(lambda: len(server.log()) == 2, "a line for each request", 10)
        assert [line["status"] for line in server.log()] == [504, 504]
        assert all(1 <= line["seconds"] < UPLOAD for line in server.log())
        server.until(lambda: server.health()["ranks"][0]["active"] == 0, "an end of the stream", 20)
        assert server.health()["ranks"][0]["tokens"] < 10**7


def test_schemathesis_finds_no_server_error(server, tmp_path):
    command = [
        BIN / "schemathesis", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error,response_schema_conformance",
        "--max-examples", "5", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--request-timeout", "20",
        "-H", f"Authorization: Bearer {TOKEN}",
    ]  # fmt: skip
    with healthy(server):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
