"""The buffers of a `peer` exchange: this rank's own, and those of the other GPUs of the host, mapped here.

Plain device memory with a cudaIpc handle, which travels as 64 opaque bytes through the epoch's rendezvous store, beside
the sizes that both sides must agree on. No communicator: a new member is one more handle, a dead one a pointer no
longer used; what is written to a dead peer's memory does not fault. A buffer is never used again: an old peer may still
hold it. It is freed some seconds after its exchange was given up, when those that live have closed it.
Traps: the handle is opened with one's own device current, else the pointer is good in the exporter's device alone."""

import logging
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import KernelError
from .peer_exchange import PeerBuffer, initial_control

_log = logging.getLogger(__name__)
_CARD = struct.Struct("<Q64s")  # bytes of the buffer, handle
_LINGER_S = 5.0
_HOST_TO_DEVICE = 1  # cudaMemcpyKind


class PeerMemory:
    """One rank's buffer on its GPU."""

    def __init__(self, layout: PeerBuffer, device: torch.device) -> None:
        self.layout, self.device = layout, device
        with torch.cuda.device(device):
            self.base: int = _runtime().malloc(layout.num_bytes)
            self.bytes = _tensor_at(self.base, layout.num_bytes, device)
            self.bytes.zero_()
            control = torch.frombuffer(bytearray(initial_control()), dtype=torch.uint8)
            self.bytes[: control.numel()].copy_(control)
            torch.cuda.current_stream(device).synchronize()
        self._opened: list[int] = []

    def view(self, at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        num_bytes = dtype.itemsize
        for n in shape:
            num_bytes *= n
        return self.bytes[at : at + num_bytes].view(dtype).view(shape)

    def card(self) -> bytes:
        """What other ranks need to map this buffer."""
        with torch.cuda.device(self.device):
            handle = _runtime().ipcGetMemHandle(self.base)
        return _CARD.pack(self.layout.num_bytes, bytes(handle))

    def open(self, card: bytes, layout: PeerBuffer) -> int:
        """The address here of another rank's buffer. KernelError where it cannot be mapped."""
        if len(card) != _CARD.size:
            raise KernelError(f"a peer's buffer is described by {len(card)} bytes, {_CARD.size} expected")
        num_bytes, handle = _CARD.unpack(card)
        if num_bytes != layout.num_bytes:
            raise KernelError(
                f"a peer's buffer has {num_bytes} bytes, {layout.num_bytes} expected: exchange.max_tokens_per_turn and "
                "the model must be the same on all members"
            )
        try:
            with torch.cuda.device(self.device):
                address: int = _runtime().ipcOpenMemHandle(handle, 1)
        except RuntimeError as error:
            raise KernelError(
                f"a peer's buffer cannot be mapped here ({error}): are all members GPUs of one host, each in a process "
                "of its own? Else set exchange.backend=nccl"
            ) from error
        self._opened.append(address)
        return address

    def release(self, last: torch.cuda.Event | None, user: object = None) -> None:
        """Close and free in the background, when the device has passed `last`. `user` lives until then."""
        threading.Thread(target=self._release, args=(last, user), name="peer-memory", daemon=True).start()

    def _release(self, last: torch.cuda.Event | None, user: object) -> None:
        runtime = _runtime()
        try:
            with torch.cuda.device(self.device):
                while last is not None and not last.query():
                    time.sleep(0.05)
                time.sleep(_LINGER_S)  # what was launched of a step that was given up has ended too
                opened, self._opened = self._opened, []
                for address in opened:
                    runtime.ipcCloseMemHandle(address)
                time.sleep(_LINGER_S)
                del self.bytes
                runtime.free(self.base)
        except RuntimeError as error:  # a context that is broken frees nothing, and ends with its process
            _log.warning("the buffer of an exchange was not freed: %s", error)


class Poison:
    """Writes one number into the control blocks of all ranks, from any thread: by the copy engine, since every
    multiprocessor may be taken by kernels that wait."""

    def __init__(self, addresses: Sequence[int], device: torch.device) -> None:
        self._addresses, self._device = tuple(addresses), device
        self._word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()

    def write(self, value: int, *, skip: int = -1) -> None:
        """To all but the rank `skip`, which is known to be gone."""
        with self._lock, torch.cuda.device(self._device):
            self._word[0] = value
            for address in [a for rank, a in enumerate(self._addresses) if rank != skip]:
                _runtime().memcpyAsync(address, self._word.data_ptr(), 4, _HOST_TO_DEVICE, self._stream.cuda_stream)


def gpu_name(device: torch.device) -> str:
    """ "HOST/GPU": the running kernel's id and the card's, the same in every process and container of the host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()}/{torch.cuda.get_device_properties(device).uuid}"


class _AtAddress:
    """Memory that torch does not own, by the CUDA array interface."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_AtAddress(address, num_bytes), device=device)


def _runtime() -> Any:
    from cupy.cuda import runtime  # CuPy only where there is a GPU

    return runtime
