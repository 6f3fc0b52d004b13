"""glibc's malloc as a bench needs it to tell what a process holds from what malloc keeps for later.

With its usual arenas (8 a core) what is free lies between things in use in many places and is not given back: the
resident set of a process with many threads creeps up by tens of MiB and means nothing."""

import ctypes
import gc

_M_ARENA_MAX = -8
_libc = ctypes.CDLL("libc.so.6")


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


_libc.mallinfo2.restype = _Info


def use_one_arena() -> None:
    """Before the process has threads."""
    _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """What is free, to the system."""
    gc.collect()
    _libc.malloc_trim(0)


def in_use_bytes() -> int:
    """Of malloc; Python's small objects lie elsewhere (`sys.getallocatedblocks`)."""
    info = _libc.mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)
