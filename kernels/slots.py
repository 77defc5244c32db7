"""Rows of panels (gemm.py) to and from where streams keep their states, one block of memory a stream.

states (slots,L,2,P,R)      h and c of each layer of each stream, P panels of R units
"""

from .compile import kernel
from .types import Array


@kernel
def load_states(h: Array, c: Array, states: Array, slots: Array, layer: int) -> None:
    """Slot 0 of h and c (P,(T+1)B,R), lane n, = the states of stream slots[n]."""
    for n in range(slots.size):
        for panel in range(h.shape[0]):
            for j in range(h.shape[2]):
                h[panel, n, j] = states[slots[n], layer, 0, panel, j]
                c[panel, n, j] = states[slots[n], layer, 1, panel, j]


@kernel
def store_states(states: Array, h: Array, c: Array, slots: Array, lengths: Array, layer: int) -> None:
    """The states of stream slots[n] = slot lengths[n] of h and c, lane n."""
    B = slots.size
    for n in range(B):
        row = lengths[n] * B + n
        for panel in range(h.shape[0]):
            for j in range(h.shape[2]):
                states[slots[n], layer, 0, panel, j] = h[panel, row, j]
                states[slots[n], layer, 1, panel, j] = c[panel, row, j]
