"""Several threads for one rank. Kernels run without Python's lock, so plain threads do: each gets a part of the work.

Work is always cut so that a number is computed by one thread in the order in which one thread alone would: results are the
same to the bit for any number of threads.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import TypeAlias, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import kernel
from .processor import ARM, X86
from .types import Array

Tasks: TypeAlias = queue.SimpleQueue[tuple[Callable[[int], object], int] | None]  # a function and the part of it to do
Done: TypeAlias = queue.SimpleQueue[BaseException | None]  # what became of a part

PATIENCE = 2000  # looks at a barrier, some tens of nanoseconds each, before the core is given away


def _work(tasks: Tasks, done: Done) -> None:
    """What a thread of a team does, until it is told nothing more. It holds on to nothing while it waits."""
    while (task := tasks.get()) is not None:
        try:
            task[0](task[1])
            done.put(None)
        except BaseException as error:
            done.put(error)
        del task


def _end(every: list[Tasks]) -> None:
    for tasks in every:
        tasks.put(None)


class Team:
    """`size` threads, the caller's among them. The others sleep between calls, and end when nobody has the team any more."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._done: Done = queue.SimpleQueue()
        self._tasks: list[Tasks] = [queue.SimpleQueue() for _ in range(size - 1)]
        for tasks in self._tasks:
            threading.Thread(target=_work, args=(tasks, self._done), daemon=True).start()
        weakref.finalize(self, _end, self._tasks).atexit = False

    def run(self, function: Callable[[int], object]) -> None:
        """function(part) for every part in range(size), at the same time."""
        for part, tasks in enumerate(self._tasks, 1):
            tasks.put((function, part))
        function(0)
        problems = [self._done.get() for _ in self._tasks]
        for problem in filter(None, problems):
            raise problem

    def share(self, function: Callable[[int, int], object], count: int, step: int = 1) -> None:
        """function(first, last) for `size` nearly equal shares of range(count), cut at multiples of `step`."""
        units = -(-count // step)

        def edge(part: int) -> int:
            return min(count, units * part // self.size * step)

        if self.size == 1 or units == 1:
            function(0, count)
        else:
            self.run(lambda part: edge(part) < edge(part + 1) and function(edge(part), edge(part + 1)))


@kernel
def share_in_pairs(panels: int, threads: int, part: int) -> tuple[int, int]:
    """The first panel of a thread's share and the one behind its last; even, since two panels make one of bfloat16."""
    pairs = (panels + 1) // 2
    return 2 * (pairs * part // threads), min(panels, 2 * (pairs * (part + 1) // threads))


def new_barrier() -> Array:
    """A counter for `meet`, at zero."""
    return np.zeros(1, np.int64)


@kernel
def meet(barrier: Array, threads: int, times: int) -> None:
    """Wait until each of `threads` threads has come here for the `times`-th time since the barrier was zero."""
    if threads > 1:
        _add_one(barrier.ctypes.data)
        looks = 0
        while _read(barrier.ctypes.data) < threads * times:
            looks += 1
            if looks > PATIENCE:  # somebody has no core: let it have this one
                _yield_core()


@intrinsic
@no_type_check
def _yield_core(typingctx):
    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), ()), "sched_yield")
        builder.call(function, ())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
@no_type_check
def _add_one(typingctx, address):
    def generate(context, builder, signature, arguments):
        i64 = ir.IntType(64)
        builder.atomic_rmw("add", builder.inttoptr(arguments[0], i64.as_pointer()), i64(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
@no_type_check
def _read(typingctx, address):
    def generate(context, builder, signature, arguments):
        # Who spins gives its core's other thread the units, and the memory a rest.
        if ARM:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            builder.call(builder.module.declare_intrinsic("llvm.aarch64.isb", (), kind), [ir.IntType(32)(15)])
        elif X86:
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), ())), ())
        return builder.load_atomic(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate
