"""Start a training job under mpirun, watch it, and bring it back until it is done: dllm launch -n N -- TRAIN ARGUMENTS."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import cli
from .errors import DONE, UserError
from .launching import mpirun
from .launching.run_disks import RunDisks
from .launching.run_status import RunStatus
from .launching.supervisor import say
from .launching.training_supervisor import TrainingSupervisor
from .runs import run_folder
from .training.options import parent_of, print_settings, train_config, train_options

EPILOG = """
examples
  dllm launch -n 8                                         the default run, on 8 ranks
  dllm launch -n 8 -- --data DIR --preset wlm-200          any arguments of dllm.train
  dllm launch -n 6 --resume RUN                            go on with RUN, on 6 ranks
  dllm launch -n 8 --run RUN -- --data DIR                 for batch scripts: make RUN, or go on with it where it is there
  dllm launch --hostfile FILE -- --data DIR                on other hosts too: a line each, such as  node1 slots=8
  dllm launch --hostfile FILE --interface wg0 -- --data DIR    between hosts by this network interface only

Under Open MPI the job goes on without a rank that dies. Where that is not possible, or everything dies, the job is started
anew from its newest whole checkpoint, on the hosts that answer. Ctrl-C once: a checkpoint, then the end (exit code 75); twice:
the end now. `dllm resize RUN -n M` goes on with M ranks.
Hosts of FILE need share no disk: they are asked, by ssh as mpirun does it, how far the run is and whether it is done. This host
need not be one of them. FILE is read again at each start, so that hosts may join and leave; a bad one changes nothing.
MPI does not encrypt what goes between hosts. Ranks that are all on this host cannot be reached from another.
"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, read. Raises UserError."""
    parser = cli.Parser("launch", __doc__, EPILOG)
    parser.add_argument(
        "-n", "--ranks", type=cli.at_least(1), metavar="N", help="default: one a core, or as the hosts have slots"
    )
    parser.add_argument("--hostfile", metavar="FILE", help="hosts to run on, as for mpirun")
    parser.add_argument("--interface", metavar="NAME", help="network interface between hosts, such as wg0")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run")
    parser.add_argument("--run", metavar="RUN", help="the run's folder: made, or gone on with where it has a checkpoint")
    parser.add_argument(
        "--retries", type=cli.at_least(0), default=5, metavar="K",
        help="starts in a row that bring the run no further before giving up (default 5)",
    )  # fmt: skip
    parser.add_argument(
        "--silence", type=cli.at_least(1, float), default=1800, metavar="S",
        help="a job that does nothing for so many seconds is started anew (default 1800)",
    )  # fmt: skip
    parser.add_argument("train", nargs="*", metavar="-- TRAIN ARGUMENTS", help="of dllm.train; see its --help")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return cli.run(launch, argv)


def launch(argv: Sequence[str]) -> int:
    """Exit code of the supervisor. Raises UserError where the job need not be started to know that it cannot be."""
    options = arguments(argv)
    wanted = train_options(options.train)
    if wanted.resume:
        raise UserError("--resume RUN belongs before the --: dllm launch -n N --resume RUN")
    if options.resume and (wanted.preset or wanted.config or wanted.out):
        raise UserError("--resume brings its own configuration and folder: leave out --preset, --config and --out")
    if options.resume and wanted.init_from:
        raise UserError("--resume goes on with the parameters that a run has: leave out --init-from, or begin a new run")
    if options.run and (options.resume or wanted.out):
        raise UserError("--run RUN names the folder: leave out --resume and --out")
    if wanted.settings:
        print_settings(train_config(wanted, _shape(parent_of(wanted))))
        return DONE
    hosts = mpirun.read_hosts(options.hostfile) if options.hostfile else {}
    run = options.run or options.resume or run_folder.new_name(wanted.out, wanted.preset or "default")
    with RunDisks(run, hosts) as disks:
        found = disks.status()
        if options.resume:
            _check_there(run, found, disks.silent())
        elif found.done and options.run:
            say("launch", f"{run} is done")
            return DONE
        elif found.there and not options.run:
            raise UserError(f"{run} exists on another host; choose another name, or go on with it by --resume {run}")
        if not parent_of(wanted):  # else they are to fit that model, which may lie on other hosts alone: the job says it
            train_config(wanted)  # what is wrong with its settings is said here, once
        if options.resume:
            disks.go_on()  # an older end is not this job's
        return TrainingSupervisor(options, wanted, disks, found).supervise()


def _shape(model: str) -> Callable[[str | None], dict[str, Any]] | None:
    """What the model that a new run begins with decides of the settings, if there is one. Raises UserError."""
    if not model:
        return None
    from .inference.loaded_model import LoadedModel
    from .inference.model_folder import shape_for  # slow to import

    return shape_for(LoadedModel.open(model).config)


def _check_there(run: str, found: RunStatus, silent: Sequence[str]) -> None:
    """Raise UserError where no disk has the settings of the run, or where they are none."""
    if not found.settings:
        unheard = f"; {', '.join(silent)} did not answer" if silent else ""
        raise UserError(f"{run} is not the folder of a run: it has no config.toml{unheard}")
    if os.path.exists(os.path.join(run, "config.toml")):  # else it lies on other hosts, where train reads it
        run_folder.read_settings(run)


if __name__ == "__main__":
    sys.exit(main())
