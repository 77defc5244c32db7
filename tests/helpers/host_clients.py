"""Clients of a server over the hosts of benchmarks/hosts.py: each asks the rank of its own host."""

import contextlib
import json
import subprocess
import sys

TOKEN = "for-these-four-hosts"
CLIENT = """
import json, sys, httpx
url, body, token = json.loads(sys.argv[1])
known = {"Authorization": f"Bearer {token}"}
with httpx.stream("POST" if body else "GET", url, json=body, headers=known, timeout=30) as answer:
    if body and body.get("stream"):
        print(answer.headers["x-dllm-rank"], flush=True)
        for _ in answer.iter_lines(): pass
    answer.read()
    print(json.dumps([answer.status_code, answer.headers.get("x-dllm-rank"), answer.json()]))
"""


def client(hosts, number, path, body=None):
    """The words that ask host `number`, from that host."""
    url = f"http://{hosts.names[number - 1]}:8000{path}"
    return [*hosts.on(number), sys.executable, "-c", CLIENT, json.dumps([url, body, TOKEN])]


def ask(hosts, number, path, body=None):
    """(status, rank that computed it, answer)"""
    done = subprocess.run(client(hosts, number, path, body), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@contextlib.contextmanager
def busy(hosts, number, prompt="To be"):
    """A long stream that a client of a host reads: the rank that computes it."""
    body = {"prompt": prompt, "max_tokens": 10**5, "stream": True}
    with subprocess.Popen(client(hosts, number, "/v1/completions", body), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
