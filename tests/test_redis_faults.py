"""Promise: whatever happens to Redis, a committed turn is neither lost nor doubled, and who needs no Redis notices
nothing. A cut of `make redis-faults`: a real server that keeps its data, stopped or killed under a gateway."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import redis
from gateway_world import gateway, say

from expertmesh.bench import valkey
from expertmesh.client import AnswerDelta, AsyncClient, AsyncStream, Event
from expertmesh.errors import SessionConflict, SessionStoreUnavailable
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.session import SessionStore

REPLY = "<think>\na thought\n</think>\n\nthe answer<|im_end|>"


async def read(stream: AsyncStream) -> list[Event]:
    return [event async for event in stream]


async def until_whole(journal: Journal, request_id: str) -> None:
    """Until its end is in the journal."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(redis.RedisError):
                if await journal._redis.hget(f"expertmesh:journal:{{/{request_id}}}:meta", "end"):
                    return
            await asyncio.sleep(0.02)


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, AnswerDelta))


@pytest.mark.parametrize("fault", ["stopped", "killed"])
async def test_turns_around_a_fault_of_redis_are_all_in_the_record_once(tmp_path: Path, fault: str):
    with valkey.persistent(tmp_path, "--appendfsync", "always") as server:
        store, journal = SessionStore(server.url, timeout_s=0.8), Journal(server.url, timeout_s=0.8)
        async with (
            gateway(say(REPLY), sessions=store, journal=journal) as world,
            AsyncClient(world.server.address) as client,
        ):
            talks = [client.session(f"s{i}") for i in range(4)]
            for talk in talks:
                await talk.send("one", request_id=f"{talk.session_id}-1").answer()
            world.engine.allow(3)
            running = [t.send("two", request_id=f"{t.session_id}-2", resumable=t is talks[0]) for t in talks]
            begun = [await anext(stream) for stream in running]
            if fault == "stopped":
                server.pause()
            else:
                server.kill()
            world.engine.allow(-1)
            rest = await asyncio.gather(*(read(stream) for stream in running))
            assert [text(events) for events in rest] == ["the answer"] * 4
            assert not any(stream.finished.committed for stream in running)
            assert await client.generate("no session").answer() == "the answer"
            for refused in (talks[0], client.session("new")):
                with pytest.raises(SessionStoreUnavailable) as caught:
                    await refused.send("three").answer()
                assert caught.value.retry_after_s > 0
            if fault == "stopped":
                server.go_on()
            else:
                await asyncio.to_thread(server.start)
            journaled = running[0]
            await until_whole(journal, journaled.request_id)
            again = [event async for event in client.resume(journaled.request_id)]
            assert again == [begun[0], *rest[0]]
            for talk in talks:
                async with asyncio.timeout(60):
                    while True:
                        with contextlib.suppress(SessionStoreUnavailable):
                            await talk.send("three", request_id=f"{talk.session_id}-3").answer()
                            break
                turns = (await talk.record()).turns
                assert [t.request_id for t in turns] == [f"{talk.session_id}-{n}" for n in (1, 2, 3)]
                assert [t.messages[0].content for t in turns] == ["one", "two", "three"]
        await journal.close()
        await store.close()


async def test_of_fifty_turns_at_once_the_record_has_those_that_were_told_so(tmp_path: Path):
    with valkey.persistent(tmp_path) as server:
        store = SessionStore(server.url)
        async with gateway(say(REPLY), sessions=store) as world, AsyncClient(world.server.address) as client:

            async def write(i: int) -> str:
                """Its request id where it was committed."""
                stream = client.session("s").send(f"turn {i}", request_id=f"r{i}")
                try:
                    await stream.answer()
                except SessionConflict as error:
                    return "" if error.current_version else "no version"
                return stream.request_id if stream.finished.committed else "not committed"

            told = [name for name in await asyncio.gather(*map(write, range(50))) if name]
            turns = (await client.get_session("s")).turns
            assert sorted(t.request_id for t in turns) == sorted(told)
            assert told
            for turn in turns:
                assert [m.content for m in turn.messages] == [f"turn {turn.request_id[1:]}", "the answer"]
        await store.close()
