"""The errors that users see, and the exit codes of every command."""

from __future__ import annotations

from typing import Any

DONE = 0
BAD_INPUT = 2  # one line on standard error says what, where and what would do
NOT_SAVED = 74  # the last state of a run could not be written (EX_IOERR of sysexits.h)
STOPPED_EARLY = 75  # a checkpoint is there to resume from (EX_TEMPFAIL of sysexits.h)
LONGEST_LINE = 4000  # characters of a message; a path has up to 4096, and what is quoted of a file far fewer


class UserError(Exception):
    """Something the user can mend: printed as one line, without a traceback, by one rank; exit code 2."""

    shared = False  # True: every rank raises the same error, so the job can leave together

    @classmethod
    def of_all(cls, text: str) -> UserError:
        """One that every rank raises."""
        error = cls(text)
        error.shared = True
        return error


def reason(error: BaseException) -> str:
    """Why something failed, in one line for a message: the system's own words, else the first line of the error's text."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def printable(text: str) -> str:
    """A text of foreign origin as one line that cannot steer a terminal: controls, bidi marks and the like as \\uXXXX."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def shown(value: Any, most: int = 60) -> str:
    """A value out of a file or a command line, for a message: as Python writes it, at most `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        text = "a number of too many digits" if isinstance(value, int) else "values nested too deeply"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def line(error: UserError, where: str = "") -> str:
    """What is written to standard error of a UserError: one line, whatever a path or a file put into it."""
    text = printable(str(error))
    text = text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 3]}..."
    return f"dllm: {text}{where}\n"
