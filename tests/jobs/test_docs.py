"""The documents do what they say: every command of README and of the tutorials is run, in the order of the page.

A page is run in a folder of its own. `dllm serve` stays in the background until its page ends, on a free port. What is not
run stands in NOT_RUN with the reason; what of a how-to page is not run is compared with the program's own options.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest
from helpers.launch import environment

from dllm import config
from dllm.__main__ import COMMANDS
from dllm.training.options import train_options

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = [ROOT / "README.md", *sorted(DOCS.glob("tutorials/*.md"))]
COMPARED = sorted(
    [*DOCS.glob("how-to/*.md"), *DOCS.glob("deploy/*.md"), *DOCS.glob("explanation/*.md"), ROOT / "CONTRIBUTING.md"]
)
WORDS = 30  # of a sentence, at most
LIMIT = 280  # seconds a page
README_STEPS = ("--max-steps", "3")  # added to what README trains: its settings are those of real work
NOT_RUN = {  # the beginning of a command -> why it is not run here, and what looks at it instead
    "python3 -m venv": "the gate runs it in a fresh clone",
    "sbatch": "tests/system/test_slurm.py submits the script; here the real parser reads the arguments",
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n)((?:^    .*\n)+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of a page: `kind` is sh or python."""

    kind: str
    text: str

    @property
    def commands(self):
        """One command each, with its continued lines, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"^\$ ", "", line.strip()) for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(path):
    """The blocks of a page in order: fenced sh, console and python; of README indented ones, too."""
    text = path.read_text(encoding="utf-8")
    found = [(at.start(), Block(at[1], at[2])) for at in FENCE.finditer(text) if at[1] in ("sh", "console", "python")]
    found = [(start, Block("sh" if block.kind == "console" else block.kind, block.text)) for start, block in found]
    if path.name == "README.md":
        rest = FENCE.sub(lambda at: "~" * len(at[0]), text)
        found += [(at.start(), Block("sh", textwrap.dedent(at[1]))) for at in INDENTED.finditer(rest)]
    return [block for _, block in sorted(found, key=lambda entry: entry[0])]


def reason(command):
    """Why a command is not run, or None."""
    return next((why for begin, why in NOT_RUN.items() if command.startswith(begin)), None)


def script(words):
    """The real parser reads what a batch script hands to dllm.train."""
    words = words[next(at for at, word in enumerate(words) if not word.startswith("-")) :]
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    train_options(words[1:])


class Page:
    """A page at work in a folder. Leaving its `with` ends the servers that it has started."""

    def __init__(self, path, folder):
        self.path, self.folder, self.servers, self.end = path, folder, [], time.monotonic() + LIMIT
        self.environment = environment({"COLUMNS": 100})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for server in self.servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)

    def run(self):
        together = []  # blocks of Python that follow each other are one program
        for block in [*blocks(self.path), Block("end", "")]:
            if block.kind == "python":
                together.append(block.text)
                continue
            if together:
                (self.folder / "example.py").write_text("".join(together).replace("127.0.0.1:8000", f"127.0.0.1:{self.port}"))
                self.shell(f"{sys.executable} example.py")
                together = []
            for command in block.commands:
                self.command(command)

    def command(self, command):
        if reason(command):
            if command.startswith("sbatch"):
                script(shlex.split(command)[1:])
            return
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if re.match(r"(dllm|python -m dllm\.?) ?serve", command):
            self.serve(f"{command} --port {self.port}")
        else:
            self.shell(shorter(command) if self.path.name == "README.md" else command)

    def shell(self, command):
        before = time.monotonic()
        done = subprocess.run(
            ["timeout", "-k", "5", str(max(1, int(self.end - time.monotonic()))), "bash", "-c", command], cwd=self.folder,
            env=self.environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        print(f"$ {command}   ({time.monotonic() - before:.1f} s)\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, f"{self.path.name}: exit code {done.returncode}: {command}\n{done.stdout}{done.stderr}"

    def serve(self, command):
        log = self.folder / f"server-{len(self.servers)}.log"
        with open(log, "wb") as out:
            self.servers.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.folder,
                    env=self.environment,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        while True:
            assert self.servers[-1].poll() is None, f"{command} has ended\n{log.read_text()}"
            assert time.monotonic() < self.end, f"{command} does not answer\n{log.read_text()}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            time.sleep(0.2)


def shorter(command):
    """README's training for a few steps only."""
    if "dllm.train" in command or command.startswith("dllm launch"):
        return shlex.join([*shlex.split(command), *README_STEPS])
    return command


def texts(folder):
    """The files that README takes for the reader's own."""
    from pydoc_data.topics import topics

    lines = "\n".join(topics.values()).splitlines(keepends=True)
    for split, part in {"train": lines[:4000], "valid": lines[-400:]}.items():
        (folder / f"{split}.txt").write_text("".join(part), encoding="utf-8")
    (folder / "texts").mkdir()
    for rank in range(4):
        (folder / "texts" / f"site{rank}.txt").write_text("".join(lines[1000 * rank : 1000 * (rank + 1)]), encoding="utf-8")
    words = ("the", "a", "house", "garden", "river", "small", "old", "green", "is", "was")
    for split, count in {"train": 400, "valid": 100}.items():
        for language, mark in {"en": "", "de": "x"}.items():
            pairs = (" ".join(words[(line * k) % len(words)] + mark for k in (1, 3, 7)) for line in range(1, count + 1))
            (folder / f"{split}.{language}").write_text("\n".join(pairs) + "\n", encoding="utf-8")
        reviews = "".join(f"{('bad', 'good')[line % 2]}\t{words[line % 2]} house number {line}\n" for line in range(count))
        (folder / f"{split}.tsv").write_text(reviews, encoding="utf-8")
    (folder / "new.txt").write_text("a house\nthe house\n", encoding="utf-8")


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_every_command_of_a_page_works(path, tmp_path):
    if path.name == "README.md":
        texts(tmp_path)
    with Page(path, tmp_path) as page:
        page.run()


def test_every_python_example_of_the_reference_works(tmp_path):
    if importlib.util.find_spec("dllm.api") is None:
        pytest.skip("dllm/api.py is not there")
    with Page(DOCS / "reference" / "python.md", tmp_path) as page:
        page.run()


def test_what_is_not_run_is_known():
    """Nothing is left out in silence: these are all, and each rule has a command."""
    left_out = {command: reason(command) for path in RUN for block in blocks(path) for command in block.commands}
    left_out = {command: why for command, why in left_out.items() if why}
    for command, why in left_out.items():
        print(f"{command}\n    not run: {why}")
    assert {begin for begin in NOT_RUN if any(command.startswith(begin) for command in left_out)} == set(NOT_RUN)


def test_readme_has_the_two_commands_of_a_new_user():
    commands = [command for block in blocks(ROOT / "README.md") for command in block.commands if "venv" in command]
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -e"
    assert commands == [
        f"{start} '.[mpich]' && mpirun -n 8 python -m dllm.train",
        f"{start} '.[mpich,test]' && python -m pytest",
    ]


@functools.cache
def options(command):
    """The long options that a command's --help shows."""
    asked = [sys.executable, "-m", "dllm", command, "--help"]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


@pytest.mark.parametrize("path", [*RUN, *COMPARED], ids=lambda path: path.stem)
def test_options_settings_and_presets_exist(path):
    known = config.flat(config.Config())
    for block in blocks(path):
        for command in block.commands if block.kind == "sh" else ():
            for key in re.findall(r"--set '?([a-z_.]+)=", command):
                assert key in known, f"{command}: there is no setting {key}"
            for preset in re.findall(r"--preset ([\w-]+)", command):
                assert preset in config.preset_names(), f"{command}: there is no preset {preset}"
            found = re.search(r"(?:python -m dllm\.|\bdllm )([a-z-]+)_?(?= |$)", command)
            if found and not command.startswith(("pip", "sbatch")):
                assert found[1] in COMMANDS, f"{command}: there is no command {found[1]}"
                allowed = options(found[1]) | (options("train") if found[1] == "launch" else set())
                used = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", command[found.start() :]))
                assert used <= allowed, f"{command}: there is no {used - allowed}"


def sentences(text):
    """The sentences of a page's prose, of its list entries and of the cells of its tables."""
    text = FENCE.sub("\n\n", text)
    text = re.sub(r"(?:^\n)(?:^    .*\n)+", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"<[^>]*>|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"^(#+ .*|[-*] |\d+\. |!!! .*|\{\{.*)", r"\n\n\1", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\|", text):
        yield from re.split(r"(?<=[.!?:])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("path", [*RUN, *COMPARED], ids=lambda path: path.stem)
def test_sentences_are_short(path):
    long = [one for one in sentences(path.read_text(encoding="utf-8")) if len(one.split()) > WORDS]
    assert not long, "\n".join(long)


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 1200
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_architecture_names_what_is_there():
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    lost = [name for name in dict.fromkeys(named) if not any((top / name).exists() for top in (ROOT, ROOT / "dllm"))]
    assert not lost, f"ARCHITECTURE.md names {', '.join(lost)}"
    assert len(named) > 30


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'; the gate has it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT,
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "tutorials" / "kernels.html").read_text(encoding="utf-8")
    assert "<math" in page
    assert "def lstm_backward_reference" in re.sub(r"<[^>]+>", "", page)
