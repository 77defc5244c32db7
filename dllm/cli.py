"""What all commands share: arguments that fail in one line, exit codes, and one rank that speaks."""

import argparse
import atexit
import sys

from .errors import BAD_INPUT, UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print usage and exit; silent on all ranks but 0."""

    def __init__(self, command, description, epilog, rank=0):
        super().__init__(
            prog=f"python -m dllm.{command}", description=description, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.rank = rank

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help shows the options")

    def _print_message(self, message, file=None):
        if self.rank == 0:
            super()._print_message(message, file)


def run(command, argv=None, comm=None):
    """command(argv) with its exit code; a UserError that all ranks share is printed by rank 0, and all leave with 2."""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if comm is not None and comm.size > 1 and not error.shared:
            raise  # only this rank knows: the excepthook of comm.runtime ends the job
        if comm is None or comm.rank == 0:
            sys.stdout.flush()
            sys.stderr.write(f"dllm: {error}\n")
            sys.stderr.flush()
        return BAD_INPUT
    finally:
        if colorama := sys.modules.get("colorama.initialise"):
            # sacrebleu brings it, Numba starts it, and in a terminal it would write an escape behind the last line.
            atexit.unregister(colorama.reset_all)


def at_least(least, kind=int):
    """An argparse type: a number of at least `least`."""

    def convert(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert
