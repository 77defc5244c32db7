"""Start and end of a job: MPI comes up, errors are agreed on by all ranks, no crash leaves others hanging."""

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback

import mpi4py
import numpy as np

from ..errors import BAD_INPUT, UserError

NAP = 50e-6  # seconds between looks at a request where ranks outnumber cores


def world():
    """MPI's world communicator; from here on an uncaught exception on any rank ends the whole job."""
    mpi4py.rc.thread_level = "serialized"
    # Open MPI complains on standard error where windows do not go by UCX, which is no fault.
    os.environ.setdefault("OMPI_MCA_opal_common_ucx_verbose", "-1")
    from mpi4py import MPI

    sys.excepthook = _abort
    return MPI.COMM_WORLD


def survivable(comm):
    """Whether ranks may go on when one dies: Open MPI under `mpirun --with-ft ulfm`."""
    return comm.size > 1 and os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112, its own name


def _abort(kind, error, trace):
    """Tell what happened in one write, then end every rank; where others can go on without this one, this one alone."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    if isinstance(error, UserError):
        text, code = f"dllm: {error} (rank {rank})\n", BAD_INPUT
    elif isinstance(error, MemoryError):
        text, code = f"dllm: out of memory (rank {rank}): {error}; try more ranks, or fewer train.lanes\n", BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        text, code = "dllm: interrupted\n", 130
    else:
        text, code = f"dllm: rank {rank} failed\n" + "".join(traceback.format_exception(kind, error, trace)), 1
    sys.stderr.write(text)
    sys.stderr.flush()
    if survivable(MPI.COMM_WORLD):
        die()
    time.sleep(0.2)  # MPICH's mpirun has been seen to drop what it had not passed on when the job ended
    MPI.COMM_WORLD.Abort(code)


def finish(comm, code=None):
    """Let all ranks arrive, and write out what they printed, before any leaves.

    code : where ranks have died; leaves the process at once, since MPI's own end would wait for them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code is None:
        wait(comm.Ibarrier())
        return
    from mpi4py import MPI

    with contextlib.suppress(MPI.Exception):
        wait(comm.Ibarrier())
    leave(code)


def leave(code):
    """End this process now, without MPI's finalisation, as all others do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def part(comm, code, patience=5.0):
    """End this process as the others do: whenever they like where deaths are survived, else all at about the same time.

    patience : seconds after which it leaves without the others, with exit code 1
    """
    from mpi4py import MPI

    if not survivable(comm):  # mpirun would take it for a crash
        faulthandler.dump_traceback_later(patience, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115, needs no thread of Python
        MPI.Finalize()
    leave(code)


def die():
    """End this process so that the others notice: of one that merely exits Open MPI tells them nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def allgather(comm, value):
    """The values of all ranks, a list, in mpi4py's own form. Collective.

    For whatever is said between steps, where a rank may die: mpi4py's allgather has been seen to return garbage then, and its
    allreduce waits for ever, in a communicator of its own that nobody can revoke.
    """
    if comm.size == 1:
        return [value]
    from mpi4py import MPI

    mine = np.frombuffer(MPI.pickle.dumps(value), np.uint8)
    lengths = np.empty(comm.size, np.int64)
    comm.Iallgather(np.array([mine.size]), lengths).Wait()
    everyones = np.empty(lengths.sum(), np.uint8)
    comm.Iallgatherv(mine, [everyones, lengths]).Wait()
    return [MPI.pickle.loads(part) for part in np.split(everyones, np.cumsum(lengths)[:-1])]


@contextlib.contextmanager
def together(comm):
    """A block that may fail on any rank, without communication inside: the lowest rank's UserError is raised on all."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except (OSError, MemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = allgather(comm, problem)
    rank = next((rank for rank, text in enumerate(problems) if text is not None), None)
    if rank is not None:
        others = "" if all(text is not None for text in problems) or len(problems) == 1 else f" (rank {rank})"
        raise UserError.of_all(problems[rank] + others) from None


def agree(comm, function, *arguments):
    """function(*arguments) on every rank, as a block of `together`."""
    with together(comm):
        return function(*arguments)


def check_same(comm, facts):
    """Raise UserError on all ranks where `facts`, name -> value, differ between ranks; it names the fact and a rank."""
    everyone = allgather(comm, facts)
    for name in everyone[0]:
        values = [other.get(name) for other in everyone]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            raise UserError.of_all(
                f"the ranks do not agree on the {name}: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}; "
                "start all of them with the same command, code and data"
            )


def mpi_library():
    """One line that names the MPI in use."""
    from mpi4py import MPI

    lines = MPI.Get_library_version().replace("\0", "").strip().splitlines()
    return " ".join(lines[0].split(",")[0].replace("Version:", "").split())


def wait(request, nap=NAP):
    """Wait for a request and leave the core to others meanwhile."""
    while not request.Test():
        time.sleep(nap)
