"""What all commands share: arguments that fail in one line, exit codes, and one rank that speaks.

To add a command: a file of dllm/ with main(argv), and a line in COMMANDS of __main__.py.
"""

from __future__ import annotations

import argparse
import atexit
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Never

from .comm import runtime
from .errors import BAD_INPUT, DONE, UserError, line
from .files import telling

if TYPE_CHECKING:
    from _typeshed import SupportsWrite
    from mpi4py import MPI


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print usage and exit; silent on all ranks but 0."""

    def __init__(self, command: str, description: str | None, epilog: str, rank: int = 0) -> None:
        super().__init__(
            prog=f"python -m dllm.{command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.rank = rank

    def error(self, message: str) -> Never:
        """Raise UserError."""
        raise UserError(f"{message}; {self.prog} --help shows the options")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if self.rank == 0:
            super()._print_message(message, file)


def run(
    command: Callable[[list[str]], int],
    argv: Sequence[str] | None = None,
    comm: MPI.Comm | None = None,
    *,
    product: bool = False,
) -> int:
    """command(argv) with its exit code; a UserError that all ranks share is printed by rank 0, and all leave with 2.

    argv : the arguments; None: those of the process
    comm : of the ranks that run the command; None: it is the work of one process
    product : what is printed is what the command is for, so that it has failed where that finds no room
    """
    telling.never_end()
    try:
        code = command(list(sys.argv[1:] if argv is None else argv))
        return BAD_INPUT if product and code == DONE and telling.found_no_room() else code
    except MemoryError as error:
        if comm is not None:
            raise  # the excepthook of comm.runtime says it
        return _refuse(UserError(f"out of memory: {error}"))
    except UserError as error:
        if comm is not None and comm.size > 1 and not error.shared:
            raise  # only this rank knows: the excepthook of comm.runtime ends the job
        return _refuse(error) if comm is None or comm.rank == 0 else BAD_INPUT
    finally:
        if colorama := sys.modules.get("colorama.initialise"):
            # sacrebleu brings it, Numba starts it, and in a terminal it would write an escape behind the last line.
            atexit.unregister(colorama.reset_all)


def collective(
    command: Callable[[list[str], MPI.Comm], int], argv: Sequence[str] | None = None, *, product: bool = False
) -> int:
    """`run` of a command that all ranks of a job run together: command(argv, comm), with MPI's world."""
    telling.never_end()
    try:
        comm = runtime.world()
    except UserError as error:
        return _refuse(error)
    return runtime.leave(comm, run(lambda words: command(words, comm), argv, comm, product=product))


def _refuse(error: UserError) -> int:
    """Say it on standard error. Returns the exit code."""
    sys.stdout.flush()
    sys.stderr.write(line(error))
    sys.stderr.flush()
    return BAD_INPUT


def warn_once(comm: MPI.Comm) -> Callable[[str], None]:
    """What tells the user a line on standard error that all ranks know: rank 0 says it."""

    def warn(text: str) -> None:
        if comm.rank == 0:
            sys.stderr.write(f"dllm: {text}\n")
            sys.stderr.flush()

    return warn


def add_precision(parser: Parser) -> None:
    """Add --precision, of products of a trained model; fp32: as its parameters are."""
    choices = ("fp32", "bf16", "int8")
    parser.add_argument("--precision", choices=choices, default="fp32", help="of products (default fp32)")


def at_least(least: float, kind: Callable[[str], float] = int, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least` and at most `most`, whole where kind is int."""
    bounds = f"at least {least}" + ("" if most == math.inf else f" and at most {most:,}")

    def convert(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number of {bounds}")
        return value

    convert.__name__ = getattr(kind, "__name__", "number")  # argparse's message names it
    return convert
