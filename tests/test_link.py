"""Promise: tokens of many requests cross one stream, a message a step; none is lost or doubled, and ends are clean."""

import asyncio
import contextlib

import grpc
import pytest

from expertmesh.bench.fake_engine import FakeEngine
from expertmesh.errors import NoReplica, Overloaded, ReplicaLost, SlowReader, Unavailable
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.proto import expertmesh_pb2_grpc as pb_grpc
from expertmesh.request import EngineRequest, FinishReason, SamplingParams, ThinkingBudget
from expertmesh.router.gateway.link import TOKEN_KEY, LinkClient, LinkServer
from expertmesh.router.gateway.link_messages import decode_submit, encode_submit
from expertmesh.router.gateway.tier import AttentionTier

TOKEN = "a secret"


def request(name: str = "r", num_tokens: int = 10, **fields) -> EngineRequest:
    sampling = SamplingParams(max_tokens=num_tokens, num_logprobs=fields.pop("num_logprobs", -1))
    return EngineRequest(request_id=name, prompt_ids=(1, 2, 3), sampling=sampling, **fields)


def count_up(r: EngineRequest) -> list[int]:
    start = int(r.request_id.partition("@")[0].strip("r") or 0) * 1000
    return list(range(start, start + 500))


@contextlib.asynccontextmanager
async def replica(name: str = "replica", **engine_fields):
    """A link server with a fake engine behind it; the books must be balanced when it ends."""
    link = LinkServer(replica_id=name, max_model_len=512, cluster_token=TOKEN)
    engine = FakeEngine(link.publish, count_up, **engine_fields)
    await link.start(engine)
    try:
        yield link, engine
    finally:
        await link.stop()
        assert await asyncio.to_thread(engine.wait_idle)
        engine.stop()
        assert link.num_requests == 0


@contextlib.asynccontextmanager
async def linked(link: LinkServer, gateway_id: str = "gw"):
    client = LinkClient(link.replica_id, link.address, gateway_id=gateway_id, cluster_token=TOKEN)
    try:
        async with asyncio.timeout(10):
            await client.connected.wait()
        yield client
        assert client.num_in_flight == 0
    finally:
        await client.close()


async def collect(stream) -> tuple[list[int], FinishReason]:
    ids, reason = [], FinishReason.NONE
    async for output in stream:
        ids += output.token_ids
        reason = output.finish_reason
    return ids, reason


async def test_many_requests_share_one_stream_and_keep_their_order():
    async with replica() as (link, _), linked(link) as client:
        streams = [client.generate(request(f"r{i}", 20 + i)) for i in range(40)]
        for i, (ids, reason) in enumerate(await asyncio.gather(*map(collect, streams))):
            assert ids == list(range(i * 1000, i * 1000 + 20 + i))
            assert reason is FinishReason.LENGTH
        assert client.max_model_len == 512


async def test_first_output_carries_cache_and_queue_and_logprobs_travel():
    async with replica() as (link, _), linked(link) as client:
        outputs = [o async for o in client.generate(request(num_tokens=3, num_logprobs=1))]
        assert outputs[0].num_cached_tokens == 1
        assert outputs[0].queue_s == pytest.approx(0.001)
        assert [x.token_id for o in outputs for x in o.logprobs] == [0, 1, 2]


async def test_closing_a_stream_aborts_it_in_the_engine():
    async with replica() as (link, engine), linked(link) as client:
        engine.allow(2)
        stream = client.generate(request(num_tokens=100))
        assert (await stream.__anext__()).token_ids
        await stream.aclose()
        assert await asyncio.to_thread(engine.wait_idle)
        assert [name.partition("@")[0] for name in engine.aborted] == ["r"]
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()


async def test_a_slow_reader_gets_larger_outputs_not_a_longer_queue():
    async with replica() as (link, _), linked(link) as client:
        stream = client.generate(request(num_tokens=200))
        await collect(client.generate(request("r2", 300)))  # ends later, so all of the first is here
        outputs = [o async for o in stream]
        assert len(outputs) == 1
        assert outputs[0].token_ids == list(range(200))


async def test_a_rejection_is_the_typed_error_with_its_retry_delay():
    async with replica(max_num_seqs=1) as (link, engine), linked(link) as client:
        engine.allow(0)
        first = client.generate(request("r1"))
        with pytest.raises(Overloaded) as caught:
            await collect(client.generate(request("r2")))
        assert caught.value.retry_after_s == pytest.approx(0.5)
        engine.allow(-1)
        await collect(first)


async def test_two_gateways_may_use_the_same_request_id():
    async with replica() as (link, _), linked(link, "a") as a, linked(link, "b") as b:
        results = await asyncio.gather(collect(a.generate(request("r7"))), collect(b.generate(request("r7"))))
        assert results[0] == results[1] == (list(range(7000, 7010)), FinishReason.LENGTH)


@pytest.mark.parametrize("token", ["", "wrong", "a secret "])
async def test_a_wrong_token_is_refused(token):
    async with replica() as (link, _), grpc.aio.insecure_channel(link.address) as channel:
        metadata = ((TOKEN_KEY, token),) if token else ()
        call = pb_grpc.LinkStub(channel).Open(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_another_protocol_version_is_refused():
    async with replica() as (link, _), grpc.aio.insecure_channel(link.address) as channel:
        call = pb_grpc.LinkStub(channel).Open(metadata=((TOKEN_KEY, TOKEN),))
        await call.write(pb.GatewayMessage(hello=pb.GatewayHello(gateway_id="x", protocol_version=99)))
        with pytest.raises(grpc.aio.AioRpcError, match="version 1"):
            await call.read()


async def test_a_gateway_that_goes_away_leaves_no_work_behind():
    async with replica() as (link, engine):
        async with linked(link) as client:
            engine.allow(1)
            stream = client.generate(request(num_tokens=100))
            await stream.__anext__()
            await client.close()
            with pytest.raises(ReplicaLost):
                await stream.__anext__()
        assert await asyncio.to_thread(engine.wait_idle)


async def test_a_lost_replica_is_dialled_again():
    async with replica() as (first, engine), linked(first) as client:
        engine.allow(0)
        stream = client.generate(request())
        port = int(first.address.rpartition(":")[2])
        await first.stop()
        with pytest.raises(ReplicaLost):
            await stream.__anext__()
        with pytest.raises(ReplicaLost):
            client.generate(request())
        again = LinkServer(replica_id="replica", max_model_len=512, cluster_token=TOKEN, port=port)
        engine = FakeEngine(again.publish, count_up)
        await again.start(engine)
        async with asyncio.timeout(10):
            await client.connected.wait()
        assert (await collect(client.generate(request())))[0] == list(range(10))
        await again.stop()
        engine.stop()


def test_a_submit_survives_the_wire_unchanged():
    whole = EngineRequest(
        request_id="r",
        prompt_ids=(1, 2),
        output_ids=(3,),
        sampling=SamplingParams(
            temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, seed=2**64 - 1, max_tokens=9, min_tokens=1,
            presence_penalty=-1.5, frequency_penalty=0.5, repetition_penalty=1.25, stop_token_ids=frozenset({4, 5}),
            num_logprobs=3,
        ),
        thinking=ThinkingBudget(budget_tokens=5, think_id=1, end_think_id=2, closing_ids=(3, 4), starts_inside=True),
        deadline=12.5,
        prefix_salt=b"salt",
        traceparent="00-ab-cd-01",
    )  # fmt: skip
    message = pb.Submit.FromString(encode_submit(1, whole).SerializeToString())
    assert decode_submit(message, "r") == whole


# ---------------------------------------------------------------- the tier


@contextlib.asynccontextmanager
async def tier_over(*links: LinkServer, **fields):
    tier = AttentionTier(gateway_id="gw", cluster_token=TOKEN, **fields)
    tier.set_replicas({link.replica_id: link.address for link in links})
    try:
        await tier.wait_connected(10, count=len(links))
        yield tier
        assert tier.num_in_flight == 0
    finally:
        await tier.close()


async def test_a_stream_survives_its_replica_without_a_lost_or_doubled_token():
    async with replica("a") as (a, engine_a), replica("b") as (b, engine_b), tier_over(a, b) as tier:
        engine_a.allow(5)
        engine_b.allow(5)
        stream = tier.generate(request("r1", 50))
        ids: list[int] = []
        while len(ids) < 5:
            ids += (await stream.__anext__()).token_ids
        dying, other, engine = (a, b, engine_b) if stream.replica_id == "a" else (b, a, engine_a)
        await dying.stop()
        engine.allow(-1)
        ids += (await collect(stream))[0]
        assert ids == list(range(1000, 1050))
        assert stream.replica_id == other.replica_id
        assert len(engine.submitted[0].output_ids) == 5


async def test_a_full_replica_is_passed_over_before_anything_was_said():
    async with replica("a", max_num_seqs=0) as (a, _), replica("b") as (b, _), tier_over(a, b) as tier:
        results = await asyncio.gather(*(collect(tier.generate(request(f"r{i}"))) for i in range(4)))
        assert [ids[0] for ids, _ in results] == [0, 1000, 2000, 3000]


async def test_a_reader_that_leaves_more_than_the_bound_unread_is_ended_and_no_replica_is_asked_again():
    async with (
        replica("a") as (a, engine_a),
        replica("b") as (b, engine_b),
        tier_over(a, b, max_backlog_bytes=400) as tier,
    ):
        engine_a.allow(1)
        engine_b.allow(1)
        stream = tier.generate(request(num_tokens=200))
        assert (await stream.__anext__()).token_ids == [0]
        engine = engine_a if stream.replica_id == "a" else engine_b
        engine.allow(100)
        async with asyncio.timeout(10):
            while engine.num_credits:  # noqa: ASYNC110  (the engine has no event for it)
                await asyncio.sleep(0.01)
        assert tier.num_in_flight == 1  # 400 bytes wait
        engine.allow(1)
        assert await asyncio.to_thread(engine.wait_idle)
        assert tier.num_in_flight == 0
        with pytest.raises(SlowReader, match="left 101 tokens"):
            await stream.__anext__()
        await stream.aclose()
        assert len(engine_a.submitted) + len(engine_b.submitted) == 1


async def test_a_stream_without_any_replica_waits_and_can_be_closed():
    async with replica("a") as (a, engine):
        tier = AttentionTier(gateway_id="gw", cluster_token=TOKEN)
        tier.set_replicas({"a": a.address})
        await tier.wait_connected(10)
        engine.allow(1)
        stream = tier.generate(request("r1", 50))
        await stream.__anext__()
        await a.stop()
        waiting = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        stream.abort()
        assert await asyncio.wait_for(waiting, 10) == ([], FinishReason.NONE)
        await tier.close()


async def test_a_replica_that_refuses_for_now_is_passed_over():
    async with replica("a") as (a, engine_a), replica("b") as (b, engine_b), tier_over(a, b) as tier:
        engine_a.refuse = Unavailable("this replica is draining")
        assert (await collect(tier.generate(request("r1"))))[0] == list(range(1000, 1010))
        engine_b.refuse = Unavailable("this one too")
        with pytest.raises(Unavailable, match=r"replica|too"):
            await collect(tier.generate(request("r2")))


async def test_all_full_is_queue_full():
    async with replica("a", max_num_seqs=0) as (a, _), tier_over(a) as tier:
        with pytest.raises(Overloaded):
            await collect(tier.generate(request()))


async def test_no_replica_is_said_at_once():
    tier = AttentionTier(gateway_id="gw", cluster_token=TOKEN)
    with pytest.raises(NoReplica):
        tier.generate(request())
    with pytest.raises(NoReplica):
        await tier.wait_connected(0.01)
    await tier.close()


async def test_a_draining_replica_finishes_but_gets_nothing_new():
    async with replica("a") as (a, engine), tier_over(a) as tier:
        engine.allow(1)
        stream = tier.generate(request("r1", 30))
        await stream.__anext__()
        a.drain()
        engine.allow(1)
        await stream.__anext__()  # the step's message carries the load
        with pytest.raises(NoReplica):
            tier.generate(request("r2"))
        engine.allow(-1)
        assert (await collect(stream))[1] is FinishReason.LENGTH
