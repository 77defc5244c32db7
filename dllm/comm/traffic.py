"""Bytes that a rank sends in a collective, by the usual algorithms for long messages.

Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH".
"""


def sent_by_allreduce(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends for an Allreduce of `nbytes`."""
    return 2 * (ranks - 1) * nbytes // ranks


def sent_by_allgather(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends for an Allgather to which each gives `nbytes`."""
    return (ranks - 1) * nbytes
