"""Promise: a client that stops reading costs a bounded buffer for a while, holds up nobody, and is told of its end."""

import asyncio

import grpc
from gateway_world import chat, gateway, rest, say, text_of

from expertmesh.errors import SlowReader
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.proto import expertmesh_pb2_grpc as pb_grpc
from expertmesh.router.gateway.backlog import PIECE_TOKENS
from expertmesh.router.gateway.rpc_errors import from_rpc

SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16), ("grpc.http2.bdp_probe", 0)]  # a client that takes little ahead
LONG = pb.GenerateRequest(
    chat=chat("x"), include_token_ids=True, sampling=pb.SamplingOptions(max_tokens=490, logprobs=1)
)


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (the server has no event for it)
            await asyncio.sleep(0.02)


async def stalled_calls(world, channel, count: int) -> list:
    """Streams of which the first event was read and no more, until each waits for its client."""
    calls = [pb_grpc.GenerationStub(channel).Generate(LONG) for _ in range(count)]
    for call in calls:
        assert (await call.read()).HasField("started")
    await until(lambda: world.server.readers.num_stalled(0.1) == count)
    return calls


async def test_streams_beside_stalled_ones_complete_and_the_stalled_go_on_when_they_are_read():
    async with (
        gateway(say("word " * 500)) as world,
        grpc.aio.insecure_channel(world.server.address, options=SMALL_WINDOW) as channel,
    ):
        calls = await stalled_calls(world, channel, 20)
        assert world.engine.wait_idle(30)  # the engine has given all, which the link holds: a record a stream
        assert world.tier.num_in_flight == 0
        for events in await asyncio.gather(*(world.generate(prompt="a", timeout=60) for _ in range(20))):
            assert text_of(events).startswith("word word")
        for call in calls:
            events = await rest(call)
            assert events[-1].finished.usage.completion_tokens == 490
            assert [e.offset for e in events] == list(range(1, len(events) + 1))
            assert len(events) < 490  # what came while it did not read is few events
            assert all(len(e.answer.token_ids) <= PIECE_TOKENS for e in events)


async def test_a_reader_that_never_comes_back_is_ended_with_an_error_and_everything_is_freed():
    async with (
        gateway(say("word " * 500), stall_s=1.0) as world,
        grpc.aio.insecure_channel(world.server.address, options=SMALL_WINDOW) as channel,
    ):
        world.engine.step_s = 0.001
        calls = await stalled_calls(world, channel, 5)
        await until(lambda: world.server.num_running == 0)
        assert world.server.readers.num_stalled(0.0) == 0
        for call in calls:
            try:
                await rest(call)
            except grpc.aio.AioRpcError as error:
                found = from_rpc(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
                assert isinstance(found, SlowReader)
                assert found.code == "RESOURCE_EXHAUSTED"
            else:
                raise AssertionError("a stalled stream was not ended")


async def test_a_stalled_client_that_hangs_up_frees_everything_at_once():
    async with gateway(say("word " * 500)) as world:
        async with grpc.aio.insecure_channel(world.server.address, options=SMALL_WINDOW) as channel:
            await stalled_calls(world, channel, 5)
        await until(lambda: world.server.num_running == 0)
        assert world.server.readers.num_stalled(0.0) == 0
