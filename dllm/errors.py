"""The errors that users see, and the exit codes of every command."""

from __future__ import annotations

DONE = 0
BAD_INPUT = 2  # one line on standard error says what, where and what would do
STOPPED_EARLY = 75  # a checkpoint is there to resume from (EX_TEMPFAIL of sysexits.h)


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
