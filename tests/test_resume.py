"""Promise: a resumable stream goes on at any gateway at its offset, no event lost, repeated or changed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from gateway_world import MAX_MODEL_LEN, TOKEN, World, chat, gateway, rest, say, text_of, tokenizer

from expertmesh.bench.gateway_processes import GatewayPlan, GatewayProcess
from expertmesh.client import AnswerDelta, AsyncClient
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.proto import expertmesh_pb2_grpc as pb_grpc
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway.generation import GenerationConfig
from expertmesh.router.gateway.journal import Journal, _keys
from expertmesh.router.gateway.server import GatewayServer
from expertmesh.router.gateway.session import SessionStore
from expertmesh.router.gateway.tier import AttentionTier
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER

CALL = '<tool_call>\n{"name": "w", "arguments": {"at": "Köln"}}\n</tool_call>'
REPLY = f"<think>\na thought 你\n</think>\n\nthe answer 👩‍👧 is\n{CALL}<|im_end|>"
NUM_TOKENS = len(tokenizer().encode(REPLY))
TOOLS = [pb.Tool(name="w")]


@pytest.fixture(scope="module")
def redis_url():
    server = EmbeddedRedis()
    yield server.url
    server.stop()


@contextlib.asynccontextmanager
async def journal(url: str, **fields) -> AsyncIterator[Journal]:
    made = Journal(url, **fields)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def another(world: World, **fields) -> AsyncIterator[pb_grpc.GenerationStub]:
    """One more gateway before the same engine."""
    tier = AttentionTier(gateway_id="gateway-1", cluster_token=TOKEN)
    tier.set_replicas({world.link.replica_id: world.link.address})
    await tier.wait_connected(10)
    config = GenerationConfig(model="tiny", max_model_len=MAX_MODEL_LEN, vocab_size=151_936)
    server = GatewayServer(config, tokenizer=tokenizer(), tier=tier, **fields)
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        yield pb_grpc.GenerationStub(channel)
    await server.drain(5)
    assert tier.num_in_flight == 0
    await tier.close()


def ask(request_id: str, **fields) -> pb.GenerateRequest:
    fields = {"chat": chat("hi"), "tools": TOOLS, "sampling": pb.SamplingOptions(seed=5, max_tokens=400), **fields}
    return pb.GenerateRequest(request_id=request_id, resumable=True, **fields)


def resume(request_id: str, offset: int) -> pb.ResumeRequest:
    return pb.ResumeRequest(request_id=request_id, from_offset=offset)


def comparable(events: list[pb.GenerateEvent]) -> list[tuple]:
    """What a stream says: offsets are gapless; deltas that came together or apart are one; usage and reason."""
    assert [e.offset for e in events] == list(range(len(events)))
    found: list[tuple] = []
    for event in events:
        kind = event.WhichOneof("event")
        value = getattr(event, kind)
        if kind == "started":
            found.append((kind, value.seed, value.prompt_tokens))
        elif kind == "finished":
            found.append((kind, value.reason, value.usage.completion_tokens, value.usage.reasoning_tokens))
        else:
            text = value.arguments_text if kind == "tool_call" else value.text
            name = value.name if kind == "tool_call" else ""
            if found[-1][0] == kind and not name:
                _, name, before = found.pop()
                text = before + text
            found.append((kind, name, text))
    return found


async def until(true: Callable[[], bool]) -> None:
    """Wait for what happens in another thread or task."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def gateway_to_kill(world: World, redis_url: str) -> GatewayProcess:
    """In a process of its own, before the same engine."""
    plan = GatewayPlan(
        world.link.address,
        redis_url,
        model=QWEN3_FOLDER,
        model_name="tiny",
        cluster_token=TOKEN,
        max_model_len=MAX_MODEL_LEN,
    )
    child = GatewayProcess(plan)
    await asyncio.to_thread(child.wait_ready)
    return child


async def undisturbed(world: World) -> list[pb.GenerateEvent]:
    world.engine.allow(-1)
    return [e async for e in world.generation.Generate(ask("undisturbed"))]


async def test_after_the_end_any_offset_can_be_read_at_any_gateway(redis_url):
    async with journal(redis_url) as one, journal(redis_url) as two, gateway(say(REPLY), journal=one) as world:
        events = [e async for e in world.generation.Generate(ask("ended"))]
        async with another(world, journal=two) as elsewhere:
            for stub in (world.generation, elsewhere):
                for offset in range(len(events) + 1):
                    assert [e async for e in stub.Resume(resume("ended", offset))] == events[offset:]
                error = await world.refused(stub.Resume(resume("ended", len(events) + 1)))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(world.engine.submitted) == 1


async def test_a_dropped_stream_runs_on_and_is_resumed_where_it_runs(redis_url):
    async with journal(redis_url) as one, gateway(say(REPLY), journal=one) as world:
        expected = await undisturbed(world)
        world.engine.allow(0)
        call = world.generation.Generate(ask("dropped"))
        events = [await call.read()]
        call.cancel()
        world.engine.allow(-1)
        events += [e async for e in world.generation.Resume(resume("dropped", 1))]
        assert comparable(events) == comparable(expected)
        assert [e async for e in world.generation.Resume(resume("dropped", 0))] == events
        assert len(world.engine.submitted) == 2
        assert not world.engine.aborted


async def test_a_live_stream_is_taken_over_by_another_gateway_at_every_offset(redis_url):
    async with journal(redis_url) as one, journal(redis_url) as two, gateway(say(REPLY), journal=one) as world:
        expected = await undisturbed(world)
        async with another(world, journal=two) as elsewhere:
            for cut in range(NUM_TOKENS):
                name, before = f"over-{cut}", len(world.engine.submitted)
                world.engine.allow(0)
                call = world.generation.Generate(ask(name))
                events = [await call.read()]
                world.engine.allow(cut)
                taken = asyncio.ensure_future(rest(elsewhere.Resume(resume(name, 1))))
                await until(lambda before=before: len(world.engine.submitted) == before + 2)
                world.engine.allow(-1)
                events += await taken
                assert comparable(events) == comparable(expected)
                assert [e async for e in world.generation.Resume(resume(name, 0))] == events
                with contextlib.suppress(grpc.aio.AioRpcError):  # fenced off, or it had written its end
                    await rest(call)


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_events_follow_from_tokens_however_many_came_together(redis_url, size):
    """What was not recorded before a gateway died is made again, in other steps: at every offset is the same event."""
    async with journal(redis_url) as one, gateway(say(REPLY), journal=one) as world:
        name = f"together-{size}"
        events = [e async for e in world.generation.Generate(ask(name, include_token_ids=True))]
        key = _keys("", name)[1]
        outputs = [pb.RequestTokens.FromString(data) for data in await one._redis.lrange(key, 0, -1)]
        ids = [i for output in outputs for i in output.token_ids]
        assert len(ids) == NUM_TOKENS
        await one._redis.delete(key)
        for i in range(0, len(ids), size):
            together = pb.RequestTokens(token_ids=ids[i : i + size])
            if i + size >= len(ids):
                together.finish_reason = outputs[-1].finish_reason
            await one._redis.rpush(key, together.SerializeToString())
        assert [e async for e in world.generation.Resume(resume(name, 0))] == events


async def test_every_stream_of_a_killed_gateway_goes_on_elsewhere(redis_url):
    """SIGKILL with 24 streams at all stages; their clients resume at another gateway."""
    async with journal(redis_url) as two, gateway(say(REPLY), journal=two) as world:
        expected = comparable(await undisturbed(world))
        child = await gateway_to_kill(world, redis_url)
        try:
            address = child.address
            async with grpc.aio.insecure_channel(address) as channel:
                stub = pb_grpc.GenerationStub(channel)
                streams: list[tuple[str, list[pb.GenerateEvent]]] = []
                readers = []

                async def read(name: str, events: list[pb.GenerateEvent]) -> None:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        async for event in stub.Generate(ask(name)):
                            events.append(event)

                world.engine.allow(0)
                for i in range(24):
                    streams.append((f"killed-{i}", []))
                    readers.append(asyncio.create_task(read(*streams[-1])))
                    await until(lambda: len(streams[-1][1]) > 0)
                    world.engine.allow(1)
                child.kill()
                await asyncio.gather(*readers)
        finally:
            child.kill()
        world.engine.allow(-1)
        lengths = {len(events) for _, events in streams}
        assert len(lengths) > 5, "the streams were cut at different places"

        async def go_on(name: str, events: list[pb.GenerateEvent]) -> list[tuple]:
            events += [e async for e in world.generation.Resume(resume(name, len(events)))]
            assert [e async for e in world.generation.Resume(resume(name, 0))] == events
            return comparable(events)

        for got in await asyncio.gather(*(go_on(*stream) for stream in streams)):
            assert got == expected


async def test_the_same_request_again_joins_its_stream_and_another_one_is_refused(redis_url):
    async with journal(redis_url) as one, gateway(say(REPLY), journal=one) as world:
        first = [e async for e in world.generation.Generate(ask("again"))]
        assert [e async for e in world.generation.Generate(ask("again"))] == first
        assert len(world.engine.submitted) == 1
        error = await world.refused(world.generation.Generate(ask("again", chat=chat("other"))))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_that_nobody_reads_ends_after_its_grace(redis_url):
    async with journal(redis_url) as one, gateway(say("word " * 100), journal=one) as world:
        world.server._resumables._grace_s = 0.05
        world.engine.allow(1)
        call = world.generation.Generate(ask("left"))
        await call.read()
        call.cancel()
        assert await asyncio.to_thread(world.engine.wait_idle)
        assert len(world.engine.aborted) == 1
        events = [e async for e in world.generation.Resume(resume("left", 0))]
        assert events[-1].finished.reason == pb.FINISH_REASON_CANCELLED


async def test_cancel_ends_a_resumable_stream_for_good(redis_url):
    async with journal(redis_url) as one, gateway(say("word " * 100), journal=one) as world:
        world.engine.allow(2)
        call = world.generation.Generate(ask("cancelled"))
        await call.read()
        await world.generation.Cancel(pb.CancelRequest(request_id="cancelled"))
        events = await rest(call)
        assert events[-1].finished.reason == pb.FINISH_REASON_CANCELLED
        assert [e async for e in world.generation.Resume(resume("cancelled", 1))] == events


async def test_a_session_turn_that_is_resumed_elsewhere_is_committed_once(redis_url):
    store = SessionStore(redis_url)
    async with (
        journal(redis_url) as one,
        journal(redis_url) as two,
        gateway(say(REPLY), journal=one, sessions=store) as world,
        another(world, journal=two, sessions=store) as elsewhere,
    ):
        world.engine.allow(3)
        call = world.generation.Generate(ask("turn", session_id="s"))
        await call.read()
        await call.read()
        taken = asyncio.ensure_future(rest(elsewhere.Resume(resume("turn", 2))))
        await until(lambda: len(world.engine.submitted) == 2)
        world.engine.allow(-1)
        last = (await taken)[-1].finished
        assert (last.committed, last.session_version) == (True, 1)
        (turn,) = (await store.get("s")).turns
        assert turn.output_ids == tokenizer().encode(REPLY)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await rest(call)
        assert (await store.get("s")).version == 1
    await store.close()


async def test_unknown_and_expired_streams_are_not_found(redis_url):
    async with journal(redis_url, ttl_s=0.001) as one, gateway(say("x"), journal=one) as world:
        assert [e async for e in world.generation.Generate(ask("short"))]
        async with asyncio.timeout(10):  # a millisecond after the last write, and when this gateway has forgotten it
            for name in ("nobody", "short"):
                while (error := await refusal(world.generation.Resume(resume(name, 0)))) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
                assert error.code() is grpc.StatusCode.NOT_FOUND


async def refusal(call) -> grpc.aio.AioRpcError | None:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_without_redis_a_resumable_stream_does_not_start_and_a_running_one_goes_on():
    redis = EmbeddedRedis()
    async with journal(redis.url, timeout_s=0.3) as one, gateway(say(REPLY), journal=one) as world:
        world.engine.allow(3)
        call = world.generation.Generate(ask("runs"))
        events = [await call.read(), await call.read()]
        redis.stop()
        world.engine.allow(-1)
        events += await rest(call)
        assert text_of(events) == "the answer 👩‍👧 is"
        assert events[-1].finished.usage.completion_tokens == NUM_TOKENS
        error = await world.refused(world.generation.Generate(ask("late")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert text_of(await world.generate(chat=chat("hi"), tools=TOOLS)) == "the answer 👩‍👧 is"


async def test_the_client_resumes_by_itself_when_its_gateway_is_killed(redis_url):
    async with journal(redis_url) as two, gateway(say(REPLY), journal=two) as world:
        child = await gateway_to_kill(world, redis_url)
        world.engine.allow(4)
        async with AsyncClient([child.address, world.server.address]) as client:
            stream = client.generate("hi", tools=[{"name": "w"}], resumable=True)
            events = [await stream.__anext__(), await stream.__anext__()]
            child.kill()
            world.engine.allow(-1)
            events += [e async for e in stream]
        assert [e.offset for e in events] == list(range(len(events)))
        assert stream.num_resumed >= 1
        assert "".join(e.text for e in events if isinstance(e, AnswerDelta)) == "the answer 👩‍👧 is"
        assert events[-1].completion_tokens == NUM_TOKENS


async def test_a_drain_waits_for_resumable_streams_and_their_readers(redis_url):
    async with journal(redis_url) as one, gateway(say(REPLY), journal=one) as world:
        world.engine.allow(3)
        call = world.generation.Generate(ask("drained"))
        events = [await call.read(), await call.read()]
        drain = asyncio.create_task(world.server.drain(10))
        await until(lambda: world.server._draining)
        world.engine.allow(-1)
        events += await rest(call)
        await drain
        assert events[-1].finished.usage.completion_tokens == NUM_TOKENS


@pytest.mark.parametrize("seen", [True, False])
async def test_a_resume_that_comes_while_its_request_begins_hangs_nobody(redis_url, monkeypatch, seen):
    async with journal(redis_url) as made, gateway(say(REPLY), journal=made) as world:
        begin, name, early = made.begin, f"early-{seen}", []

        async def resumed_meanwhile(*arguments) -> bool:
            if not seen:  # it has looked and not found it, and is told so after the journal was begun
                early.append(world.server._resumables.resume("", name))
                await asyncio.sleep(0)
            begun = await begin(*arguments)
            if seen:
                early.append(world.server._resumables.resume("", name))
            return begun

        monkeypatch.setattr(made, "begin", resumed_meanwhile)
        events = await rest(world.generation.Generate(ask(name), timeout=60))
        assert text_of(events) == "the answer 👩‍👧 is"
        assert [e.offset for e in events] == list(range(len(events)))
        await asyncio.wait([early[0].task], timeout=60)
        assert early[0].recording.ended
