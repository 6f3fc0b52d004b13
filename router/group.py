"""The communicator of one epoch's membership: process group objects of its own, never the process-wide default group.

Why own objects: several live in one process, so the next epoch's is built in a background thread (1-3 ms) while the
present one serves, and a broken one is aborted without touching others. The rendezvous store listens on the configured
interface alone and lives in the process that leads the epoch; its keys begin with the epoch's random key.
Trap: a Gloo timeout closes the pair, so the group's own timeout is long and deadlines are set per wait.
Idea: torchft's reconfigurable process groups."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, cast

import torch
from torch.distributed import AllToAllOptions, PrefixStore, ProcessGroup, ProcessGroupGloo, Store, TCPStore

from ..errors import EpochError, KernelError
from ..kernels.peer_exchange import PeerBuffer
from ..kernels.peer_memory import PeerMemory
from .epoch import Epoch

_IDLE_TIMEOUT = timedelta(hours=24)
_ABORT_TAG = (1 << 31) - 1  # no message has it
_GIVE_WAY = 10  # in steps of `nice`: a tenth of a core beside one that steps


class RendezvousStore:
    """Listens for the communicators of epochs that this process leads."""

    def __init__(self, interface: str) -> None:
        with socket.create_server((interface, 0), backlog=64) as listener:
            self.port: int = listener.getsockname()[1]
            # The store owns the file descriptor from here on.
            self._store = TCPStore(
                interface,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
                timeout=timedelta(seconds=10),
            )


def build_gloo(epoch: Epoch, rank: int, *, interface: str, timeout_s: float) -> ProcessGroup:
    """Meet the other members of the epoch and connect to each. Blocks; EpochError when one does not come in time."""
    use_batch_scheduling()  # inherited by the device's thread
    timeout = timedelta(seconds=timeout_s)
    try:
        # A client of its own: TCPStore is one locked connection, and a wait in one thread would stall all others.
        store = TCPStore(epoch.store_host, epoch.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=interface)]
        options._timeout = timeout
        prefix = PrefixStore(_prefix(epoch), store)
        group = ProcessGroupGloo(prefix, rank, len(epoch.members), options)
        group.set_timeout(_IDLE_TIMEOUT)
    except RuntimeError as error:  # DistError and all its kinds
        raise EpochError(
            f"epoch {epoch.number}: no communicator of {len(epoch.members)} members within {timeout_s:.0f} s: {error}"
        ) from error
    return cast(ProcessGroup, group)


def build_nccl(epoch: Epoch, rank: int, device: torch.device, *, channels: int, timeout_s: float) -> ProcessGroup:
    """A communicator of NCCL with a connection to every member. Blocks; EpochError when one does not come in time."""
    from torch.distributed import ProcessGroupNCCL  # type: ignore[attr-defined]  # only in torch for CUDA

    set_nccl_environment(channels)
    failed = f"epoch {epoch.number}: no NCCL communicator of {len(epoch.members)} members within {timeout_s:.0f} s"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(epoch.store_host, epoch.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        prefix = PrefixStore(f"{_prefix(epoch)}/nccl", store)
        group: Any = ProcessGroupNCCL(prefix, rank, len(epoch.members), options)
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            group.eager_connect_single_device(device)
            ones = torch.ones(len(epoch.members), 256, device=device)
            group.alltoall_base(torch.empty_like(ones), ones, [], [], AllToAllOptions()).wait()
            met = torch.cuda.Event()
            met.record()
            deadline = monotonic() + timeout_s
            while not met.query():  # the first exchange connects every pair
                if monotonic() > deadline:
                    threading.Thread(target=group.abort, name="nccl-abort", daemon=True).start()
                    raise EpochError(failed)
                sleep(1e-3)
    except RuntimeError as error:  # DistError and all its kinds
        raise EpochError(f"{failed}: {error}") from error
    return cast(ProcessGroup, group)


def set_nccl_environment(channels: int) -> None:
    """Before a process's first communicator. Errors are ours to handle: no default of torch may end the process, and no
    monitor may wait for what we have given up. NVLink multicast stays off. Fewer channels than NCCL likes: 16 need 310
    MiB a communicator instead of 640."""
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "NCCL_NVLS_ENABLE": "0",
    }
    if channels:
        wanted["NCCL_MAX_NCHANNELS"] = str(channels)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def meet_peers(
    epoch: Epoch, rank: int, memory: PeerMemory, layouts: Sequence[PeerBuffer], *, timeout_s: float
) -> list[int]:
    """The address here of every rank's buffer. Blocks; EpochError when one does not come in time."""
    timeout = timedelta(seconds=timeout_s)
    try:
        store: Store = TCPStore(
            epoch.store_host, epoch.store_port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        store = PrefixStore(f"{_prefix(epoch)}/peer", store)
        store.set(str(rank), memory.card())  # type: ignore[arg-type]  # bytes are taken as they are
        cards = [bytes(store.get(str(peer))) for peer in range(len(epoch.members))]
    except RuntimeError as error:  # DistError and all its kinds
        raise EpochError(
            f"epoch {epoch.number}: the buffers of {len(epoch.members)} members did not meet within {timeout_s:.0f} s: "
            f"{error}"
        ) from error
    try:
        return [memory.base if peer == rank else memory.open(card, layouts[peer]) for peer, card in enumerate(cards)]
    except KernelError as error:
        raise EpochError(f"epoch {epoch.number}: {error}") from error


def _prefix(epoch: Epoch) -> str:
    return epoch.rendezvous_key or f"epoch-{epoch.number}"


def abort_gloo(group: ProcessGroup) -> None:
    """End all waits on this group, here and at the peers, now.

    Trap: `ProcessGroupGloo.abort()` closes no connection while anything refers to the group, and a peer would wait for
    its deadline. A receive that times out does: Gloo then fails the whole context, so one is made to. It must be from a
    peer that lives: from a dead one it fails at once and closes nothing else."""
    never = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer == group.rank():
            continue
        try:
            group.recv([never], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                break
    with contextlib.suppress(RuntimeError):
        group.abort()


def use_batch_scheduling() -> None:
    """SCHED_BATCH for the calling thread and those that it starts. Without it a wake-up on a busy core waits for a
    scheduler tick (4 ms) instead of 0.1 ms. Where it is not permitted nothing but time is lost."""
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def beside_steps(work: Callable[[], None]) -> None:
    """Do it in a thread that gives way to those that step, and wait. Below the lowest priorities: a thread that is
    starved while it holds the interpreter's lock stops its process's steps. A thread of its own, because only root may
    raise a priority again, and the threads of a communicator inherit their maker's."""
    with ThreadPoolExecutor(1, "beside-steps", initializer=_give_way) as pool:
        pool.submit(work).result()


def _give_way() -> None:
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # on Linux: of this thread
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _GIVE_WAY))
