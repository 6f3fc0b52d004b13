"""A gateway with everything real but the engine and Ray: fake engine, link, tier, gRPC server, on loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache

import grpc

from expertmesh.bench.fake_engine import FakeEngine
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.proto import expertmesh_pb2_grpc as pb_grpc
from expertmesh.request import EngineRequest
from expertmesh.router.gateway.generation import GenerationConfig
from expertmesh.router.gateway.link import LinkServer
from expertmesh.router.gateway.server import GatewayServer
from expertmesh.router.gateway.tier import AttentionTier
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer
from expertmesh.router.status import ClusterState, ProcessStatus

TOKEN = "a secret"
MAX_MODEL_LEN = 512


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(QWEN3_FOLDER)


def say(text: str) -> Callable[[EngineRequest], Sequence[int]]:
    """A reply of this text; tags in it become their ids."""
    ids = tokenizer().encode(text)
    return lambda _request: ids


class FixedTopology:
    def __init__(self) -> None:
        self.known = ClusterState(
            epoch=3,
            placement_version=2,
            ranks={"a": -1, "e": 0},
            ages_s={"a": 1.0},
            processes=(
                ProcessStatus(name="a", role="attention", state="ready", pid=11, num_kv_blocks=64),
                ProcessStatus(name="e", role="expert", state="ready", pid=12, num_rows=5),
                ProcessStatus(name="g", role="gateway", state="ready", address="127.0.0.1:50051"),
            ),
        )

    async def state(self) -> ClusterState:
        return self.known


class World:
    def __init__(self, server: GatewayServer, engine: FakeEngine, link: LinkServer, tier: AttentionTier) -> None:
        self.server, self.engine, self.link, self.tier = server, engine, link, tier
        self.channel = grpc.aio.insecure_channel(server.address)
        self.generation = pb_grpc.GenerationStub(self.channel)
        self.sessions = pb_grpc.SessionsStub(self.channel)
        self.cluster = pb_grpc.ClusterStub(self.channel)

    async def generate(self, timeout: float | None = 20.0, **fields) -> list[pb.GenerateEvent]:
        return [e async for e in self.generation.Generate(pb.GenerateRequest(**fields), timeout=timeout)]

    async def refused(self, call) -> grpc.aio.AioRpcError:
        """The error of a call (unary or stream) that must fail."""
        try:
            if hasattr(call, "read"):
                async for _ in call:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the call was answered")


@contextlib.asynccontextmanager
async def gateway(reply: Callable[[EngineRequest], Sequence[int]], **fields) -> AsyncIterator[World]:
    """Ends with balanced books: nothing runs in gateway, link or engine."""
    engine_fields = {k: fields.pop(k) for k in ("max_num_seqs",) if k in fields}
    fields = {"cluster_token": TOKEN, "topology": FixedTopology(), **fields}
    link = LinkServer(replica_id="attention-0", max_model_len=MAX_MODEL_LEN, cluster_token=TOKEN)
    engine = FakeEngine(link.publish, reply, **engine_fields)
    await link.start(engine)
    tier = AttentionTier(gateway_id="gateway-0", cluster_token=TOKEN)
    tier.set_replicas({link.replica_id: link.address})
    await tier.wait_connected(10)
    server = GatewayServer(
        GenerationConfig(model="tiny", max_model_len=MAX_MODEL_LEN, vocab_size=151_936),
        tokenizer=tokenizer(),
        tier=tier,
        **fields,
    )
    await server.start()
    world = World(server, engine, link, tier)
    try:
        yield world
        assert await asyncio.to_thread(engine.wait_idle)
        await server.drain(5)
        assert server.num_running == 0
        assert tier.num_in_flight == 0
        assert link.num_requests == 0
    finally:
        await world.channel.close()
        await server.stop()
        await tier.close()
        await link.stop()
        engine.stop()


def chat(*texts: str, system: str = "") -> pb.Chat:
    """Alternating user and assistant messages, user last."""
    messages = [pb.Message(role="system", content=system)] if system else []
    for i, text in enumerate(texts):
        messages.append(pb.Message(role="assistant" if (len(texts) - i) % 2 == 0 else "user", content=text))
    return pb.Chat(messages=messages)


async def rest(call) -> list[pb.GenerateEvent]:
    """Events up to the end of a call of which some were read one by one."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


def text_of(events: Sequence[pb.GenerateEvent], kind: str = "answer") -> str:
    return "".join(getattr(e, kind).text for e in events if e.WhichOneof("event") == kind)
