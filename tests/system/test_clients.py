"""Clients of others against a server of two ranks: what docs/how-to/use-clients.md says, and what they find and raise.

DLLM_TEST_CLIENTS names an environment with openai, langchain-openai and prometheus_client, DLLM_TEST_NPM a folder node_modules
with openai: .ci/tools makes both. Of LiteLLM, which takes a minute to install, say FOLDER/clients/bin/pip install litellm.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess

import httpx
import numpy as np
import pytest
from helpers.server import Server, texts

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "use-clients.md"
PYTHON = pathlib.Path(os.environ.get("DLLM_TEST_CLIENTS", "nowhere")) / "bin" / "python"
MODULES = pathlib.Path(os.environ.get("DLLM_TEST_NPM", "nowhere"))
TOKEN = "a-token-for-clients-of-others"
PACKAGES = {"openai": "openai", "langchain": "langchain_openai", "litellm": "litellm", "prometheus_client": "prometheus_client"}
ROW = re.compile(r"^\| ([^|]+?) \|([^\n]*)\|$", re.MULTILINE)
RAISED = {what: [*map(str.strip, rest.split("|"))] for what, rest in ROW.findall(PAGE.read_text(encoding="utf-8"))}
COLUMNS = {"openai": 1, "langchain": 1, "litellm": 2, "npm": 3}
ROWS = {
    "model": "another model, a chat", "chat": "another model, a chat", "token": "no token, or a wrong one",
    "long": "a prompt that is too long", "large": "a body that is too large",
    "slow": "an answer that takes too long for the client",
}  # fmt: skip


def has(name):
    """Whether the clients' environment has a package."""
    return bool(list(PYTHON.parents[1].glob(f"lib/python3*/site-packages/{PACKAGES[name]}")))


def client(name):
    """A parameter of tests: a client of Python, skipped where it is not there."""
    why = f"no {PACKAGES[name]} in an environment at DLLM_TEST_CLIENTS"
    return pytest.param(name, marks=pytest.mark.skipif(not has(name), reason=why))


NPM = pytest.param(
    "npm",
    marks=pytest.mark.skipif(
        not (MODULES / "openai").is_dir() or not shutil.which("node"), reason="no openai at DLLM_TEST_NPM: .ci/tools FOLDER"
    ),
)
CLIENTS = [*map(client, ("openai", "langchain", "litellm")), NPM]


@pytest.fixture(scope="module")
def server(world):
    with Server(world / "run", "--max-tokens", 100_000, ranks=2, token=TOKEN) as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Takes the name of a client, a program and words, runs it, and returns what it says."""

    def run(name, program, *words):
        path = tmp_path / ("program.mjs" if name == "npm" else "program.py")
        path.write_text(program)
        if name == "npm":
            (tmp_path / "node_modules").symlink_to(MODULES)
        command = [shutil.which("node") if name == "npm" else PYTHON, path, *words]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI", "PYTHON", "LITELLM"))}
        env |= {"HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize("name", CLIENTS)
def test_the_lines_of_the_page_do_what_they_say(server, run, name):
    heading = {"openai": "openai, Python", "npm": "openai, npm", "langchain": "LangChain", "litellm": "LiteLLM"}[name]
    (block,) = re.findall(rf"^## {heading}\n\n```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.DOTALL)
    for old, new in (("http://127.0.0.1:8000", server.url), ("TOKEN", TOKEN), ("manual", "run")):
        assert old in block
        block = block.replace(old, new)
    asked = {"prompt": "The statement", "max_tokens": 20, "temperature": 0.9, "seed": 1}
    few, plain = (texts(server.complete(**asked, **more))[0] for more in ({"top_k": 5}, {}))
    assert few != plain
    assert run(name, block) == f"{few}\n{plain}\n2\n"


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_finds_what_the_server_has_and_raises_what_the_page_says(server, run, name):
    helper = HELPERS / ("in_npm_client.mjs" if name == "npm" else "in_clients.py")
    words = server.url, TOKEN, "run"
    found = json.loads(run(name, helper.read_text(), *([name] if name != "npm" else []), *words).splitlines()[-1])
    server.until(lambda: not any(entry["active"] for entry in server.health()["ranks"]), "an end of what clients gave up", 20)
    for what, said in found["raised"].items():
        assert said == ("APIUserAbortError" if what == "gone" else RAISED[ROWS[what]][COLUMNS[name]].strip("`")) or (
            name == "langchain" and what == "chat" and said == "OpenAIModelNotFoundError"  # a NotFoundError of LangChain's own
        ), what
    if name in ("openai", "npm"):
        expected = [texts(server.complete("To be", max_tokens=8, seed=seed))[0] for seed in range(20)]
        assert found["together"] == expected
    if name == "langchain":
        long = "To be " * 10
        prompts = [long[: 5 + n] for n in range(25)]
        assert found["together"] == [texts(server.complete(prompt, max_tokens=8, temperature=0))[0] for prompt in prompts]
        (told,) = server.complete("To be", max_tokens=8, seed=4, logprobs=2, temperature=0.7).json()["choices"]
        assert found["logprobs"] == told["logprobs"]
    if "invoked" in found:
        temperature = {"temperature": 0.7} if name == "langchain" else {}
        assert found["invoked"] == [texts(server.complete("To be", max_tokens=8, seed=4, **temperature))[0]] * 2
    assert found.get("models", ["run"]) == ["run"]
    body = {"input": [f"To be {number}" for number in range(1200)]}
    data = httpx.post(f"{server.url}/v1/embeddings", json=body, headers=server.headers, timeout=60).json()["data"]
    np.testing.assert_array_equal(np.float32(found["embeddings"]), np.float32([entry["embedding"] for entry in data]))


@pytest.mark.parametrize("name", [client("prometheus_client")])
def test_prometheus_reads_all_series(server, run, name):
    for _ in range(3):
        texts(server.complete(max_tokens=4))
    found = json.loads(run(name, (HELPERS / "in_clients.py").read_text(), name, server.url, TOKEN, "run"))
    assert all(kind in ("counter", "gauge", "histogram") for kind, _ in found.values())
    kind, samples = found["dllm_requests"]
    done = sum(value for _, labels, value in samples if (labels["route"], labels["status"]) == ("/v1/completions", "200"))
    assert kind == "counter"
    assert done >= 3
    assert {labels["rank"] for _, labels, _ in found["dllm_active"][1]} == {"0", "1"}
