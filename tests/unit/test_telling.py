"""What tells never ends what it tells of: letters, closed pipes, full disks, closed descriptors."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
from helpers.launch import environment

from dllm.config import LogConfig
from dllm.errors import UserError
from dllm.files import storage
from dllm.training import curves, event_files, progress

SPEAK = """
import json, sys
from dllm import cli
def work(words):
    for text in ("\\u5317\\u4eac", "\\udcff", "z" * 100000):  # an undecodable byte of a path
        print(text, flush=True)
        sys.stderr.write(text[:10] + "\\n")
    with open(words[0], "w") as file:
        file.write("done")
    return 75
sys.exit(cli.run(work))
"""
RESULT = """
import sys
from dllm import cli
sys.exit(cli.run(lambda words: print("the result") or 0, product=True))
"""
LIVE = """
import sys
from dllm.files import telling
from dllm.training.progress import Reporter
telling.never_end()
reporter = Reporter(True, "live")
reporter.begin(".", 0, 3, writes=False)
for step in range(3):
    reporter.log({"step": step, "loss": 1.0, "tokens_per_second": 1.0, "hidden_comm_fraction": 0.0})
    reporter.say("\\u5317\\u4eac")
reporter.end()
open(sys.argv[1], "w").write("done")
"""


def run(program, tmp_path, shell, **variables):
    """The CompletedProcess of a program whose outputs the shell's words direct, and whether it came to its end."""
    end = tmp_path / "end"
    words = ["bash", "-c", f'"$0" "$@" {shell}', sys.executable, *([] if "u" not in variables else [variables.pop("u")])]
    done = subprocess.run(
        [*words, "-c", program, end], env=environment(variables), capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    return done, end.exists()


@pytest.mark.parametrize(
    ("shell", "variables", "says"),
    [
        ("", {"PYTHONIOENCODING": "ascii"}, "\\u5317"),
        ("", {"PYTHONIOENCODING": "latin-1:strict"}, "\\u5317"),
        ("", {}, ""),  # half a character of a file's name
        ("| true; exit ${PIPESTATUS[0]}", {}, ""),
        ("2>&1 | head -c 10; exit ${PIPESTATUS[0]}", {}, ""),
        (">/dev/full", {}, "No space left"),
        (">/dev/full", {"u": "-u"}, "No space left"),
        (">/dev/full 2>&1", {}, ""),
        (">&- 2>&-", {}, ""),
        ("0</dev/null >&-", {}, ""),
    ],
)
def test_the_work_comes_to_its_end_with_its_own_exit_code(tmp_path, shell, variables, says):
    done, ended = run(SPEAK, tmp_path, shell, **variables)
    assert (done.returncode, ended) == (75, True), done
    assert says in done.stdout + done.stderr
    assert not re.search("Traceback|Exception ignored", done.stderr)
    assert done.stderr.count("dllm:") == ("No space" in says)


@pytest.mark.parametrize("shell", ["| true; exit ${PIPESTATUS[0]}", ">/dev/full", ""])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_live_line_is_dropped_too(tmp_path, shell, encoding):
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": "", "TERM": "dumb"}  # in which text waits for a flush
    done, ended = run(LIVE, tmp_path, shell, **variables)
    assert (done.returncode, ended) == (0, True), done


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [(">/dev/full", 2, "No space left"), ("| true; exit ${PIPESTATUS[0]}", 0, ""), (">/dev/null", 0, "")],
)
def test_a_result_that_finds_no_room_is_an_error_and_one_that_nobody_reads_is_none(tmp_path, shell, code, says):
    done, _ = run(RESULT, tmp_path, shell)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(says)), done
    assert says in done.stderr


def test_a_terminal_that_was_made_nonblocking_gets_all_of_it(tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    words = [sys.executable, "-c", SPEAK, tmp_path / "end"]
    with subprocess.Popen(words, env=environment(), stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        with open(read, "rb") as file:
            text = file.read()
        assert process.wait(30) == 75
    assert text.count(b"z") == 100000


def test_a_line_of_json_is_json_in_every_encoding(tmp_path):
    program = "import json, sys; from dllm.files import telling; telling.never_end(); "
    program += "print(json.dumps(chr(0x1F600), ensure_ascii=not telling.has_all_letters()))"
    for encoding in ("ascii", "utf-8"):
        done, _ = run(program, tmp_path, "", PYTHONIOENCODING=encoding)
        assert json.loads(done.stdout) == "\U0001f600"


@pytest.mark.parametrize("error", [None, errno.ENOSPC, errno.EROFS])
def test_a_picture_that_finds_no_room_is_not_promised(tmp_path, monkeypatch, capsys, error):
    def write(path, form):
        if error:
            raise OSError(error, os.strerror(error))
        path.write_text(form)

    monkeypatch.setattr(progress, "can_draw", lambda: True)
    monkeypatch.setattr(progress, "draw", lambda *_: write)
    reporter = progress.Reporter(True, "none")
    reporter.run = tmp_path
    assert reporter.plot() == ("there is no loss.png" if error else str(tmp_path / "loss.png"))
    assert [path.name for path in tmp_path.iterdir()] == ([] if error else ["loss.png"])
    assert ("cannot write" in capsys.readouterr().err) == bool(error)


@pytest.mark.parametrize(("broken", "large"), [(ImportError, False), (TypeError, True)])
def test_a_picture_that_cannot_be_drawn_costs_a_finished_run_nothing(tmp_path, monkeypatch, broken, large):
    for name in ("matplotlib", "tensorboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {broken.__name__}('of another time')")
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    reporter = progress.Reporter(True, "none")
    reporter.run = tmp_path
    why = "of another time"
    if large:
        (tmp_path / "metrics.jsonl").write_text("{}\n" * 9)
        monkeypatch.setattr(storage, "LARGEST_METRICS", 9)
        why = f"{tmp_path}/metrics.jsonl is too large: "
    assert reporter.plot().startswith(f"there is no loss.png: {why}")
    with pytest.raises(UserError, match=r"log\.tensorboard = true needs a tensorboard that works \(of another time\): pip"):
        event_files.check(LogConfig(tensorboard=True))
    with pytest.raises(UserError, match=r"--out a\.png needs a matplotlib that works: of another time"):
        curves.check_picture("--out", "a.png")
