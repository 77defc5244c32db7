"""Go on with another number of ranks: dllm resize RUN -n M, while `dllm launch` watches RUN."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import cli
from .errors import DONE, UserError, reason
from .runs import marks, run_folder

PATIENCE = 10.0  # seconds that the launcher gets to notice

EPILOG = """
The job writes a checkpoint and comes back with M ranks, under the same launcher. Nothing is lost; each step is taken once.
Call it on any host of the job. To add hosts, write them into the file that launch was given as --hostfile: it is read again.
"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, read. Raises UserError."""
    parser = cli.Parser("resize", __doc__, EPILOG)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("-n", "--ranks", type=cli.at_least(1), required=True, metavar="M", help="how many from now on")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return cli.run(resize, argv)


def resize(argv: Sequence[str]) -> int:
    """Exit code once the launcher has taken the request in. Raises UserError."""
    options = arguments(argv)
    lanes = run_folder.read_settings(options.run).train.lanes
    if options.ranks > lanes:
        raise UserError(f"{options.run} has train.lanes = {lanes}: at most so many ranks can share them")
    if marks.is_done(options.run):
        raise UserError(f"{options.run} is done")
    try:
        path = marks.request_resize(options.run, options.ranks)
    except OSError as error:
        raise UserError(f"cannot write to {options.run}: {reason(error)}") from None
    end = time.monotonic() + PATIENCE
    while path.exists():
        if time.monotonic() > end:
            path.unlink(missing_ok=True)
            raise UserError(f"no launcher watches {options.run}: dllm launch -n {options.ranks} --resume {options.run}")
        time.sleep(0.1)
    print(f"{options.run} comes back with {options.ranks} ranks")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
