"""Several clients of one server, each with a token of its own: what is kept of the prompts of one tells the others nothing."""

import json
import os
import threading
import time

import httpx
import pytest
from helpers.launch import complaint, mpirun
from helpers.server import Server

ONE, OTHER = "token-of-the-first-client", "token-of-the-other-client"
PROMPT = "The patient's name is Ada Lovelace. " * 500


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.touch(0o600)
    path.write_text(f"# of the two hospitals\n{ONE}\n\n{OTHER}\n")
    return path


@pytest.fixture(scope="module")
def server(world, token_file):
    with Tokens(world / "run", "--token-file", token_file, ranks=1) as server:
        yield server


def bearer(token):
    return {"Authorization": f"Bearer {token}"} if token else {}


class Tokens(Server):
    """A server whose tests ask as one client or another."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.headers = {"Authorization": f"Bearer {ONE}"}

    def ask(self, token, path="completions", **body):
        """The hits of the cache that a request has caused, and the seconds that it took."""
        before, begin = self.hits(), time.monotonic()
        answer = httpx.post(f"{self.url}/v1/{path}", json=body, headers=bearer(token), timeout=60)
        seconds = time.monotonic() - begin
        assert answer.status_code == 200, answer.text
        return self.hits() - before, seconds

    def hits(self):
        text = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("dllm_cache_hits_total{"))


def test_each_token_is_good_and_no_other(server):
    for token in (ONE, OTHER):
        assert httpx.get(f"{server.url}/v1/models", headers=bearer(token)).status_code == 200
    for token in (ONE + OTHER, ONE[:-1], f"{ONE} {OTHER}", "# of the two hospitals", ""):
        assert httpx.get(f"{server.url}/v1/models", headers=bearer(token)).status_code == 401


def test_what_one_client_has_said_makes_no_answer_to_another_faster(server):
    body = {"prompt": PROMPT, "max_tokens": 1}
    first = server.ask(ONE, **body)
    again = server.ask(ONE, **body)
    other = server.ask(OTHER, **body)
    assert (first[0], other[0]) == (0, 0)
    assert again[0] >= 1
    assert again[1] < other[1] / 2, "only who has said it before is faster"
    assert server.ask(OTHER, **body)[0] >= 1
    assert server.ask(ONE, **body, cache_salt="a conversation")[0] == 0
    assert server.ask(ONE, **body, cache_salt="a conversation")[0] >= 1
    assert server.ask(OTHER, **body, cache_salt="a conversation")[0] == 0


def test_scores_and_embeddings_leave_nothing_for_others(server):
    text = "A text that was only measured. " * 20
    for path, body in (("score", {"text": text}), ("embeddings", {"input": text})):
        server.ask(ONE, path, **body)
        assert server.ask(OTHER, "completions", prompt=text + "x", max_tokens=1)[0] == (1 if path == "embeddings" else 0)


def test_without_tokens_a_salt_keeps_requests_apart(world):
    with Tokens(world / "run", ranks=1) as server:
        body = {"prompt": PROMPT, "max_tokens": 1}
        assert [server.ask("", **body)[0] for _ in range(2)] == [0, 1]
        assert [server.ask("", **body, cache_salt="mine")[0] for _ in range(2)] == [0, 1]
        answer = httpx.post(f"{server.url}/v1/completions", json=body | {"cache_salt": "x" * 257})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_streams_that_are_handed_on_are_the_same_for_every_client(world, token_file):
    """Two ranks with a slot each, several clients at a time: texts depend neither on the token nor on the rank."""
    with Tokens(world / "run", "--token-file", token_file, "--slots", 1, ranks=2) as server:
        body, found = {"prompt": "To be", "max_tokens": 2000, "seed": 5, "logprobs": 3}, []

        def ask(token):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer(token), timeout=60)
            found.append(json.dumps(answer.json()["choices"]) if answer.status_code == 200 else answer.text)

        for _ in range(20):
            threads = [threading.Thread(target=ask, args=(token,)) for token in (ONE, OTHER) * 3]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            if any(line["rank"] != line.get("computed_by", line["rank"]) for line in server.log()):
                break
        else:
            pytest.fail("nothing was handed on")
        assert len(set(found)) == 1
        assert len(found) >= 6


def refusals(folder):
    """Arguments of the command, and what it says of each."""
    made = lambda name, text, mode=0o600: (path := folder / name, path.write_bytes(text), path.chmod(mode))[0]
    good = (ONE + "\n").encode()
    os.mkfifo(folder / "fifo", 0o600)
    yield folder / "fifo", "is no regular file"
    yield folder, "is no regular file", "Is a directory"
    yield "/dev/zero", "is no regular file"
    for mode in (0o640, 0o604, 0o620, 0o644):
        path = made(f"mode-{mode:o}", good, mode)
        yield path, f"can be read or written by others: chmod 600 {path}"
    yield made("large", b"x" * ((1 << 16) + 1)), "has more than 65536 bytes"
    yield made("empty", b"\n# nothing\n"), "has no token"
    yield made("short", good + b"short\n"), "token 2 of 2 must be at least 16 printable ASCII characters without spaces"
    yield made("noise", b"\xff" * 20), "cannot read --token-file"
    if os.geteuid() == 0:
        path = made("other", good)
        os.chown(path, 12345, 12345)
        yield path, "belongs to another user"


def test_a_token_file_that_others_know_or_that_is_none_is_refused_in_one_line(world, tmp_path):
    for path, *said in refusals(tmp_path):
        done = mpirun(0, "-m", "dllm.serve", "run", "--token-file", path, cwd=world, timeout=30)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (path, done.stderr)
        assert any(text in done.stderr for text in said), done.stderr
        assert ONE not in done.stderr


def test_an_interface_that_is_none_is_refused_in_one_line(world):
    done = mpirun(0, "-m", "dllm.serve", "run", "--interface", "nothing0", cwd=world)
    assert done.returncode == 2
    assert done.stderr.startswith("dllm: this host has no network interface 'nothing0'; it has ")
    assert done.stderr.count("\n") == 1


CHANGE_FOLDER = """
import os, sys
from dllm.serve import main
rank = next(os.environ[name] for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ)
os.chdir(os.path.join(sys.argv[1], rank))
sys.exit(main(sys.argv[2:]))
"""


def test_ranks_with_different_tokens_are_told(world, tmp_path):
    """Each has a file of its own, of the same name."""
    for rank, token in enumerate((ONE, OTHER)):
        (tmp_path / str(rank)).mkdir()
        path = tmp_path / str(rank) / "tokens"
        path.touch(0o600)
        path.write_text(token)
    done = mpirun(2, "-c", CHANGE_FOLDER, tmp_path, world / "run", "--token-file", "tokens", "--port", "0")
    assert done.returncode == 2
    assert complaint(done) == "dllm: rank 0 and rank 1 do not have the same tokens: give all ranks the same --token-file\n"
