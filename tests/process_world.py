"""A handful of real processes for one test: forked from a server that has imported torch once, results by pipe.

Every wait is bounded, and one that is in vain says where each process stands: a test that hangs is an error to read."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "expertmesh.router.mesh", "process_world"])
PATIENCE_S = 60.0 if torch.version.cuda is None else 25.0  # hosts of GPUs have cores to spare


class ProcessWorld:
    """`num_ranks` processes, each running `target(rank, connection, *args)`; its return value is its result."""

    def __init__(self, target: Callable[..., Any], num_ranks: int, *args: Any) -> None:
        self.connections: list[Connection] = []
        self.processes = []
        self._target = target
        self._folder = tempfile.TemporaryDirectory()  # of stacks
        for rank in range(num_ranks):
            self.add(rank, *args)

    def add(self, rank: int, *args: Any) -> int:
        """One more process, as this rank; returns its place in `connections`."""
        ours, theirs = _context.Pipe()
        stacks = str(self._stacks_of(len(self.connections)))
        process = _context.Process(target=_run, args=(self._target, stacks, rank, theirs, *args), daemon=True)
        process.start()
        theirs.close()
        self.connections.append(ours)
        self.processes.append(process)
        return len(self.connections) - 1

    def receive(self, rank: int, timeout_s: float = PATIENCE_S) -> Any:
        """The next message of this rank: what it sent, or its result. An error there is an error here."""
        if not self.connections[rank].poll(timeout_s):
            raise TimeoutError(f"rank {rank} sent nothing for {timeout_s} s\n{self.stacks()}")
        kind, value = self.connections[rank].recv()
        if kind == "error":
            raise AssertionError(f"rank {rank} failed:\n{value}")
        return value

    def results(self, timeout_s: float = PATIENCE_S) -> list[Any]:
        """The next message of every rank, in rank order; the first error of any ends the wait."""
        found: dict[int, Any] = {}
        while len(found) < len(self.connections):
            open_ranks = [r for r in range(len(self.connections)) if r not in found]
            if not (ready := wait([self.connections[r] for r in open_ranks], timeout_s)):
                raise TimeoutError(f"ranks {open_ranks} sent nothing for {timeout_s} s\n{self.stacks()}")
            for rank in open_ranks:
                if self.connections[rank] in ready:
                    found[rank] = self.receive(rank)
        return [found[rank] for rank in range(len(self.connections))]

    def stacks(self) -> str:
        """Where all threads of all processes are now, in Python's words."""
        alive = [p for i, p in enumerate(self.processes) if p.exitcode is None and self._stacks_of(i).exists()]
        for process in alive:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5 if alive else 0)  # they write even in a call of the driver's, but do not say when they have
        return "\n".join(
            f"process {i}, exit code {process.exitcode}:\n"
            + (self._stacks_of(i).read_text() if self._stacks_of(i).exists() else "(has not begun)")
            for i, process in enumerate(self.processes)
        )

    def _stacks_of(self, place: int) -> Path:
        return Path(self._folder.name, str(place))

    def __enter__(self) -> "ProcessWorld":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=0 if process.exitcode is not None else 2)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._folder.cleanup()


def run(target: Callable[..., Any], num_ranks: int, *args: Any) -> Sequence[Any]:
    with ProcessWorld(target, num_ranks, *args) as world:
        return world.results()


def _run(target: Callable[..., Any], stacks: str, rank: int, connection: Connection, *args: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"))  # noqa: SIM115  (open as long as the process lives)
    try:
        answer = target(rank, connection, *args)
    except BaseException:
        _say(connection, ("error", traceback.format_exc()))  # what failed still stands: to take it apart may hang
    else:
        _say(connection, ("value", answer))


def _say(connection: Connection, message: tuple[str, Any]) -> None:
    """And wait: a process that ends closes its sockets under peers that are still reading, so all end together, when
    the parent says so."""
    with contextlib.suppress(EOFError, OSError):
        connection.send(message)
        while True:
            connection.recv()
