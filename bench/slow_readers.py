"""Clients that stop reading: do the others feel it, is memory bounded, is everything freed?

Real gRPC on loopback, each part in a process: two paced fake engines that say a token a step and stream (labelled: no
model), each behind a gateway; `--normal` clients at each gateway whose time between events is measured, in one process
and at the same time, so that what else the machine does hits both alike; and, at one of the two gateways, `--stalled`
clients that read one event and then no more, each of them blocked (its window and the gateway's buffer full) before a
round is measured. Their work goes on in the engine and over the link until the gateway's limit, and is in the figure.

Goal: the normal clients' p99 beside stalled ones within 1.3 of the p99 at the other gateway; at most MAX_KIB_A_CLIENT
of the gateway's memory for each stalled client, and no more in a later round than in the first; after they hung up no
request, task, or connection left. Then the limit: stalled clients that stay are ended by the gateway. The last line
is JSON.

    python -P -m expertmesh.bench.slow_readers [--stalled 200] [--normal 50] [--rounds 3] [--seconds 8]"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import psutil

from ..proto import expertmesh_pb2 as pb
from ..router.gateway.generation import GenerationConfig
from ..router.gateway.link import LinkServer
from ..router.gateway.server import GatewayServer
from ..router.gateway.tier import AttentionTier
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer
from ..router.heap import freeze_heap
from .fake_engine import FakeEngine
from .gateway import METHOD, TEXT, TOKEN, Server, until_ended

GOAL = 1.3
MAX_KIB_A_CLIENT = 256
MAX_GROWTH_MIB = 16  # of the second round's peak over the first's
STALL_S = 90.0  # the gateway's limit in this bench
STEP_S = 0.04  # a token a stream: 25 a second
NUM_IDS = 20_000  # of a stalled client's stream: more than it will be sent
WINDOW = [("grpc.http2.lookahead_bytes", 16 << 10), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Books:
    num_running: int
    num_in_flight: int
    num_stalled: int  # writes that have waited for more than half a second
    num_tasks: int
    num_connections: int
    rss_mib: float


async def engine_process(pipe: Connection) -> None:
    ids = Tokenizer(QWEN3_FOLDER).encode(TEXT)
    reply = ids * (NUM_IDS // len(ids) + 1)
    link = LinkServer(replica_id="fake", max_model_len=1 << 20, cluster_token=TOKEN)
    engine = FakeEngine(link.publish, lambda _request: reply, step_s=STEP_S)

    def set_step(step_s: float) -> None:
        engine.step_s = step_s

    pipe.send(await link.start(engine))
    await until_ended(pipe, set_step)
    engine.stop()
    await link.stop()


async def gateway_process(pipe: Connection, link_address: str) -> None:
    tier = AttentionTier(gateway_id="bench", cluster_token=TOKEN)
    tier.set_replicas({"fake": link_address})
    await tier.wait_connected(20)
    config = GenerationConfig(model="fake", max_model_len=1 << 20, vocab_size=151_936)
    server = GatewayServer(config, tokenizer=Tokenizer(QWEN3_FOLDER), tier=tier, stall_s=STALL_S)
    process = psutil.Process()

    def tell(_: float) -> None:
        connections = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
        books = Books(
            num_running=server.num_running,
            num_in_flight=tier.num_in_flight,
            num_stalled=server.readers.num_stalled(0.5),
            num_tasks=len(asyncio.all_tasks()),
            num_connections=len(connections),
            rss_mib=process.memory_info().rss / 2**20,
        )
        pipe.send(asdict(books))

    address = await server.start()
    freeze_heap()  # as `deployment.py` does
    pipe.send(address)
    await until_ended(pipe, tell)
    await server.stop()
    await tier.close()


def _request(num_tokens: int) -> bytes:
    options = pb.SamplingOptions(max_tokens=num_tokens, temperature=0)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=options).SerializeToString()


async def stalled_process(pipe: Connection, address: str, count: int) -> None:
    """A connection and a stream each, of which the first event is read. It tells when all have begun; its end hangs up
    on them all as the end of any client does."""
    pipe.send("")
    channels = [grpc.aio.insecure_channel(address, options=WINDOW) for _ in range(count)]
    calls = [channel.unary_stream(METHOD)(_request(NUM_IDS)) for channel in channels]
    await asyncio.gather(*(call.read() for call in calls))
    pipe.send(count)
    await until_ended(pipe)
    os._exit(0)


async def gaps_of(address: str, count: int, seconds: float) -> list[float]:
    """Seconds between the events of `count` streams over one connection, all of them read."""
    gaps: list[float] = []

    async def read(channel: grpc.aio.Channel) -> None:
        last = 0.0
        async for _ in channel.unary_stream(METHOD)(_request(int(seconds / STEP_S))):
            now = time.perf_counter()
            if last:
                gaps.append(now - last)
            last = now

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(read(channel) for _ in range(count)))
    return gaps


class Gateway:
    """The gateway's books over its pipe."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def books(self) -> Books:
        self._server.pipe.send(1.0)
        return Books(**self._server.pipe.recv())

    async def wait(self, what: str, condition: Any, timeout_s: float = 120.0) -> tuple[Books, bool]:
        """Its books once the condition holds, or at the end of the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            books = self.books()
            if condition(books):
                return books, True
            if time.monotonic() > deadline:
                print(f"not reached in {timeout_s:g} s: {what}: {books}", flush=True)
                return books, False
            await asyncio.sleep(0.2)


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


async def run(num_stalled: int, num_normal: int, rounds: int, seconds: float) -> dict[str, Any]:
    servers: list[Server] = []
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    peaks: list[float] = []
    faults: list[str] = []
    try:
        engine = Server(engine_process)
        servers.append(engine)
        servers.append(Server(gateway_process, engine.address))
        address, gateway = servers[1].address, Gateway(servers[1])
        servers.append(Server(engine_process))
        servers.append(Server(gateway_process, servers[2].address))
        control = servers[3].address

        async def measure(length_s: float) -> tuple[list[float], list[float]]:
            found = await asyncio.gather(*(gaps_of(a, num_normal, length_s) for a in (control, address)))
            return found[0], found[1]

        await measure(2.0)  # warm-up
        base, _ = await gateway.wait("idle", lambda b: b.num_running == 0)

        async def stall() -> Server:
            """All stalled clients blocked, as fast as the engine can."""
            engine.pipe.send(0.0)
            stalled = Server(stalled_process, address, num_stalled)
            servers.append(stalled)
            await asyncio.to_thread(stalled.pipe.recv)
            books, ok = await gateway.wait("all clients stalled", lambda b: b.num_stalled >= num_stalled)
            engine.pipe.send(STEP_S)
            if not ok:
                faults.append(f"{books.num_stalled} of {num_stalled} clients stalled")
            return stalled

        def hang_up(stalled: Server) -> None:
            servers.remove(stalled)
            stalled.end()

        async def expect_freed(after: str) -> None:
            ok = (await gateway.wait(f"freed after {after}", lambda b: freed(b, base)))[1]
            if not ok:
                faults.append(f"not freed after {after}: {gateway.books()}")

        def freed(books: Books, base: Books) -> bool:
            return (
                books.num_running == books.num_in_flight == 0
                and books.num_tasks <= base.num_tasks
                and books.num_connections <= base.num_connections
            )

        for index in range(rounds):
            stalled = await stall()
            undisturbed, disturbed = await measure(seconds)
            alone.append(undisturbed)
            beside.append(disturbed)
            books = gateway.books()
            peaks.append(books.rss_mib)
            if books.num_stalled < num_stalled:
                faults.append(f"only {books.num_stalled} clients were still stalled")
            hang_up(stalled)
            await expect_freed("the stalled clients hung up")
            print(
                f"round {index + 1}: p99 alone {p99(alone[-1]) * 1e3:.1f} ms, beside {num_stalled} stalled clients "
                f"{p99(beside[-1]) * 1e3:.1f} ms; gateway {base.rss_mib:.0f} MiB at first, {peaks[-1]:.0f} with them, "
                f"{gateway.books().rss_mib:.0f} MiB after",
                flush=True,
            )
        stalled = await stall()  # and stay: the gateway ends them
        ended = (await gateway.wait("ended by the limit", lambda b: b.num_running == 0, STALL_S * 2 + 60))[1]
        if not ended:
            faults.append("stalled clients were not ended by the limit")
        hang_up(stalled)
        await expect_freed("the limit and the clients' end")
        last = gateway.books()
    finally:
        for server in reversed(servers):
            with contextlib.suppress(OSError):
                server.end()
    ratio = p99([g for r in beside for g in r]) / p99([g for r in alone for g in r])
    kib = (max(peaks) - base.rss_mib) * 1024 / num_stalled
    growth = max(peaks[1:], default=peaks[0]) - peaks[0]
    if ratio > GOAL:
        faults.append(f"p99 ratio {ratio:.2f} above {GOAL}")
    if kib > MAX_KIB_A_CLIENT:
        faults.append(f"{kib:.0f} KiB a stalled client, more than {MAX_KIB_A_CLIENT}")
    if growth > MAX_GROWTH_MIB:
        faults.append(f"{growth:.0f} MiB more in a later round than in the first")
    return {
        "bench": "slow_readers",
        "engine": f"fake, a token every {STEP_S * 1e3:g} ms a stream, no model",
        "stalled": num_stalled,
        "normal": num_normal,
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "p50_alone_ms": round(statistics.median(g for r in alone for g in r) * 1e3, 2),
        "p50_beside_ms": round(statistics.median(g for r in beside for g in r) * 1e3, 2),
        "p99_alone_ms": round(p99([g for r in alone for g in r]) * 1e3, 2),
        "p99_beside_ms": round(p99([g for r in beside for g in r]) * 1e3, 2),
        "p99_ratio": round(ratio, 3),
        "p99_ratio_by_round": [round(p99(b) / p99(a), 3) for a, b in zip(alone, beside)],
        "goal": GOAL,
        "rss_mib_at_first": round(base.rss_mib, 1),
        "rss_mib_with_stalled": [round(p, 1) for p in peaks],
        "rss_mib_at_the_end": round(last.rss_mib, 1),
        "kib_a_stalled_client": round(kib, 1),
        "faults": faults,
        "met": not faults,
    }


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
