"""How vectors travel: in how many buckets at a time, and how many bytes a rank sends in a collective.

The bytes are those of the usual algorithms for long messages: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective
communication operations in MPICH".
"""

IN_FLIGHT = 4  # buckets at a time, so the receive buffers stay small however large the vector


def sent_by_allreduce(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends for an Allreduce of `nbytes`."""
    return 2 * (ranks - 1) * nbytes // ranks


def sent_by_allgather(nbytes: int, ranks: int) -> int:
    """Bytes that each rank sends for an Allgather to which each gives `nbytes`."""
    return (ranks - 1) * nbytes
