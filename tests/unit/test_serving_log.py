"""The log of a server: lines of JSON, and no more of them than some where anybody can cause them."""

import json
import logging
import os
import threading
import time

import pytest

from dllm.serving import log as module
from dllm.serving.log import MOST, TEXT, TRACE, UNWRITTEN, Log


@pytest.fixture
def log(monkeypatch):
    """A log whose minute is as long as the test says, and libraries as they were behind it."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(module, "MINUTE", 1e9)
    return Log(3)


def lines(capfd):
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_of_a_kind_some_lines_are_written_and_the_rest_is_counted(log, capfd, monkeypatch):
    for number in range(MOST + 50):
        log.limited("one kind", "message", number=number)
    log.limited("another kind", "message", number=-1)
    log("request", number=-2)
    assert [line["number"] for line in lines(capfd)] == [*range(MOST), -1, -2]
    log.catch_up()
    assert lines(capfd) == []  # the minute is not over
    monkeypatch.setattr(module, "MINUTE", 0.0)
    log.catch_up()
    found = lines(capfd)
    assert [(line["event"], line["rank"], line["kind"], line["lines"]) for line in found] == [("left_out", 3, "one kind", 50)]
    log.catch_up()
    assert lines(capfd) == []


def test_the_end_says_what_was_left_out_until_then(log, capfd):
    for _ in range(MOST + 1):
        log.limited("kind", "message")
    log.catch_up(ending=True)
    assert lines(capfd)[-1]["lines"] == 1


def test_libraries_are_bounded_in_lines_and_in_length(log, capfd):
    log.capture_libraries()
    source = logging.getLogger("other.package")
    for number in range(100):
        source.warning("%s %s", number, "x" * 100_000)
    found = lines(capfd)
    assert len(found) == MOST
    assert {len(line["text"]) for line in found} == {TEXT}
    try:
        raise ValueError("y" * 100_000)
    except ValueError:
        source.exception("failed")
    (line,) = lines(capfd)
    assert (line["text"], len(line["trace"]), line["level"]) == ("failed", TRACE, "ERROR")


def test_a_line_holds_nothing_that_a_terminal_obeys(log, capfd):
    text = "\x1b[2J\x9b2J\x07\r\n\u202eabc\u2028\x7f\u00e9"
    log("request", prompts=[text])
    raw = capfd.readouterr().err
    assert raw.count("\n") == 1
    assert all(character.isprintable() for character in raw[:-1])
    assert "\u00e9" in raw
    assert json.loads(raw)["prompts"] == [text]


def test_a_thread_writes_all_lines_in_order_and_the_end_waits_for_them(log, capfd):
    log.start()
    for number in range(2000):
        log("request", number=number)
    log.end()
    assert [line["number"] for line in lines(capfd)] == list(range(2000))
    log("later")
    assert [line["event"] for line in lines(capfd)] == ["later"]


def test_nobody_waits_for_a_reader_of_standard_error_and_what_found_no_room_is_counted(log):
    reading, writing = os.pipe()
    kept = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        log.start()
        begin, count = time.monotonic(), 0
        while count * 1000 < 3 * UNWRITTEN:  # far more than a pipe holds
            log("request", number=count, text="x" * 1000)
            count += 1
        assert time.monotonic() - begin < 5
        found = []

        def read():
            with open(reading, encoding="utf-8") as said:
                found.extend(map(json.loads, said))

        reader = threading.Thread(target=read)
        reader.start()
        log.end()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    reader.join(10)
    written = [line["number"] for line in found if line["event"] == "request"]
    lost = [line["lines"] for line in found if line["event"] == "left_out"]
    assert written == sorted(written)
    assert UNWRITTEN / 1100 < len(written) < count
    assert len(written) + sum(lost) == count
