"""The processes of `slow_readers.py`: a paced fake engine behind its link, a gateway that tells its books, clients that
connect, read, or stop reading."""

import asyncio
import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import psutil

from ..proto import expertmesh_pb2 as pb
from ..router.gateway.backlog import Backlog
from ..router.gateway.generation import GenerationConfig
from ..router.gateway.link import LinkServer
from ..router.gateway.server import GatewayServer
from ..router.gateway.tier import AttentionTier
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer
from ..router.heap import freeze_heap
from . import malloc
from .fake_engine import FakeEngine
from .gateway import METHOD, TEXT, TOKEN, Server, until_ended

STALL_S = 90.0  # the gateway's limit in this bench
STEP_S = 0.04  # a token a stream: 25 a second
FLOOD_STEP_S = 0.001  # while stalled clients are filled up
NUM_IDS = 20_000  # of a stalled client's stream: more than its window, its socket and the gateway's buffer take
WINDOW = [("grpc.http2.lookahead_bytes", 16 << 10), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Books:
    num_running: int
    num_in_flight: int  # at the engine
    num_stalled: int  # writes that have waited for more than half a second
    num_tasks: int
    num_connections: int
    queued_kib: float  # for all streams together
    rss_mib: float


async def engine_process(pipe: Connection) -> None:
    ids = Tokenizer(QWEN3_FOLDER).encode(TEXT)
    reply = ids * (NUM_IDS // len(ids) + 1)
    link = LinkServer(replica_id="fake", max_model_len=1 << 20, cluster_token=TOKEN)
    engine = FakeEngine(link.publish, lambda _request: reply, step_s=STEP_S)

    def set_step(step_s: float) -> None:
        engine.step_s = step_s

    gc.disable()  # a flood's outputs, collected while others are paced, would be felt by them; no real engine floods
    pipe.send(await link.start(engine))
    await until_ended(pipe, set_step)
    engine.stop()
    await link.stop()


async def gateway_process(pipe: Connection, link_address: str) -> None:
    malloc.use_one_arena()
    tier = AttentionTier(gateway_id="bench", cluster_token=TOKEN)
    tier.set_replicas({"fake": link_address})
    await tier.wait_connected(20)
    config = GenerationConfig(model="fake", max_model_len=1 << 20, vocab_size=151_936)
    server = GatewayServer(config, tokenizer=Tokenizer(QWEN3_FOLDER), tier=tier, stall_s=STALL_S)
    process = psutil.Process()

    def tell(trim: float) -> None:
        if trim:
            malloc.give_back()  # else the next clients would live in what the last ones left
        connections = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
        books = Books(
            num_running=server.num_running,
            num_in_flight=tier.num_in_flight,
            num_stalled=server.readers.num_stalled(0.5),
            num_tasks=len(asyncio.all_tasks()),
            num_connections=len(connections),
            queued_kib=sum(o.num_bytes for o in gc.get_objects() if type(o) is Backlog) / 1024,
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


async def clients_process(pipe: Connection, address: str, count: int, kind: str) -> None:
    """A connection each: "idle" ones say nothing, "reading" ones read a stream, "stalled" ones its first event alone.
    It tells when all have come so far; its end hangs up on them all as the end of any client does."""
    pipe.send("")
    channels = [grpc.aio.insecure_channel(address, options=WINDOW) for _ in range(count)]
    readers = []
    if kind == "idle":
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
    else:
        calls = [channel.unary_stream(METHOD)(_request(NUM_IDS)) for channel in channels]
        await asyncio.gather(*(call.read() for call in calls))
        if kind == "reading":
            readers = [asyncio.create_task(_read_on(call)) for call in calls]
    pipe.send(count)
    await until_ended(pipe)
    assert not any(reader.done() for reader in readers)
    os._exit(0)


async def _read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


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

    def books(self, *, trim: bool = False) -> Books:
        """`trim`: after it gave its free memory back."""
        self._server.pipe.send(float(trim))
        return Books(**self._server.pipe.recv())

    async def wait(self, what: str, condition: Callable[[Books], bool], timeout_s: float = 120.0) -> tuple[Books, bool]:
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
