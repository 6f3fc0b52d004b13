"""Promise: what a session was told it keeps (mode, budget, history), a retried turn counts once, and a turn that ended
while Redis was away is committed when it returns."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from gateway_world import chat, gateway, say, text_of, tokenizer

from expertmesh.errors import SessionStoreUnavailable
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway.session import SessionStore

REPLY = "<think>\na thought\n</think>\n\nthe answer<|im_end|>"
KEEP, DROP = pb.HISTORY_POLICY_KEEP_THINKING, pb.HISTORY_POLICY_DROP_THINKING
OFF, ON = pb.ThinkingOptions.OFF, pb.ThinkingOptions.ON


@pytest.fixture(scope="module")
def redis_url():
    server = EmbeddedRedis()
    yield server.url
    server.stop()


@pytest.fixture
async def store(redis_url):
    store = SessionStore(redis_url)
    await store._redis.flushall()
    yield store
    await store.close()


def prompt(world, index: int = -1) -> str:
    return tokenizer().decode(world.engine.submitted[index].prompt_ids, skip_special=False)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_mode_and_a_budget_stay_until_they_are_set_anew(store):
    async with gateway(say(REPLY), sessions=store) as world:

        async def turn(**thinking) -> None:
            await world.generate(chat=chat("hi"), session_id="s", thinking=pb.ThinkingOptions(**thinking))

        await turn(mode=OFF)
        await turn()
        assert prompt(world).endswith("</think>\n\n")
        await turn(mode=ON, budget_tokens=9)
        await turn()
        assert not prompt(world).endswith("</think>\n\n")
        assert world.engine.submitted[-1].thinking.budget_tokens == 9
        session = await world.sessions.Get(pb.GetSessionRequest(session_id="s"))
        assert (session.thinking.mode, session.thinking.budget_tokens) == (ON, 9)
        await turn(budget_tokens=0)
        await turn()
        assert prompt(world).endswith("</think>\n\n")
        await turn(mode=ON)
        assert world.engine.submitted[-1].thinking is None
        assert not prompt(world).endswith("</think>\n\n")


@pytest.mark.parametrize("thinking", [{}, {"mode": OFF}])
async def test_kept_thinking_makes_each_turn_a_prefix_of_the_next_prompt(store, thinking):
    async with gateway(say(REPLY), sessions=store) as world:
        options = pb.ThinkingOptions(**thinking)
        for text in ("one", "two", "three"):
            await world.generate(chat=chat(text), session_id="s", history_policy=KEEP, thinking=options)
        reply = tokenizer().encode(REPLY)
        for before, after in zip(world.engine.submitted, world.engine.submitted[1:], strict=False):
            so_far = [*before.prompt_ids, *reply]
            assert list(after.prompt_ids[: len(so_far)]) == so_far
        assert prompt(world).count("a thought") == 2
        export = await world.sessions.Export(pb.ExportSessionRequest(session_id="s"))
        ids = [i for t in export.turn_ids for i in (*t.input_ids, *t.output_ids, 198)]
        assert tuple(ids[: len(world.engine.submitted[2].prompt_ids)]) == world.engine.submitted[2].prompt_ids


async def test_dropped_thinking_is_the_default_and_the_policy_can_change(store):
    async with gateway(say(REPLY), sessions=store) as world:
        await world.generate(chat=chat("one"), session_id="s")
        await world.generate(chat=chat("two"), session_id="s", history_policy=KEEP)
        assert prompt(world).count("a thought") == 0
        await world.generate(chat=chat("three"), session_id="s")
        assert prompt(world).count("a thought") == 1  # from the turn that began to keep
        await world.generate(chat=chat("four"), session_id="s", history_policy=DROP)
        assert prompt(world).count("a thought") == 0
        assert all(f"{text}<|im_end|>" in prompt(world) for text in ("one", "two", "three", "four"))


async def test_a_turn_cut_by_a_limit_is_closed_before_the_next_one(store):
    async with gateway(say("word " * 50), sessions=store) as world:
        cut = pb.SamplingOptions(max_tokens=2)
        await world.generate(chat=chat("one"), session_id="s", history_policy=KEEP, sampling=cut)
        await world.generate(chat=chat("two"), session_id="s", sampling=cut)
        assert "assistant\nword word<|im_end|>\n<|im_start|>user\ntwo" in prompt(world)


async def test_kept_history_holds_its_tools(store):
    tool, other = pb.Tool(name="w"), pb.Tool(name="v")
    async with gateway(say(REPLY), sessions=store) as world:
        fields = {"session_id": "s", "history_policy": KEEP}
        await world.generate(chat=chat("one"), tools=[tool], **fields)
        result = pb.Chat(messages=[pb.Message(role="tool", content="rain")])
        await world.generate(chat=result, tools=[tool], session_id="s")
        assert prompt(world).count("# Tools") == 1
        assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in prompt(world)
        call = world.generation.Generate(pb.GenerateRequest(chat=chat("x"), tools=[other], session_id="s"))
        assert (await world.refused(call)).details().startswith("tools:")


async def test_a_turn_asked_for_again_is_answered_from_the_record(store):
    async with gateway(say(REPLY), sessions=store) as world:
        fields = {"chat": chat("one"), "session_id": "s", "request_id": "r1"}
        first = await world.generate(**fields)
        await world.generate(chat=chat("two"), session_id="s")
        again = await world.generate(**fields)
        for kind in ("reasoning", "answer"):
            assert text_of(again, kind) == text_of(first, kind)
        assert again[-1].finished.usage.completion_tokens == first[-1].finished.usage.completion_tokens
        assert (again[-1].finished.committed, again[-1].finished.session_version) == (True, 1)
        assert again[-1].finished.reason == first[-1].finished.reason
        assert again[0].started.seed == first[0].started.seed
        assert [e.offset for e in again] == list(range(len(again)))
        assert len(world.engine.submitted) == 2
        other = pb.GenerateRequest(chat=chat("other"), session_id="s", request_id="r1")
        error = await world.refused(world.generation.Generate(other))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_fork_goes_its_own_way(store):
    async with gateway(say(REPLY), sessions=store) as world:
        for text in ("one", "two"):
            await world.generate(chat=chat(text), session_id="s")
        request = pb.ForkSessionRequest(session_id="s", new_session_id="f", at_version=1)
        assert (await world.sessions.Fork(request)).version == 1
        events = await world.generate(chat=chat("three"), session_id="f")
        assert events[-1].finished.session_version == 2
        assert "two" not in prompt(world)
        assert (await store.get("s")).version == 2
        assert [s.session_id for s in (await store.list())[0]] == ["f", "s"]
        error = await world.refused(world.sessions.Fork(request))
        assert error.details().startswith("new_session_id:")
        too_far = pb.ForkSessionRequest(session_id="s", new_session_id="g", at_version=3)
        assert (await world.refused(world.sessions.Fork(too_far))).details().startswith("at_version:")


class Away(SessionStore):
    """A store that can be away for commits."""

    away = False

    async def commit(self, *arguments, **fields) -> int:
        if self.away:
            raise SessionStoreUnavailable("away")
        return await super().commit(*arguments, **fields)


async def test_a_turn_that_ended_while_redis_was_away_is_committed_when_it_returns(redis_url):
    store = Away(redis_url)
    await store._redis.flushall()
    async with gateway(say(REPLY), sessions=store) as world:
        store.away = True
        events = await world.generate(chat=chat("one"), session_id="s")
        assert not events[-1].finished.committed
        assert text_of(events) == "the answer"
        call = world.generation.Generate(pb.GenerateRequest(chat=chat("two"), session_id="s"))
        assert (await world.refused(call)).code() is grpc.StatusCode.UNAVAILABLE
        store.away = False
        await until(lambda: not len(world.server.generations.pending))
        assert (await store.get("s")).version == 1
        assert (await world.generate(chat=chat("two"), session_id="s"))[-1].finished.session_version == 2
    await store.close()


async def test_past_the_bound_turns_are_refused_before_they_begin(redis_url):
    store = Away(redis_url)
    await store._redis.flushall()
    async with gateway(say(REPLY), sessions=store) as world:
        world.server.generations.pending._max_turns = 2
        store.away = True
        for i in range(2):
            await world.generate(chat=chat("one"), session_id=f"s{i}")
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(chat=chat("x"), session_id="s2")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "2 turns wait" in error.details()
        assert text_of(await world.generate(chat=chat("x"))) == "the answer"
        assert len(world.engine.submitted) == 3
        store.away = False
        await until(lambda: not len(world.server.generations.pending))
        assert [s.session_id for s in (await store.list())[0]] == ["s0", "s1"]
    await store.close()


async def test_a_history_policy_needs_a_session():
    async with gateway(say("x")) as world:
        for fields in ({"history_policy": KEEP}, {"history_policy": 9, "session_id": "s"}):
            call = world.generation.Generate(pb.GenerateRequest(chat=chat("x"), **fields))
            assert (await world.refused(call)).details().startswith("history_policy:")


async def test_a_client_sees_which_turns_ran_on_damaged_weights(store):
    async with gateway(say(REPLY), sessions=store) as world:
        for _ in range(2):
            await world.generate(chat=chat("hi"), session_id="s")
        first, second = (await store.get("s")).turns
        assert first.began_at < first.finished_at <= second.began_at < second.finished_at
        await store.mark_suspect([(second.began_at + 1e-6, second.finished_at + 60.0)])
        session = await world.sessions.Get(pb.GetSessionRequest(session_id="s"))
        assert [turn.suspect for turn in session.turns] == [False, True]
        assert session.turns[1].began_at == second.began_at
