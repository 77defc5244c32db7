"""Text of a program that has Linux refuse system calls of its own process and its children, as another machine would."""

DENY = """
import ctypes, struct
class _Filter(ctypes.Structure):
    _fields_ = ("length", ctypes.c_ushort), ("program", ctypes.c_char_p)
libc = ctypes.CDLL(None, use_errno=True)
def deny(call, number, argument=None, value=0):
    '''Fail the system call of this number with an errno; argument: only where it, counted from 0, has the value.'''
    LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
    also = [] if argument is None else [(LOAD, 0, 0, 16 + 8 * argument), (EQUAL, 0, 1, value)]
    steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 1 + len(also), call), *also]
    steps += [(RETURN, 0, 0, 0x50000 | number), (RETURN, 0, 0, 0x7FFF0000)]  # or let it pass
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, ctypes.byref(_Filter(len(steps), program)), 0, 0) == 0  # seccomp
"""
