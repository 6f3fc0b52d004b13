"""Promise: a full tier lets keys in by turns, holds a bounded number, and forgets who left; with room nobody waits."""

import asyncio
import contextlib

import pytest
from test_link import collect, replica, request

from expertmesh.errors import NoReplica, QueueFull
from expertmesh.router.gateway.balancer import BalancerConfig
from expertmesh.router.gateway.tier import AttentionTier
from expertmesh.router.gateway.waiting_room import WaitingRoomConfig

BALANCER = BalancerConfig(max_num_seqs=2, queue_ahead=0)


@contextlib.asynccontextmanager
async def full_tier(weights=None, **limits):
    """Over one replica that runs two requests at once, and runs two now: (tier, engine, what they run)."""
    async with replica("a") as (link, engine):
        waiting = WaitingRoomConfig(**limits)
        tier = AttentionTier(
            gateway_id="gw", cluster_token="a secret", config=BALANCER, waiting=waiting, weights=weights
        )
        tier.set_replicas({"a": link.address})
        try:
            await tier.wait_connected(10)
            engine.allow(0)
            running = [asyncio.create_task(collect(tier.generate(request(f"r{i}", 3)))) for i in (1, 2)]
            assert not tier.waiting_room
            yield tier, engine, running
            engine.allow(-1)
            for ids, _ in await asyncio.gather(*running):
                assert len(ids) == 3
            assert len(tier.waiting_room) == 0
            assert tier.num_in_flight == 0
        finally:
            await tier.close()


def order_of(engine) -> list[int]:
    return [int(r.request_id.partition("@")[0].strip("r")) for r in engine.submitted]


async def test_a_thousand_queued_of_one_key_delay_anothers_first_by_its_turn_alone():
    async with full_tier() as (tier, engine, running):
        greedy = [tier.generate(request(f"r{i}", 3), owner="greedy") for i in range(100, 1100)]
        modest = tier.generate(request("r7", 3), owner="modest")
        assert len(tier.waiting_room) == 1001
        tasks = [asyncio.create_task(collect(s)) for s in (*greedy, modest)]
        engine.allow(-1)
        for ids, _ in await asyncio.gather(*tasks, *running):
            assert len(ids) == 3
        order = order_of(engine)
        # a turn is 512 tokens, a request here 6: the modest one follows the first turn of the greedy key
        assert order.index(7) <= 2 + 512 // 6 + 1
        assert [n for n in order if n >= 100] == list(range(100, 1100))


async def test_weights_share_the_tier():
    async with full_tier(weights={"gold": 3.0}) as (tier, engine, running):
        streams = []
        for i in range(400):
            streams.append(tier.generate(request(f"r{10_000 + i}", 3), owner="gold"))
            streams.append(tier.generate(request(f"r{20_000 + i}", 3), owner="plain"))
        tasks = [asyncio.create_task(collect(s)) for s in streams]
        engine.allow(-1)
        await asyncio.gather(*tasks, *running)
        first = [n for n in order_of(engine)[2:] if n >= 10_000][:340]  # one round: three turns of 85, and one
        gold = sum(n < 20_000 for n in first)
        assert 200 <= gold <= 300


async def test_past_the_bounds_it_is_queue_full_with_a_delay_and_other_keys_still_wait():
    async with full_tier(max_waiting=3, max_waiting_per_key=2) as (tier, _, running):
        kept = [tier.generate(request(f"r{i}", 3), owner="a") for i in (3, 4)]
        with pytest.raises(QueueFull, match="2 requests of this API key wait here") as caught:
            tier.generate(request("r5", 3), owner="a")
        assert caught.value.retry_after_s >= 0.5
        kept.append(tier.generate(request("r6", 3), owner="b"))
        with pytest.raises(QueueFull, match="3 in all"):
            tier.generate(request("r7", 3), owner="c")
        running += [asyncio.create_task(collect(s)) for s in kept]


async def test_who_leaves_while_waiting_leaves_no_trace():
    async with full_tier() as (tier, engine, running):
        waiting = [tier.generate(request(f"r{i}", 3), owner="a") for i in (3, 4, 5)]
        reader = asyncio.create_task(collect(waiting[0]))
        await asyncio.sleep(0)
        waiting[0].abort()
        waiting[1].abort()
        assert await asyncio.wait_for(reader, 60) == ([], 0)
        assert len(tier.waiting_room) == 1
        running.append(asyncio.create_task(collect(waiting[2])))
        engine.allow(-1)
        await asyncio.gather(*running)
        assert order_of(engine) == [1, 2, 5]


async def test_the_wait_for_a_turn_is_told_as_queue_time():
    async with full_tier() as (tier, engine, running):
        stream = tier.generate(request("r3", 3))
        reader = asyncio.create_task(stream.__anext__())
        await asyncio.sleep(0.01)
        engine.allow(-1)
        output = await reader
        assert output.queue_s > 0.01
        running.append(asyncio.create_task(collect(tier.generate(request("r4", 3)))))
        while True:
            try:
                await stream.__anext__()
            except StopAsyncIteration:
                break


async def test_those_who_wait_are_let_in_by_a_replica_that_comes():
    async with replica("b") as (b, _), full_tier() as (tier, _, _):
        waiting = [tier.generate(request(f"r{i}", 3)) for i in (3, 4)]
        addresses = {replica_id: link.address for replica_id, link in tier._links.items()}
        tier.set_replicas({**addresses, "b": b.address})
        for i, stream in enumerate(waiting, 3):
            assert (await asyncio.wait_for(collect(stream), 60))[0] == [1000 * i, 1000 * i + 1, 1000 * i + 2]


async def test_those_who_wait_are_told_when_no_replica_is_left(monkeypatch):
    monkeypatch.setattr("expertmesh.router.gateway.tier.FAILOVER_WAIT_S", 0.05)
    async with replica("a") as (link, engine):
        tier = AttentionTier(gateway_id="gw", cluster_token="a secret", config=BALANCER)
        tier.set_replicas({"a": link.address})
        try:
            await tier.wait_connected(10)
            engine.allow(0)
            streams = [tier.generate(request(f"r{i}", 3)) for i in (1, 2, 3, 4)]
            assert len(tier.waiting_room) == 2
            tier.set_replicas({})
            for stream in streams:
                with pytest.raises(NoReplica):
                    await asyncio.wait_for(collect(stream), 60)
            assert len(tier.waiting_room) == 0
        finally:
            await tier.close()
