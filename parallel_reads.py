"""Read many tensors of a checkpoint at once where that is faster: into a GPU, by several threads.

One thread reads a file from the page cache, looks at every value and copies it over at some 2 GB/s; a GPU takes tens of
GB/s. So each thread has a stream of its own, and reads wait for nothing but what the caller's stream had to do with the
memory that they fill; when `read_all` returns, everything is there. Into host memory the caller's thread reads alone: a
CPU process has one core for itself. Noise (`dummy_checkpoint.py`) is made by the GPU; the caller's thread only asks.

Idea: fastsafetensors and run:ai's model streamer, which read with many threads into staging buffers."""

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint, ProgressMeter

MAX_THREADS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One call of `Checkpoint.read_into`."""

    name: str
    dest: torch.Tensor
    index: int | None = None  # of the slice; None = the whole tensor


def read_all(
    checkpoint: Checkpoint, reads: Sequence[Read], *, meter: ProgressMeter | None = None, num_threads: int = 0
) -> None:
    """Do all of `reads`; `num_threads` 0 = by the machine. The first error is raised, when no read runs any more."""
    on_gpu = any(read.dest.is_cuda for read in reads)
    if not num_threads:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1) if on_gpu and checkpoint.reads_files else 1
    if num_threads == 1 or len(reads) < 2:
        for read in reads:
            checkpoint.read_into(read.name, read.dest, index=read.index, meter=meter)
        return
    free = torch.cuda.Event() if on_gpu else None
    if free is not None:
        free.record()  # what the caller's stream did before with this memory
    streams = _Streams(free)
    inference = torch.is_inference_mode_enabled()  # a thread's own: tensors made in it are written to in it alone

    def run(read: Read) -> None:
        with torch.inference_mode(inference), streams.of_this_thread(read.dest.device):
            checkpoint.read_into(read.name, read.dest, index=read.index, meter=meter)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        done = [pool.submit(run, read) for read in reads]
        wait(done, return_when=FIRST_EXCEPTION)
        for future in done:
            future.cancel()  # nothing, unless one failed
    streams.synchronize()
    for future in done:
        if not future.cancelled():
            future.result()


class _Streams:
    """One for each thread; a read is enqueued on its thread's."""

    def __init__(self, free: torch.cuda.Event | None) -> None:
        self._free = free
        self._by_thread: dict[int, torch.cuda.Stream] = {}

    def of_this_thread(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if self._free is None or device.type != "cuda":
            return contextlib.nullcontext()
        thread = threading.get_ident()
        if thread not in self._by_thread:
            stream = self._by_thread[thread] = torch.cuda.Stream(device)
            stream.wait_event(self._free)
        return torch.cuda.stream(self._by_thread[thread])

    def synchronize(self) -> None:
        for stream in self._by_thread.values():
            stream.synchronize()
