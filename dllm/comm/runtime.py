"""Start and end of a job: MPI comes up, errors are agreed on by all ranks, no crash leaves others hanging.

Five ways to the end of a process:

    finish          all ranks arrive first; then this one goes on to MPI's own end, or exits where ranks have died
    leave           the same at the end of a command, where Open MPI's own end would hang
    exit_together   all ranks end now, by MPI where it would take the end of one for a crash
    exit_now        this rank ends as it is told, without MPI; all others do the same
    kill_self       this rank ends by a signal, so that the others are told of a death
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import itertools
import os
import pathlib
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from ..errors import BAD_INPUT, UserError, line, printable
from ..files import starter
from . import loopback
from .messages import allgather

if TYPE_CHECKING:
    from mpi4py import MPI

P = ParamSpec("P")
T = TypeVar("T")

MOST_SHOWN = 100  # characters of a fact on which ranks do not agree
TO_SPEAK = 3.0  # seconds that one rank gets to say what all would
NAP = 50e-6  # seconds between looks at a request where ranks outnumber cores


def world() -> MPI.Comm:
    """MPI's world communicator; from here on an uncaught exception on any rank ends the whole job.

    Raises UserError where MPI sees another number of ranks than were started, as with the mpirun of another MPI: each process
    would do the work alone then, all in one folder. One of them raises it, the others end silently.
    """
    import mpi4py  # here, since commands of one process need none

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    # Open MPI complains on standard error where windows do not go by UCX, which is no fault.
    os.environ.setdefault("OMPI_MCA_opal_common_ucx_verbose", "-1")
    with loopback.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "suspicious MPI")  # what is said here names both MPIs
        from mpi4py import MPI

        if not MPI.Is_initialized():
            if _cannot_start():
                _refuse_start(1)
            _warn_of_shortage()
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
    sizes = starter.launched_sizes()
    if sizes and MPI.COMM_WORLD.size not in sizes:
        _refuse_start(MPI.COMM_WORLD.size)
    sys.excepthook = _abort
    return MPI.COMM_WORLD


def _cannot_start() -> bool:
    """Whether MPI would end this process when it starts: MPICH, under the mpirun of Open MPI, which speaks PMIx alone."""
    from mpi4py import MPI

    version = MPI.Get_library_version()
    return starter.is_open_mpi_job() and "Open MPI" not in version and "pmix" not in version.lower()


def _warn_of_shortage() -> None:
    """Say beforehand that MPICH will find too little shared memory: its own messages do not. By one rank of a host."""
    if os.environ.get("MPI_LOCALRANKID") == "0" and (problem := starter.shortage(_local_ranks(), used=True)):
        sys.stderr.write(f"dllm: {problem}\n")
        sys.stderr.flush()


def _local_ranks() -> int:
    ranks = os.environ.get("MPI_LOCALNRANKS", "")  # which MPICH's mpirun sets
    return int(ranks) if ranks.isdigit() else 1


def _refuse_start(size: int) -> NoReturn:
    """Raise UserError on one rank, and end the others. size : how many ranks MPI sees."""
    if starter.launched_rank() != 0:
        time.sleep(TO_SPEAK)  # mpirun may end all when one ends
        sys.exit(BAD_INPUT)
    program, sizes = starter.starting_program(), starter.launched_sizes()
    better = starter.mpirun_beside() or "the mpirun of this MPI, or by srun --mpi=TYPE as it needs"
    raise UserError(
        f"{program} has started {max(sizes)} ranks, but MPI ({_library_path()}) sees {size}: "
        f"they do not belong together; start them by {better}"
    )


def _library_path() -> str:
    """Where MPI's library was loaded from; its name where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"/\S*/libmpi[^/\s]*\.so\S*", pathlib.Path("/proc/self/maps").read_text())
        if found:
            return found[0]
    return mpi_library()


def survivable(comm: MPI.Comm) -> bool:
    """Whether ranks may go on when one dies: Open MPI under `mpirun --with-ft ulfm`."""
    return comm.size > 1 and os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112, its own name


def _finalisation_hangs(comm: MPI.Comm) -> bool:
    """Whether MPI's own end may wait for ever: Open MPI 5.0 with its detector of silent hosts, for a rank that left before."""
    return survivable(comm) and os.environ.get("OMPI_MCA_mpi_ft_detector") == "1"  # noqa: SIM112, its own name


def leave(comm: MPI.Comm, code: int) -> int:
    """The end of a command that all ranks have come to: its exit code, where MPI's own end may follow. Collective."""
    if _finalisation_hangs(comm):
        finish(comm, code)
    return code


def _abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell what happened in one write, then end every rank; where others can go on without this one, this one alone."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    if isinstance(error, UserError):
        text, code = line(error, f" (rank {rank})"), BAD_INPUT
    elif isinstance(error, MemoryError):
        text, code = f"dllm: out of memory (rank {rank}): {error}; try more ranks, or fewer train.lanes\n", BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        text, code = "dllm: interrupted\n", 130
    else:
        text, code = f"dllm: rank {rank} failed\n" + "".join(traceback.format_exception(kind, error, trace)), 1
    sys.stderr.write(text)
    sys.stderr.flush()
    if survivable(MPI.COMM_WORLD):
        kill_self()
    time.sleep(0.2)  # MPICH's mpirun has been seen to drop what it had not passed on when the job ended
    MPI.COMM_WORLD.Abort(code)


def finish(comm: MPI.Comm, code: int | None = None) -> None:
    """Let all ranks arrive, and write out what they printed, before any leaves. Collective.

    code : where ranks have died; this ends the process with it, since MPI's own end would wait for the dead.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code is None:
        wait(comm.Ibarrier())
        return
    from mpi4py import MPI

    with contextlib.suppress(MPI.Exception):
        wait(comm.Ibarrier())
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """End this process now, without MPI's finalisation, as all others do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_together(comm: MPI.Comm, code: int, patience: float = 5.0) -> NoReturn:
    """End this process as the others do: whenever they like where deaths are survived, else all at about the same time.

    patience : seconds after which it leaves without the others, with exit code 1
    """
    from mpi4py import MPI

    if not survivable(comm):  # mpirun would take it for a crash
        faulthandler.dump_traceback_later(patience, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115, needs no thread of Python
        MPI.Finalize()
    exit_now(code)


def kill_self() -> NoReturn:
    """End this process so that the others notice: of one that merely exits Open MPI tells them nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(1)  # never reached: a type checker does not know what this signal does


@contextlib.contextmanager
def together(comm: MPI.Comm) -> Iterator[None]:
    """A block that may fail on any rank, without communication inside: the lowest rank's UserError is raised on all."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except (OSError, MemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = allgather(comm, problem and printable(problem), str | None)
    found = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if found:
        rank, text = found[0]
        where = "" if len(found) == len(problems) else f" (rank {rank})"
        raise UserError.of_all(text + where) from None


def agree(comm: MPI.Comm, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """function(*arguments) on every rank, as a block of `together`."""
    with together(comm):
        return function(*arguments, **options)


def check_same(comm: MPI.Comm, facts: dict[str, Any]) -> None:
    """Raise UserError on all ranks where `facts`, name -> value, differ between ranks; it names the fact and a rank.

    Digests travel; only where two differ, what these ranks have of this one fact does.
    """
    digests = [hashlib.sha256(f"{name}={value!r}".encode(errors="replace")).hexdigest()[:16] for name, value in facts.items()]
    everyone = allgather(comm, digests, list[str])
    odd = next((rank for rank, others in enumerate(everyone) if others != everyone[0]), None)
    if odd is None:
        return
    # All ranks come here, even where one has more facts than another, as a different version of dllm may have.
    pairs = itertools.zip_longest(everyone[0], everyone[odd])
    place = next(number for number, (first, other) in enumerate(pairs) if first != other)
    name = [*facts][place] if place < len(facts) else "number of settings"
    told = allgather(comm, (name, printable(str(facts.get(name, len(facts))))[:MOST_SHOWN]), tuple[str, str])
    (name, first), (_, other) = told[0], told[odd]
    raise UserError.of_all(
        f"the ranks do not agree on the {name}: rank 0 has {first}, rank {odd} has {other}; "
        "start all of them with the same command, code and data"
    )


def mpi_library() -> str:
    """One line that names the MPI in use."""
    from mpi4py import MPI

    lines = MPI.Get_library_version().replace("\0", "").strip().splitlines()
    return " ".join(lines[0].split(",")[0].replace("Version:", "").split())


def wait(request: MPI.Request, nap: float = NAP) -> None:
    """Wait for a request and leave the core to others meanwhile."""
    while not request.Test():
        time.sleep(nap)


def wait_for(request: MPI.Request, oversubscribed: bool) -> None:
    """Wait for a request; where ranks outnumber cores, leave the core to others meanwhile."""
    if oversubscribed:
        wait(request)
    else:
        request.Wait()
