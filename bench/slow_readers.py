"""Clients that stop reading: do the others feel it, is memory bounded, is everything freed?

Real gRPC on loopback, each part in a process: two paced fake engines that say a token a step and stream (labelled: no
model), each behind a gateway; `--normal` clients at each gateway whose time between events is measured, in one process
and at the same time, so that what else the machine does hits both alike; and, at one of the two gateways, `--stalled`
clients that read one event and then no more, each of them blocked (its window and the gateway's buffer full) before a
round is measured. Their work goes on in the engine and over the link, and is in the figure; after that the engine gives
them all that they asked for, so what is queued for each is known and does not hang on how fast the machine is.

Memory is told in three parts, each time of a process with one malloc arena that gave its free memory back: a connection
that says nothing; a client whose stream is read, as many of them as of the stalled ones at the same gateway; what a
stalled one holds beyond that: ids that wait for it, ids that were sent (kept for a failover, as any stream's), buffers.

Goal: the normal clients' p99 beside stalled ones within 1.3 of the p99 at the other gateway; at most MAX_READING_KIB
for a client that reads; for a stalled one beyond that ID_BYTES for each token that it asked for and MAX_STALL_KIB; no
more in a later round than in the first; after they hung up no request, task, connection or queue left. Then the limit:
stalled clients that stay are ended by the gateway. The last line is JSON.

    python -P -m expertmesh.bench.slow_readers [--stalled 200] [--normal 50] [--rounds 3] [--seconds 8]"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
from typing import Any

from ..router.gateway.backlog import ID_BYTES
from .gateway import Server
from .slow_reader_processes import (
    FLOOD_STEP_S,
    NUM_IDS,
    STALL_S,
    STEP_S,
    Books,
    Gateway,
    clients_process,
    engine_process,
    gaps_of,
    gateway_process,
)

GOAL = 1.3
MAX_READING_KIB = 48  # connection, call, request and its state
MAX_STALL_KIB = 32  # buffers, the piece that is being written, spare room of the arrays of ids
MAX_GROWTH_MIB = 4  # of a later round over the first


class Bench:
    """Two gateways with an engine each; `faults` collects what must not be."""

    def __init__(self, num_stalled: int, num_normal: int) -> None:
        self.num_stalled, self.num_normal = num_stalled, num_normal
        self.servers: list[Server] = []
        self.faults: list[str] = []
        self.highest_mib = 0.0  # that was seen, what the flood left to the allocator included
        self.engine = self._start(engine_process)
        at = self._start(gateway_process, self.engine.address)
        self.address, self.gateway = at.address, Gateway(at)
        self._control = self._start(gateway_process, self._start(engine_process).address).address
        self.base = self.gateway.books()

    def _start(self, target: Any, *arguments: Any) -> Server:
        self.servers.append(Server(target, *arguments))
        return self.servers[-1]

    def end(self) -> None:
        for server in reversed(self.servers):
            with contextlib.suppress(OSError):
                server.end()

    async def warm_up(self) -> None:
        await self.measure(2.0)
        await self.gateway.wait("idle", lambda b: b.num_running == 0)
        self.base = self.gateway.books(trim=True)

    async def measure(self, seconds: float) -> tuple[list[float], list[float]]:
        """Times between events of the normal clients, at the control and at the gateway with the stalled ones."""
        alone, beside = await asyncio.gather(
            *(gaps_of(address, self.num_normal, seconds) for address in (self._control, self.address))
        )
        return alone, beside

    async def clients(self, kind: str) -> Server:
        clients = self._start(clients_process, self.address, self.num_stalled, kind)
        await asyncio.to_thread(clients.pipe.recv)
        return clients

    async def hang_up(self, clients: Server, after: str) -> Books:
        """They go; everything that they held is free."""
        self.servers.remove(clients)
        clients.end()
        _, ok = await self.gateway.wait(f"freed after {after}", self._freed)
        books = self.gateway.books(trim=True)
        if not ok:
            self.faults.append(f"not freed after {after}: {books}")
        return books

    def _freed(self, books: Books) -> bool:
        return (
            books.num_running == books.num_in_flight == books.queued_kib == 0
            and books.num_tasks <= self.base.num_tasks
            and books.num_connections <= self.base.num_connections
        )

    async def stall(self) -> Server:
        """All stalled clients blocked, as fast as the engine can."""
        self.engine.pipe.send(FLOOD_STEP_S)
        stalled = await self.clients("stalled")
        books, ok = await self.gateway.wait("all clients stalled", lambda b: b.num_stalled >= self.num_stalled)
        self.engine.pipe.send(STEP_S)
        if not ok:
            self.faults.append(f"{books.num_stalled} of {self.num_stalled} clients stalled")
        return stalled

    async def give_all(self) -> Books:
        """Stalled clients' streams have ended at the engine; nobody has read them."""
        self.engine.pipe.send(FLOOD_STEP_S)
        books, ok = await self.gateway.wait("the engine gave all", lambda b: b.num_in_flight == 0)
        self.engine.pipe.send(STEP_S)
        self.highest_mib = max(self.highest_mib, books.rss_mib)
        books = self.gateway.books(trim=True)
        if not ok or books.num_stalled < self.num_stalled:
            self.faults.append(f"not all of {self.num_stalled} clients stalled with all given: {books}")
        return books

    def kib_a_client(self, books: Books, over: Books) -> float:
        return (books.rss_mib - over.rss_mib) * 1024 / self.num_stalled


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


async def run(num_stalled: int, num_normal: int, rounds: int, seconds: float) -> dict[str, Any]:
    bench = Bench(num_stalled, num_normal)
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    held: list[Books] = []
    try:
        await bench.warm_up()
        clients = await bench.clients("idle")
        idle = bench.gateway.books(trim=True)
        await bench.hang_up(clients, "idle clients hung up")
        clients = await bench.clients("reading")
        await asyncio.sleep(seconds)
        reading = bench.gateway.books(trim=True)
        await bench.hang_up(clients, "reading clients hung up")
        print(
            f"a client that is connected {bench.kib_a_client(idle, bench.base):.0f} KiB, one that reads "
            f"{bench.kib_a_client(reading, bench.base):.0f} KiB",
            flush=True,
        )
        for index in range(rounds):
            clients = await bench.stall()
            undisturbed, disturbed = await bench.measure(seconds)
            alone.append(undisturbed)
            beside.append(disturbed)
            held.append(await bench.give_all())
            after = await bench.hang_up(clients, "the stalled clients hung up")
            print(
                f"round {index + 1}: p99 alone {p99(undisturbed) * 1e3:.1f} ms, beside {num_stalled} stalled clients "
                f"{p99(disturbed) * 1e3:.1f} ms; gateway {bench.base.rss_mib:.0f} MiB at first, "
                f"{held[-1].rss_mib:.0f} with them ({held[-1].queued_kib / 1024:.1f} queued), "
                f"{after.rss_mib:.0f} after",
                flush=True,
            )
        clients = await bench.stall()  # and stay: the gateway ends them
        if not (await bench.gateway.wait("ended by the limit", lambda b: b.num_running == 0, STALL_S * 2 + 60))[1]:
            bench.faults.append("stalled clients were not ended by the limit")
        last = await bench.hang_up(clients, "the limit and the clients' end")
    finally:
        bench.end()
    highest = max(held, key=lambda b: b.rss_mib)
    memory = {
        "kib_a_connection": bench.kib_a_client(idle, bench.base),
        "kib_a_reading_client": bench.kib_a_client(reading, bench.base),
        "kib_a_stalled_client_over_a_reading_one": bench.kib_a_client(highest, reading),
        "kib_queued_a_stalled_client": max(b.queued_kib for b in held) / num_stalled,
    }
    faults = [*bench.faults, *judge_memory(memory, [b.rss_mib for b in held])]
    ratio = p99([g for r in beside for g in r]) / p99([g for r in alone for g in r])
    if ratio > GOAL:
        faults.append(f"p99 ratio {ratio:.2f} above {GOAL}")
    return {
        "bench": "slow_readers",
        "engine": f"fake, a token every {STEP_S * 1e3:g} ms a stream, no model",
        "stalled": num_stalled,
        "normal": num_normal,
        "rounds": rounds,
        "tokens_a_stalled_client": NUM_IDS,
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "p50_alone_ms": round(statistics.median(g for r in alone for g in r) * 1e3, 2),
        "p50_beside_ms": round(statistics.median(g for r in beside for g in r) * 1e3, 2),
        "p99_alone_ms": round(p99([g for r in alone for g in r]) * 1e3, 2),
        "p99_beside_ms": round(p99([g for r in beside for g in r]) * 1e3, 2),
        "p99_ratio": round(ratio, 3),
        "p99_ratio_by_round": [round(p99(b) / p99(a), 3) for a, b in zip(alone, beside)],
        "goal": GOAL,
        "rss_mib_at_first": round(bench.base.rss_mib, 1),
        "rss_mib_with_stalled": [round(b.rss_mib, 1) for b in held],
        "rss_mib_with_stalled_and_free_memory": round(bench.highest_mib, 1),
        "rss_mib_at_the_end": round(last.rss_mib, 1),
        **{name: round(kib, 1) for name, kib in memory.items()},
        "max_kib_reading": MAX_READING_KIB,
        "max_kib_over_a_reading_one": round(NUM_IDS * ID_BYTES / 1024 + MAX_STALL_KIB, 1),
        "faults": faults,
        "met": not faults,
    }


def judge_memory(memory: dict[str, float], held_mib: list[float]) -> list[str]:
    """What of it is above its bound. Keys as in the figures."""
    reading, beyond = memory["kib_a_reading_client"], memory["kib_a_stalled_client_over_a_reading_one"]
    most = NUM_IDS * ID_BYTES / 1024 + MAX_STALL_KIB
    growth = max(held_mib) - held_mib[0]
    faults = []
    if reading > MAX_READING_KIB:
        faults.append(f"{reading:.0f} KiB a client that reads, more than {MAX_READING_KIB}")
    if beyond > most:
        faults.append(f"{beyond:.0f} KiB a stalled client over one that reads, more than {most:.0f}")
    if growth > MAX_GROWTH_MIB:
        faults.append(f"{growth:.0f} MiB more in a later round than in the first")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stalled", type=int, default=200)
    parser.add_argument("--normal", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    figures = asyncio.run(run(arguments.stalled, arguments.normal, arguments.rounds, arguments.seconds))
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
