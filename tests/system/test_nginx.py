"""A real nginx before a server, with the lines of the documentation: TLS, the server's names, prefixes of paths, streams."""

import contextlib
import datetime
import ipaddress
import itertools
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.parse

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from helpers.server import Server, texts

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not NGINX, reason="there is no nginx")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "put-behind-a-proxy.md"
HOST, ROOT, APP, TOKEN = "llm.example.com", "/llm", "https://app.example.com", "a-token-of-these-tests"
SITE, PREFIX, UPSTREAM = re.findall(r"^```nginx\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
LOCATION = re.search(r"^    location / \{\n.*?^    \}\n", SITE, re.MULTILINE | re.DOTALL)[0]
LOCATIONS = {  # what stands in the place of the first block's location
    "as the page has it": LOCATION,
    "proxy_pass alone": "location / { proxy_pass http://127.0.0.1:8000; }",
    "upstream alone": "location / { proxy_pass http://dllm; }",
    "upstream": LOCATION.replace("127.0.0.1:8000;", 'dllm; proxy_set_header Connection "";'),
    "prefix": PREFIX,
    "prefix taken away": PREFIX.replace("127.0.0.1:8000;", "127.0.0.1:8000/;"),
    "buffered": LOCATION.replace("proxy_pass", "proxy_ignore_headers X-Accel-Buffering; proxy_pass"),
}
MAIN = """
daemon off; pid nginx.pid; error_log stderr; user root; worker_processes 1;
events { worker_connections 256; }
http {
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    %s
}
"""


def certificate(folder):
    """A certificate of HOST and 127.0.0.1 that is its own authority, and its key: two files."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now, names = datetime.datetime.now(datetime.UTC), [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1)).add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "llm.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "llm.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def server(world):
    options = "--allow-host", HOST, "--allow-host", "dllm", "--allow-origin", APP, "--root-path", ROOT, "--max-tokens", 10**5
    with Server(world / "run", *options, ranks=2, token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def clients(server, tmp_path_factory):
    """Kind of LOCATIONS -> a client of nginx, which sends HOST as a browser would."""
    folder = tmp_path_factory.mktemp("nginx")
    certificate(folder)
    ports = dict(zip(LOCATIONS, free_ports(len(LOCATIONS)), strict=True))
    sites = [UPSTREAM] + [
        SITE.replace(LOCATION, LOCATIONS[kind]).replace("443 ssl", f"{port} ssl") for kind, port in ports.items()
    ]
    lines = (
        "\n".join(sites).replace("/etc/ssl/", f"{folder}/").replace("127.0.0.1:8000", urllib.parse.urlsplit(server.url).netloc)
    )
    (folder / "nginx.conf").write_text(MAIN % lines)
    trusted = ssl.create_default_context(cafile=folder / "llm.crt")
    headers = {"Host": HOST, "Authorization": f"Bearer {TOKEN}"}
    process = subprocess.Popen([NGINX, "-p", folder, "-c", "nginx.conf"], stderr=open(folder / "error.log", "wb"))  # noqa: SIM115
    try:
        with contextlib.ExitStack() as stack:
            make = lambda port: httpx.Client(base_url=f"https://127.0.0.1:{port}", headers=headers, verify=trusted, timeout=30)
            found = {kind: stack.enter_context(make(port)) for kind, port in ports.items()}
            end = time.monotonic() + 20
            while True:
                try:
                    found["as the page has it"].get("/health")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, (folder / "error.log").read_text()
                    assert time.monotonic() < end
                    time.sleep(0.05)
            yield found
    finally:
        process.terminate()
        process.wait(20)


def complete(client, path="/v1/completions", origin=f"https://{HOST}", **body):
    headers = {"Origin": origin} if origin else {}
    return client.post(path, json={"prompt": "To be", "max_tokens": 5, "seed": 1} | body, headers=headers)


@pytest.mark.parametrize("kind", [kind for kind in LOCATIONS if not kind.startswith("prefix")])
def test_pages_and_clients_get_answers_however_nginx_calls_the_server(server, clients, kind):
    expected = texts(server.complete(max_tokens=5, seed=1))
    for origin in (f"https://{HOST}", None, APP):
        assert texts(complete(clients[kind], origin=origin)) == expected
    assert clients[kind].get("/").headers["content-type"].startswith("text/html")
    assert clients[kind].get("/health/ready").json() == {"status": "ok"}
    named = clients[kind].get("/v1/models", headers={"X-Request-Id": "mine"})
    assert (named.status_code, named.headers["x-request-id"]) == (200, "mine")


@pytest.mark.parametrize("kind", LOCATIONS)
def test_pages_of_other_sites_and_clients_without_a_token_are_refused_as_without_nginx(clients, kind):
    client, path = clients[kind], f"{ROOT if kind.startswith('prefix') else ''}/v1/completions"
    for origin in ("https://evil.example", "null", f"https://{HOST}.evil.example"):
        answer = complete(client, path, origin)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in answer.headers
    wrong = client.post(path, json={"prompt": "a"}, headers={"Authorization": "Bearer no", "Origin": APP})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, APP)
    question = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = client.options(path, headers=question | {"Authorization": ""})
    assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (204, "authorization")


@pytest.mark.parametrize("kind", ["prefix", "prefix taken away"])
def test_the_page_and_all_it_asks_for_lie_below_the_prefix(clients, kind):
    client = clients[kind]
    moved = client.get(ROOT)
    assert moved.is_redirect
    assert urllib.parse.urlsplit(urllib.parse.urljoin(f"https://{HOST}{ROOT}", moved.headers["location"])).path == f"{ROOT}/"
    page = client.get(f"{ROOT}/").text
    asked = [urllib.parse.urljoin(f"{ROOT}/", path) for path in re.findall(r'fetch\("([^"]+)"', page)]
    assert sorted(asked) == [f"{ROOT}/health", f"{ROOT}/v1/completions"]
    assert client.get(f"{ROOT}/health").json()["status"] == "ok"
    assert len(texts(complete(client, f"{ROOT}/v1/completions"))) == 1
    assert client.get(f"{ROOT}/openapi.json").json()["servers"] == [{"url": ROOT}]
    assert client.get("/health").status_code == 404  # of nginx


def arrivals(client, path="/v1/completions"):
    """How many times something arrives of a stream, after a millisecond or more of nothing."""
    body = {"prompt": "To be", "max_tokens": 2000, "seed": 1, "stream": True}
    with client.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        times = [time.monotonic() for _ in answer.iter_raw()]
    return 1 + sum(after - before > 1e-3 for before, after in itertools.pairwise(times))


def test_a_stream_arrives_as_it_is_made(server, clients):
    """Without the header nginx would collect some kilobytes first, as one kind does that is told to overlook it."""
    with contextlib.ExitStack() as others:  # so that a rank gathers tokens, and an event comes each 10 ms or so
        for _ in range(12):
            body = {"prompt": "To be", "max_tokens": 10**5, "stream": True}
            request = httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=60)
            others.enter_context(request)
        below = lambda kind: ROOT if kind.startswith("prefix") else ""
        found = {kind: arrivals(client, f"{below(kind)}/v1/completions") for kind, client in clients.items()}
    held = found.pop("buffered")
    assert min(found.values()) > 3 * held, (held, found)
