"""Promise: a committed turn is durable, two writers never interleave, and a lost Redis is a typed error."""

import asyncio
import time
from dataclasses import replace

import pytest

from expertmesh.errors import InvalidRequest, NotFound, SessionConflict, SessionStoreUnavailable
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway.session import SessionStore, TurnRecord


@pytest.fixture(scope="module")
def redis_url():
    server = EmbeddedRedis()
    yield server.url
    server.stop()


@pytest.fixture
async def store(redis_url):
    store = SessionStore(redis_url, ttl_s=60)
    await store._redis.flushall()
    yield store
    await store.close()


def turn(text: str = "hi", request_id: str = "r1") -> TurnRecord:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "你好 👋", "reasoning_content": ""}]
    return TurnRecord(messages=messages, output_ids=[1, 2, 151645], usage={"prompt_tokens": 3}, request_id=request_id)


async def test_a_session_is_created_by_its_first_commit(store):
    opened = await store.open("s1")
    assert (opened.version, opened.turns) == (0, ())
    assert await store.commit("s1", 0, turn(), affinity="replica-2") == 1
    record = await store.get("s1")
    assert record.version == 1
    assert record.turns == (turn(),)
    assert record.affinity == "replica-2"
    assert record.created_at < record.expires_at
    assert record.messages[1]["content"] == "你好 👋"


async def test_of_fifty_writers_one_commits_and_no_turn_is_lost(store):
    async def write(i: int) -> bool:
        try:
            return await store.commit("s1", 0, turn(f"writer {i}", f"r{i}")) == 1
        except SessionConflict as error:
            return error.current_version != 1

    assert sum(await asyncio.gather(*map(write, range(50)))) == 1
    assert len((await store.get("s1")).turns) == 1


async def test_fifty_writers_that_retry_all_get_in_once_and_in_order(store):
    async def write(i: int) -> None:
        while True:
            record = await store.open("s1")
            try:
                await store.commit("s1", record.version, turn(f"writer {i}", f"r{i}"))
                return
            except SessionConflict:
                continue

    await asyncio.gather(*map(write, range(50)))
    record = await store.get("s1")
    assert record.version == len(record.turns) == 50
    assert {t.request_id for t in record.turns} == {f"r{i}" for i in range(50)}


async def test_the_same_request_committed_twice_counts_once(store):
    assert await store.commit("s1", 0, turn()) == 1
    assert await store.commit("s1", 0, turn()) == 1
    assert len((await store.get("s1")).turns) == 1


async def test_a_commit_that_is_repeated_late_counts_once_whatever_came_after_it(store):
    for i in range(3):
        assert await store.commit("s1", i, turn(request_id=f"r{i}")) == i + 1
    assert [await store.commit("s1", i, turn(request_id=f"r{i}")) for i in (0, 1, 2)] == [1, 2, 3]
    with pytest.raises(SessionConflict):
        await store.commit("s1", 1, turn(request_id="r0"))
    assert [t.request_id for t in (await store.get("s1")).turns] == ["r0", "r1", "r2"]


async def test_owners_do_not_see_each_other(store):
    await store.commit("s1", 0, turn(), owner="alice")
    with pytest.raises(NotFound):
        await store.get("s1", "bob")
    with pytest.raises(NotFound):
        await store.delete("s1", "bob")
    assert (await store.list("bob"))[0] == []
    assert (await store.open("s1", "bob")).version == 0


async def test_list_pages_and_delete(store):
    for i in range(7):
        await store.commit(f"s{i}", 0, turn())
    first, token = await store.list(page_size=5)
    rest, end = await store.list(page_size=5, page_token=token)
    assert [s.session_id for s in first + rest] == [f"s{i}" for i in range(7)]
    assert end == ""
    await store.delete("s3")
    with pytest.raises(NotFound):
        await store.get("s3")
    assert len((await store.list())[0]) == 6


async def test_an_expired_session_is_gone_from_the_list(redis_url, store):
    short = SessionStore(redis_url, ttl_s=0.001)
    await short.commit("old", 0, turn())
    await store.commit("new", 0, turn())
    while (await store.open("old")).version:  # Redis expires it
        pass
    assert [s.session_id for s in (await store.list())[0]] == ["new"]
    await short.close()


async def test_the_index_forgets_expired_sessions_without_being_read(redis_url, store):
    now = [1000.0]
    timed = SessionStore(redis_url, ttl_s=60, wall_clock=lambda: now[0])
    await timed.commit("old", 0, turn())
    now[0] += 61
    await timed.commit("new", 0, turn())
    assert await store._redis.zrange("expertmesh:sessions:{/}", 0, -1) == [b"new"]
    await timed.close()


async def test_a_session_has_a_size_bound(redis_url, store):
    small = SessionStore(redis_url, max_bytes=500)
    await small.commit("s1", 0, turn("x" * 600))
    with pytest.raises(InvalidRequest, match="below 500 bytes"):
        await small.open("s1")
    await small.close()


async def test_both_keys_of_a_session_share_a_slot_and_expire(store):
    await store.commit("s1", 0, turn())
    keys = [k.decode() for k in await store._redis.keys("*session:*")]
    assert len(keys) == 2
    assert len({k[k.index("{") : k.index("}")] for k in keys}) == 1
    for key in keys:
        assert 0 < await store._redis.pttl(key) <= 60_000


async def test_redis_away_is_a_typed_error(tmp_path):
    gone = SessionStore(f"unix://{tmp_path}/nobody", timeout_s=0.2)
    for call in (
        gone.open("s"),
        gone.get("s"),
        gone.list(),
        gone.commit("s", 0, turn()),
        gone.delete("s"),
        gone.ping(),
    ):
        with pytest.raises(SessionStoreUnavailable) as caught:
            await call
        assert caught.value.retry_after_s
    await gone.close()


async def test_more_callers_than_connections_wait_their_turn(redis_url):
    store = SessionStore(redis_url, max_connections=4)
    await asyncio.gather(*(store.open(f"s{i}") for i in range(300)))
    await store.close()


async def test_turns_that_ran_while_weights_were_damaged_are_suspect_wherever_they_are(store, redis_url):
    for version, (began, finished) in enumerate([(100.0, 110.0), (120.0, 130.0), (140.0, 150.0), (0.0, 151.0)]):
        done = replace(turn(request_id=f"r{version}"), began_at=began, finished_at=finished)
        await store.commit("s1", version, done)
    assert (await store.get("s1")).suspect_turns == frozenset()
    now = time.time()
    await store.mark_suspect([(125.0, 145.0)])
    assert (await store.get("s1")).suspect_turns == frozenset()  # older than any session can be
    early = SessionStore(redis_url, ttl_s=60, wall_clock=lambda: 150.0)
    for _ in range(2):  # every gateway does
        await early.mark_suspect([(125.0, 145.0), (151.0, 151.5)])
    assert (await store.get("s1")).suspect_turns == {1, 2, 3}
    assert (await store.fork("s1", "s2", at_version=2)).suspect_turns == {1}
    await store.mark_suspect([(now, now + 1.0)])
    assert (await store.get("s1")).suspect_turns == frozenset()
    await early.close()
