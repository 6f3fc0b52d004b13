"""Promise: typed events, typed errors, another gateway where one is away, and work that ends when it is left."""

import asyncio
import socket

import grpc
import pytest
from gateway_world import FixedTopology, gateway, say, tokenizer

from expertmesh.client import (
    AnswerDelta,
    AsyncClient,
    Client,
    Finished,
    ReasoningDelta,
    Started,
    make_request,
)
from expertmesh.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestCancelled,
    SlowReader,
    Unavailable,
)
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.request import FinishReason
from expertmesh.router.client import gateways
from expertmesh.router.gateway.rpc_errors import trailing_metadata
from expertmesh.router.gateway.session import SessionStore

REPLY = "<think>\nwhy\n</think>\n\nbecause 你好<|im_end|>"


@pytest.fixture
def dead_address():
    """A port where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{s.getsockname()[1]}"


async def run(function, *arguments):
    """The blocking client in a thread, while the gateway runs in this loop."""
    return await asyncio.to_thread(function, *arguments)


async def test_events_are_typed_and_in_order():
    def use(address: str):
        with Client(address) as client:
            return list(client.generate("hi", max_tokens=50, temperature=0.0, seed=7))

    async with gateway(say(REPLY)) as world:
        events = await run(use, world.server.address)
        assert [e.offset for e in events] == list(range(len(events)))
        assert isinstance(events[0], Started)
        assert events[0].seed == 7
        assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == "why"
        assert "".join(e.text for e in events if isinstance(e, AnswerDelta)) == "because 你好"
        assert isinstance(events[-1], Finished)
        assert events[-1].reason is FinishReason.STOP
        assert events[-1].completion_tokens == len(tokenizer().encode(REPLY))


async def test_the_async_client_says_the_same():
    async with gateway(say(REPLY)) as world, AsyncClient(world.server.address) as client:
        stream = client.generate("hi")
        assert await stream.answer() == "because 你好"
        assert stream.finished.reasoning_tokens == 5
        assert (await client.topology()).model == "tiny"


async def test_leaving_the_loop_cancels_the_work():
    def use(address: str):
        with Client(address) as client, client.generate("hi") as stream:
            for event in stream:
                if isinstance(event, AnswerDelta):
                    return

    async with gateway(say("word " * 100)) as world:
        world.engine.allow(2)
        await run(use, world.server.address)
        assert await run(world.engine.wait_idle)
        assert len(world.engine.aborted) == 1
        world.engine.allow(1)
        async with AsyncClient(world.server.address) as client, client.generate("hi") as stream:
            async for event in stream:
                if isinstance(event, AnswerDelta):
                    break
        assert await run(world.engine.wait_idle)
        assert len(world.engine.aborted) == 2


async def test_cancel_by_id_from_elsewhere():
    async with gateway(say("word " * 100)) as world, AsyncClient(world.server.address) as client:
        world.engine.allow(1)
        stream = client.generate("hi")
        await stream.__anext__()
        await client.cancel(stream.request_id)
        assert [e async for e in stream][-1].reason is FinishReason.CANCELLED


async def test_cancel_finds_the_gateway_that_has_the_request():
    async with gateway(say("x")) as other, gateway(say("word " * 100)) as world:
        world.engine.allow(1)
        async with AsyncClient(world.server.address) as owner:
            stream = owner.generate("hi")
            await stream.__anext__()
            async with AsyncClient([other.server.address, world.server.address]) as client:
                await client.cancel(stream.request_id)
                assert [e async for e in stream][-1].reason is FinishReason.CANCELLED
                with pytest.raises(NotFound):
                    await client.cancel("nobody")


async def test_a_dead_gateway_is_passed_over(dead_address):
    def use(address: str):
        with Client([dead_address, address]) as client:
            first = client.generate("hi").answer()
            return first, client.topology().model, client.gateways.addresses[client.gateways._favourite]

    async with gateway(say("x")) as world:
        assert await run(use, world.server.address) == ("x", "tiny", world.server.address)
        async with AsyncClient([dead_address, world.server.address]) as client:
            assert await client.generate("hi").answer() == "x"


async def test_many_streams_turn_from_a_dead_gateway_together(dead_address):
    async with gateway(say("x")) as world, AsyncClient([dead_address, world.server.address]) as client:
        answers = await asyncio.gather(*(client.generate("hi").answer() for _ in range(21)))
        assert answers == ["x"] * 21


async def test_a_draining_gateway_is_passed_over():
    async with gateway(say("a")) as leaving, gateway(say("b")) as staying:
        leaving.server._draining = True
        async with AsyncClient([leaving.server.address, staying.server.address]) as client:
            assert await client.generate("hi").answer() == "b"


async def test_no_gateway_at_all_is_unavailable(dead_address):
    async with AsyncClient([dead_address]) as client:
        with pytest.raises(Unavailable):
            await client.generate("hi").answer()


async def test_errors_are_those_of_the_tree():
    async with gateway(say("word " * 100), max_num_seqs=1) as world, AsyncClient(world.server.address) as client:
        with pytest.raises(InvalidRequest, match=r"sampling\.temperature: got 3\.0, expected 0\.\.2") as caught:
            await client.generate("hi", temperature=3.0).answer()
        assert caught.value.field == "sampling.temperature"
        with pytest.raises(NotFound):
            await client.cancel("nobody")
        world.engine.allow(0)
        with pytest.raises(DeadlineExceeded):
            await client.generate("hi", timeout_s=0.2).answer()
        running = client.generate("hi")
        await running.__anext__()
        with pytest.raises(Overloaded) as full:
            await client.generate("hi").answer()
        assert full.value.retry_after_s == pytest.approx(0.5)
        await running.aclose()


async def test_a_session_is_a_conversation():
    def use(address: str):
        with Client(address) as client:
            talk = client.session("trip")
            talk.send("one").answer()
            stream = talk.send("two")
            stream.answer()
            record = talk.record()
            listed = [s.session_id for s in client.list_sessions()]
            talk.delete()
            return stream.finished, record, listed

    redis = EmbeddedRedis()
    store = SessionStore(redis.url)
    try:
        async with gateway(say(REPLY), sessions=store) as world:
            finished, record, listed = await run(use, world.server.address)
            assert (finished.committed, finished.session_version) == (True, 2)
            assert [m.content for t in record.turns for m in t.messages] == [
                "one",
                "because 你好",
                "two",
                "because 你好",
            ]
            assert listed == ["trip"]
    finally:
        await store.close()
        redis.stop()


@pytest.mark.parametrize(
    ("options", "field"),
    [({"heat": 1}, "heat"), ({"thinking": "maybe"}, "thinking"), ({"max_tokens": "many"}, "request")],
)
def test_wrong_options_are_refused_before_anything_is_sent(options, field):
    with pytest.raises(InvalidRequest) as caught:
        make_request("hi", **options)
    assert caught.value.field == field


def test_a_request_is_made_from_plain_values():
    request = make_request(
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "w", "arguments": {"at": "Köln"}}]},
            {"role": "tool", "content": "rain"},
        ],
        thinking="off",
        stop="END",
        tools=[{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}],
    )
    assert request.chat.messages[1].tool_calls[0].arguments_json == '{"at": "Köln"}'
    assert list(request.sampling.stop) == ["END"]
    assert request.tools[0].parameters_json == '{"type": "object"}'
    assert request.thinking.mode == 2
    assert not request.thinking.HasField("budget_tokens")


def test_an_empty_list_of_gateways_is_refused():
    with pytest.raises(InvalidRequest):
        Client([])


async def test_topology_lists_the_gateways_to_dial():
    async with gateway(say("x")) as world, AsyncClient(world.server.address, cluster_token="a secret") as client:
        assert list((await client.topology()).gateways) == list(FixedTopology().known.gateways)


class _Refused(grpc.RpcError):
    def __init__(self, code=grpc.StatusCode.UNAVAILABLE, message="connection refused"):
        self._code, self._message = code, message

    def code(self):
        return self._code

    def details(self):
        return self._message

    def trailing_metadata(self):
        return ()


@pytest.mark.parametrize("answer_s", [0.0, 4.0])
def test_a_resumable_request_is_made_again_where_streams_were_had_before(answer_s: float):
    """Nobody ever answered: the error at once. A cluster that served is expected back, and a call twice made is one."""

    def until_error(served: bool, resumable: bool) -> tuple[int, float]:
        known, now = gateways.Gateways(["a:1", "b:1"], grpc), [0.0]
        known.served = served
        route = gateways.Route(known, pb.GenerateRequest(resumable=resumable), None, clock=lambda: now[0])
        for num_calls in range(1, 1000):
            now[0] += answer_s
            try:
                now[0] += route.failed(_Refused())
            except Unavailable:
                return num_calls, now[0]
        raise AssertionError("it never ends")

    assert until_error(served=False, resumable=True) == (2, 2 * answer_s)
    assert until_error(served=True, resumable=False) == (2, 2 * answer_s)
    num_calls, waited_s = until_error(served=True, resumable=True)
    assert gateways.MAX_FAILING_S < waited_s < gateways.MAX_FAILING_S + 10.0
    assert num_calls < 200, "it asks without a pause"


class _Stalled(_Refused):
    """What a gateway says to a reader that took a break."""

    def code(self):
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def trailing_metadata(self):
        return trailing_metadata(SlowReader("did not read for 30 s"))


@pytest.mark.parametrize("resumable", [True, False])
def test_a_stream_that_was_not_read_for_long_is_resumed_if_it_can_be(resumable):
    known = gateways.Gateways(["a:1"], grpc)
    route = gateways.Route(known, pb.GenerateRequest(resumable=resumable), None)
    route.came(pb.GenerateEvent(started=pb.Started()))
    if resumable:
        assert route.failed(_Stalled()) < 1
    else:
        with pytest.raises(SlowReader):
            route.failed(_Stalled())


def test_a_server_that_ends_under_a_call_is_no_cancel_of_ours():
    cancelled = grpc.StatusCode.CANCELLED
    assert isinstance(gateways.error_of(_Refused(cancelled, "CANCELLED")), Unavailable)
    assert isinstance(gateways.error_of(_Refused(cancelled, "Locally cancelled by application!")), RequestCancelled)
