"""One kernel launch by the driver's own call, with as little Python as there is.

Why by hand: a step without a CUDA graph is bound by what the host does for each of its hundreds of launches, not by the
GPU. So a thread keeps one parameter block and one configuration and writes numbers into them; the driver has copied
both when it returns. A parameter is 8 bytes at least, of which the kernel reads as many as it declares; a struct by
value lies where its owner keeps it."""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import KernelError

MOST_ARGUMENTS = 48


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_char * 64)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *[(n, ctypes.c_uint) for n in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_INVALID_CONTEXT = 201
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_serialization = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=b"\x01")


class Struct:
    """A kernel's parameter that is a struct by value: its bytes as the kernel declares them, for any number of
    launches."""

    __slots__ = ("_bytes", "address")

    def __init__(self, packed: bytes) -> None:
        self._bytes = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self._bytes)


class _Block(threading.local):
    """What one thread hands to the driver."""

    def __init__(self) -> None:
        self.values = (ctypes.c_uint64 * MOST_ARGUMENTS)()
        start = ctypes.addressof(self.values)
        self.homes = range(start, start + 8 * MOST_ARGUMENTS, 8)
        self.pointers = (ctypes.c_void_p * MOST_ARGUMENTS)(*self.homes)
        self.away: list[int] = []  # arguments whose pointer led to a struct in the last launch
        self.config = Config(block_y=1, block_z=1, attributes=ctypes.pointer(_serialization))
        self.config_address = ctypes.addressof(self.config)
        self.pointers_address = ctypes.addressof(self.pointers)


_block = _Block()


def launch(
    function: int,
    grid: tuple[int, ...],
    block: int,
    arguments: Sequence[Any],
    *,
    stream: int,
    shared_bytes: int,
    overlap: bool,
    name: str,
) -> None:
    """`arguments`: tensors (their address), addresses, None (null), sized numpy scalars and `Struct`s (by value)."""
    mine = _block
    values, config = mine.values, mine.config
    while mine.away:
        i = mine.away.pop()
        mine.pointers[i] = mine.homes[i]
    for i, argument in enumerate(arguments):
        if type(argument) is torch.Tensor:
            values[i] = argument.data_ptr()
        elif argument is None:
            values[i] = 0
        elif type(argument) is Struct:
            mine.away.append(i)
            mine.pointers[i] = argument.address
        else:
            values[i] = _bits(argument)
    config.grid_x = grid[0]
    config.grid_y = grid[1] if len(grid) > 1 else 1
    config.grid_z = grid[2] if len(grid) > 2 else 1
    config.block_x, config.shared_bytes, config.stream = block, shared_bytes, stream
    config.num_attributes = 1 if overlap else 0
    code = _launch_call()(mine.config_address, function, mine.pointers_address, None)
    if code == _INVALID_CONTEXT:  # the thread's first call of CUDA is this launch
        use_context(torch._C._cuda_getDevice())
        code = _launch_call()(mine.config_address, function, mine.pointers_address, None)
    if code:
        check(code, name)


def _bits(argument: Any) -> int:
    """The 8 bytes that hold it, little-endian."""
    kind = type(argument)
    if kind is np.int32 or kind is np.int64 or kind is int:
        return int(argument)  # ctypes keeps the low 64 bits
    if kind is np.float32:
        return int(argument.view(np.uint32))
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, np.generic) and argument.nbytes <= 8:
        return int.from_bytes(argument.tobytes(), "little")
    raise TypeError(
        f"kernel argument of type {kind.__name__}: pass a tensor, an address, a sized numpy scalar or a Struct"
    )


@functools.cache
def driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no NVIDIA driver on this host ({error}); use the torch path (kernels='torch')") from error


def use_context(device: int) -> None:
    """Make the device's primary context, the one that torch works in, this thread's. The runtime does so at a thread's
    first call; the driver's own calls do not."""
    check(driver().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context


@functools.cache
def _launch_call() -> Callable[..., int]:
    call: Any = driver().cuLaunchKernelEx
    call.argtypes, call.restype = [ctypes.c_void_p] * 4, ctypes.c_int
    return call  # type: ignore[no-any-return]


def check(code: int, name: str) -> None:
    """KernelError with the driver's words where `code` is not 0."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise KernelError(f"kernel {name}: driver error {code}: {(text.value or b'unknown').decode()}")
