"""Every byte that MPI is given to send, by commands that run as they are.

As a script, what each rank runs: python -m helpers.spy FOLDER [MODULE ARGUMENTS]. It runs this command, or those of
helpers.several_commands, with communicators that write to FOLDER/sent-R.bin what they are given, and refuse every call that
this file does not know.
"""

import importlib
import json
import os
import pathlib
import sys

import numpy as np
from mpi4py import MPI

from helpers import several_commands

NODES = "DLLM_SPY_NODES"  # variable: ranks stand for so many machines
SENDING = {  # what is sent is their first argument
    "Isend", "Iallgather", "Iallgatherv", "Igatherv", "Iallreduce", "Ineighbor_allgather", "Ineighbor_alltoall",
    "Accumulate", "Ibcast", "Iagree",
}  # fmt: skip
QUIET = {  # they say nothing, or nothing but where a message goes
    "Abort", "Barrier", "Create_dist_graph_adjacent", "Dup", "Free", "Get_rank", "Get_size", "Ibarrier", "Iprobe", "Irecv",
    "Lock", "Revoke", "Shrink", "Split", "Split_type", "Unlock", "tomemory",
}  # fmt: skip
commands = 0  # that have begun


def sent(folder, ranks):
    """(command, rank, name of the call, bytes) of all that MPI was given."""
    for rank in range(ranks):
        data, at = (folder / f"sent-{rank}.bin").read_bytes(), 0
        while at < len(data):
            end = data.index(b"\n", at)
            command, name, size = json.loads(data[at:end])
            yield command, rank, name, data[end + 1 : end + 1 + size]
            at = end + 1 + size


def _bytes_of(buffer):
    array = buffer[0] if isinstance(buffer, list | tuple) else buffer
    return np.ascontiguousarray(array).tobytes()


def _watched(base, file):
    """A class like `base` whose objects write down what they send."""

    def watch(name):
        def call(self, *arguments, **named):
            root = named.get("root", arguments[1] if name == "Ibcast" and len(arguments) > 1 else 0)
            if name in SENDING and not (name == "Ibcast" and self.Get_rank() != root):
                data = _bytes_of(arguments[0])
                file.write(json.dumps([commands - 1, name, len(data)]).encode() + b"\n" + data)
                file.flush()
            elif name not in SENDING | QUIET:
                raise AssertionError(f"MPI's {name} may send what nobody looks at")
            if name == "Split_type" and NODES in os.environ:
                return self.Split(self.Get_rank() * int(os.environ[NODES]) // self.Get_size())
            return wrap(getattr(base, name)(self, *arguments, **named))

        return call

    def wrap(value):
        kind = next((kind for kind in (MPI.Distgraphcomm, MPI.Intracomm) if type(value) is kind), None)
        return value if kind is None else _watched(kind, file)(value)

    names = [name for name in dir(base) if name[0] != "_" and name not in ("Allocate", "f2py", "py2f", "fromhandle")]
    watched = {name: watch(name) for name in names if callable(getattr(base, name))}
    return type(base.__name__, (base,), watched)


def _main(folder, *words):
    from dllm.comm import runtime

    file = open(folder / f"sent-{MPI.COMM_WORLD.rank}.bin", "wb")  # noqa: SIM115, until the process ends
    real = runtime.world

    def world():
        global commands
        commands += 1
        return _watched(MPI.Intracomm, file)(real())

    runtime.world = world
    MPI.Win = _watched(MPI.Win, file)
    if words:
        sys.exit(importlib.import_module(words[0]).main(list(words[1:])))
    several_commands.run(folder)


if __name__ == "__main__":
    _main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
