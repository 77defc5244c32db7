"""HTTP to stores: one time limit for a whole answer, largest sizes, no redirect, no proxy, and who gets the token."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from helpers.gateway import Gateway, block_of, damaged, reply

from dllm.config import StorageConfig
from dllm.errors import UserError
from dllm.remote import ipfs
from dllm.remote.cid import RAW, Cid
from dllm.remote.http import Server
from dllm.remote.unixfs import LARGEST_BLOCK

LIMIT = 0.5  # seconds that a server has
SLACK = 5  # and what a busy machine may add


def drip(handler, name, pause=0.05):
    """An answer of which a byte comes in now and then: each in time."""
    with contextlib.suppress(OSError):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"x")
            time.sleep(pause)


def drip_headers(handler, name):
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1000):
            handler.wfile.write(b"X-%d: " % number)
            time.sleep(0.05)


def silence(handler, name):
    time.sleep(3 * LIMIT)


def cut(handler, name):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    handler.close_connection = True


def nonsense(handler, name):
    handler.wfile.write(b"\xff\xfe\0" * 100 + b"\r\n\r\n")
    handler.close_connection = True


def many_headers(handler, name):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n")
    handler.close_connection = True


def chunks_without_end(handler, name):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


FAULTS = {
    drip: "did not answer within 0.5 s",
    drip_headers: "did not answer within 0.5 s",
    silence: "did not answer within 0.5 s",
    cut: "hung up in the middle",
    nonsense: "does not answer",
    many_headers: "does not answer: got more than 100 headers",
    chunks_without_end: "answers with more than 1 kB",
    (lambda handler, name: reply(handler, 200, bytes(1025))): "answers with more than 1 kB",
}


@pytest.mark.parametrize("answer", FAULTS, ids=lambda answer: answer.__name__)
def test_a_server_at_fault_is_left_in_time(answer):
    with Gateway(answers=answer) as gateway:
        begin = time.monotonic()
        with pytest.raises(UserError, match=FAULTS[answer]) as caught:
            Server(gateway.url, LIMIT).ask("GET", "/", most=1024)
        assert time.monotonic() - begin < LIMIT + SLACK
        assert str(caught.value).startswith(gateway.url)


def test_nobody_there_and_a_server_that_takes_nothing():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=r"does not answer: Connection refused"):
            Server(url, LIMIT).ask("GET", "/", most=10)
        listener.listen(1)  # connections are made by the system, nobody reads
        begin = time.monotonic()
        pieces = (bytes(1 << 20) for _ in range(1000))
        with pytest.raises(UserError, match=r"did not answer within 0.5 s"):
            Server(url, LIMIT).ask("POST", "/", pieces, most=10, headers={"Content-Length": str(1000 << 20)})
        assert time.monotonic() - begin < LIMIT + SLACK


def test_a_connection_is_used_again_and_made_anew_where_the_server_closed_it():
    connections = set()

    def answer(handler, name):
        connections.add(handler.client_address)
        reply(handler, 200, name.encode())
        handler.close_connection = name == "last"  # without a word

    with Gateway(answers=answer) as gateway:
        server = Server(gateway.url, 5)
        said = []
        for name in ("a", "b", "last", "c", "d"):
            said.append(server.ask("GET", f"/{name}", most=10).body.decode())
            time.sleep(0.05)
        server.close()
        assert said == ["a", "b", "last", "c", "d"]
        assert len(connections) == 2


def test_many_threads_ask_at_once():
    with Gateway(answers=lambda handler, name: reply(handler, 200, name.encode())) as gateway:
        server, said = Server(gateway.url, 10), {}
        ask = lambda number: said.update({number: server.ask("GET", f"/{number}", most=10).body})
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        [thread.start() for thread in threads]
        [thread.join(20) for thread in threads]
        server.close()
        assert said == {number: str(number).encode() for number in range(40)}


def test_no_redirect_is_followed_and_no_proxy_is_used(monkeypatch):
    name, block = block_of(RAW, b"abc")
    with Gateway({name: block}) as other, Gateway() as gateway:
        gateway.answers = lambda handler, name: reply(handler, 301, b"", Location=f"{other.url}/ipfs/{name}")
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, other.url)
        with pytest.raises(UserError, match="answers 301"):
            ipfs.Gateway(gateway.url, 5).get(Cid.parse(name))
        assert other.asked == []


def certificate(folder):
    """Files of a key and of a certificate for 127.0.0.1 that it signed itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    days = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - days, now + days)
    signed = builder.add_extension(address, False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / "certificate.pem").write_bytes(signed.public_bytes(pem))
    return folder / "key.pem", folder / "certificate.pem"


def test_a_certificate_is_checked(tmp_path, monkeypatch):
    key, signed = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed, key)
    with Gateway(answers=lambda handler, name: reply(handler, 200, b"abc")) as gateway:
        gateway.secure(context)
        with pytest.raises(UserError, match="certificate verify failed"):
            Server(gateway.url, 5).ask("GET", "/", most=10)
        monkeypatch.setenv("SSL_CERT_FILE", str(signed))
        assert Server(gateway.url, 5).ask("GET", "/", most=10).body == b"abc"


@pytest.mark.parametrize(
    "address",
    ["", "x", "ftp://127.0.0.1", "http://", "127.0.0.1:5001", "http://127.0.0.1:99999", "http://a:b@127.0.0.1", "http://[::1",
     "http://127.0.0.1/?x", "http://127.0.0.1/\r\nX: y", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match=r"is no address of a store|holds a password"):
        Server(address, 5)


def test_the_token_goes_to_the_address_of_the_environment_alone(monkeypatch):
    name, block = block_of(RAW, b"abc")
    with Gateway({name: block}) as ours, Gateway({name: block}) as other:
        for token, header in (("secret", "Bearer secret"), ("me:secret", "Basic bWU6c2VjcmV0")):
            monkeypatch.setenv("DLLM_IPFS_TOKEN", token)
            monkeypatch.setenv("DLLM_IPFS", ours.url)
            assert ipfs.Node(ours.url, 5).get(Cid.parse(name)) == block
            assert ours.asked[-1][2]["Authorization"] == header
            assert ipfs.Node(other.url, 5).get(Cid.parse(name)) == block
            assert "Authorization" not in other.asked[-1][2]
            ipfs.Gateway(ours.url, 5).get(Cid.parse(name))
            assert "Authorization" not in ours.asked[-1][2]
    monkeypatch.setenv("DLLM_IPFS_TOKEN", "a\r\nX: b")
    with pytest.raises(UserError, match="DLLM_IPFS_TOKEN is no token"):
        ipfs.Node(ours.url, 5)


def test_a_node_of_another_host_takes_a_token(monkeypatch):
    monkeypatch.delenv("DLLM_IPFS_TOKEN", raising=False)
    for settings in (StorageConfig(ipfs="http://10.1.2.3:5001"), StorageConfig()):
        monkeypatch.setenv("DLLM_IPFS", "http://10.1.2.3:5001")
        with pytest.raises(UserError, match=r"http://10\.1\.2\.3:5001 can be reached by others"):
            ipfs.node(settings)
    monkeypatch.setenv("DLLM_IPFS_TOKEN", "secret")
    with pytest.raises(UserError, match="in clear: give an address with https"):
        ipfs.node(StorageConfig())
    monkeypatch.setenv("DLLM_IPFS", "https://10.1.2.3:5001")
    assert ipfs.node(StorageConfig()).name == "https://10.1.2.3:5001"
    with pytest.raises(UserError, match="can be reached by others"):
        ipfs.node(StorageConfig(ipfs="http://10.1.2.4:5001"))


def test_sources_are_asked_in_order_and_the_one_that_failed_last():
    name, block = block_of(RAW, b"abc")
    wrong = lambda handler, name: reply(handler, 200, damaged(block))
    with Gateway(answers=wrong) as first, Gateway({name: block}) as second, Gateway({name: block}) as third:
        sources = [ipfs.Node(first.url, 5), ipfs.Gateway(second.url, 5), ipfs.Gateway(third.url, 5)]
        blocks = ipfs.Blocks(sources)
        assert [blocks.get(Cid.parse(name)) for _ in range(3)] == [block] * 3
        assert [len(server.asked) for server in (first, second, third)] == [1, 3, 0]
        assert first.asked[0][:2] == ("POST", f"/api/v0/block/get?arg={name}")
        assert second.asked[0][:2] == ("GET", f"/ipfs/{name}?format=raw")
        assert second.asked[0][2]["Accept"] == "application/vnd.ipld.raw"
        second.blocks.clear()
        third.answers = lambda handler, name: reply(handler, 200, bytes(LARGEST_BLOCK + 1))
        with pytest.raises(UserError) as caught:
            blocks.get(Cid.parse(name))
        said = f"{second.url} answers 404; {third.url} answers with more than 2,048 kB; {first.url} gives a damaged one"
        assert str(caught.value) == f"no block {name}: {said}"


def test_a_node_that_does_not_do_what_it_says_is_found_out(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    name, _ = block_of(RAW, b"abc")
    other, _ = block_of(RAW, b"other")
    line = '{"Root":{"Cid":{"/":"%s"},"PinErrorMsg":"%s"}}\n'
    for body, why in (
        ("", "did not take"), ("[]", "no answer that a node"), ("{", "no answer that a node"), ("[" * 100_000, "no answer"),
        (line % (other, ""), "did not take"), (line % (name, "no room"), f"does not keep {name}: no room"),
        (line % (name, ""), "answers 404"), ('{"Root":{"Cid":5}}', "no answer that a node"),
    ):  # fmt: skip

        def answer(handler, asked, body=body):
            length = int(handler.headers.get("Content-Length") or 0)
            handler.rfile.read(length)
            reply(handler, *((200, body.encode()) if "dag/import" in handler.path else (404, b"")))

        with Gateway(answers=answer) as gateway, pytest.raises(UserError, match=why):
            ipfs.Node(gateway.url, 5).publish({"": tmp_path / "file"}, pin=True)


def test_what_a_node_says_before_it_hangs_up_is_shown(tmp_path):
    """A wrong token: the answer comes while gigabytes are on their way."""
    with open(tmp_path / "file", "wb") as file:
        file.truncate(64 << 20)

    def refuse(handler, name):
        reply(handler, 403, b'{"Message": "403 - Access Denied"}')
        handler.close_connection = True

    with Gateway(answers=refuse) as gateway, pytest.raises(UserError, match=r"answers 403: 403 - Access Denied|hung up"):
        ipfs.Node(gateway.url, 5).publish({"": tmp_path / "file"}, pin=True)
