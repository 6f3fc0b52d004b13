"""A handful of real processes for one test: forked from a server that has imported torch once, results by pipe."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "expertmesh.router.mesh", "process_world"])


class ProcessWorld:
    """`num_ranks` processes, each running `target(rank, connection, *args)`; its return value is its result."""

    def __init__(self, target: Callable[..., Any], num_ranks: int, *args: Any) -> None:
        self.connections: list[Connection] = []
        self.processes = []
        self._target = target
        for rank in range(num_ranks):
            self.add(rank, *args)

    def add(self, rank: int, *args: Any) -> int:
        """One more process, as this rank; returns its place in `connections`."""
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_run, args=(self._target, rank, theirs, *args), daemon=True)
        process.start()
        theirs.close()
        self.connections.append(ours)
        self.processes.append(process)
        return len(self.connections) - 1

    def receive(self, rank: int, timeout_s: float = 60.0) -> Any:
        """The next message of this rank: what it sent, or its result. An error there is an error here."""
        if not self.connections[rank].poll(timeout_s):
            raise TimeoutError(f"rank {rank} sent nothing for {timeout_s} s")
        kind, value = self.connections[rank].recv()
        if kind == "error":
            raise AssertionError(f"rank {rank} failed:\n{value}")
        return value

    def results(self, timeout_s: float = 60.0) -> list[Any]:
        """The next message of every rank, in rank order; the first error of any ends the wait."""
        found: dict[int, Any] = {}
        while len(found) < len(self.connections):
            open_ranks = [r for r in range(len(self.connections)) if r not in found]
            if not (ready := wait([self.connections[r] for r in open_ranks], timeout_s)):
                raise TimeoutError(f"ranks {open_ranks} sent nothing for {timeout_s} s")
            for rank in open_ranks:
                if self.connections[rank] in ready:
                    found[rank] = self.receive(rank)
        return [found[rank] for rank in range(len(self.connections))]

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


def run(target: Callable[..., Any], num_ranks: int, *args: Any) -> Sequence[Any]:
    with ProcessWorld(target, num_ranks, *args) as world:
        return world.results()


def _run(target: Callable[..., Any], rank: int, connection: Connection, *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        answer = ("value", target(rank, connection, *args))
    except BaseException:
        answer = ("error", traceback.format_exc())
    # A process that ends closes its sockets under peers that are still reading: end together, when the parent says so.
    with contextlib.suppress(EOFError, OSError):
        connection.send(answer)
        while True:
            connection.recv()
