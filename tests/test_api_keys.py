"""Promise: with keys nobody is served without one, and what belongs to one key does not exist for another."""

import grpc
import pytest
from gateway_world import chat, gateway, rest, say

from expertmesh.client import AsyncClient
from expertmesh.errors import ConfigError, NotFound, Unauthenticated
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway.api_keys import HEADER, ApiKeys, hash_of, new_key
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.session import SessionStore

ALICE, BOB = new_key(), new_key()
KEYS = ApiKeys({hash_of(ALICE): "alice", hash_of(BOB): "bob"})


def header(key: str) -> tuple[tuple[str, str], ...]:
    return ((HEADER, f"Bearer {key}"),)


async def test_no_key_or_a_wrong_one_is_unauthenticated_everywhere():
    async with gateway(say("x"), api_keys=KEYS) as world:
        calls = [
            (world.generation.Generate, pb.GenerateRequest(prompt="a")),
            (world.generation.Resume, pb.ResumeRequest(request_id="r")),
            (world.generation.Cancel, pb.CancelRequest(request_id="r")),
            (world.sessions.Get, pb.GetSessionRequest(session_id="s")),
            (world.sessions.List, pb.ListSessionsRequest()),
            (world.sessions.Delete, pb.DeleteSessionRequest(session_id="s")),
            (world.sessions.Fork, pb.ForkSessionRequest(session_id="s", new_session_id="t")),
            (world.sessions.Export, pb.ExportSessionRequest(session_id="s")),
        ]
        for metadata in ((), header("wrong"), header(""), ((HEADER, ALICE),)):
            for call, request in calls[:3] if metadata else calls[:2]:
                error = await world.refused(call(request, metadata=metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert world.engine.submitted == []


async def test_what_one_key_made_does_not_exist_for_another():
    redis = EmbeddedRedis()
    store, journal = SessionStore(redis.url), Journal(redis.url)
    try:
        async with (
            gateway(say("word " * 30), api_keys=KEYS, sessions=store, journal=journal) as world,
            AsyncClient(world.server.address, api_key=ALICE) as alice,
            AsyncClient(world.server.address, api_key=BOB) as bob,
        ):
            await alice.session("talk").send("hi", request_id="r1", resumable=True).answer()
            with pytest.raises(NotFound):
                await bob.get_session("talk")
            with pytest.raises(NotFound):
                await bob.delete_session("talk")
            with pytest.raises(NotFound):
                await bob.fork_session("talk", "mine")
            with pytest.raises(NotFound):
                await bob.export_session("talk")
            assert [s async for s in bob.list_sessions()] == []
            assert [s.session_id async for s in alice.list_sessions()] == ["talk"]
            resume = pb.ResumeRequest(request_id="r1")
            stolen = world.generation.Resume(resume, metadata=header(BOB))
            assert (await world.refused(stolen)).code() is grpc.StatusCode.NOT_FOUND
            assert await rest(world.generation.Resume(resume, metadata=header(ALICE)))
            # the same names are free for others
            await bob.session("talk").send("hi", request_id="r1", resumable=True).answer()
            assert (await bob.get_session("talk")).version == 1
            salts = {request.prefix_salt for request in world.engine.submitted}
            assert len(salts) == 2
            assert b"" not in salts
    finally:
        await journal.close()
        await store.close()
        redis.stop()


async def test_a_running_request_is_cancelled_by_its_key_only():
    async with gateway(say("word " * 100), api_keys=KEYS) as world:
        world.engine.allow(1)
        request = pb.GenerateRequest(chat=chat("a"), request_id="r")
        call = world.generation.Generate(request, metadata=header(ALICE))
        await call.read()
        cancel = pb.CancelRequest(request_id="r")
        error = await world.refused(world.generation.Cancel(cancel, metadata=header(BOB)))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        await world.generation.Cancel(cancel, metadata=header(ALICE))
        assert (await rest(call))[-1].finished.reason == pb.FINISH_REASON_CANCELLED


def test_keys_are_read_from_a_file_of_hashes(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\nalice {hash_of(ALICE)}\n\nbob {hash_of(BOB)} 2.5  # laptop\n")
    keys = ApiKeys.from_file(str(path))
    assert [keys.owner(header(k)) for k in (ALICE, BOB)] == ["alice", "bob"]
    assert keys.weights == {"bob": 2.5}
    with pytest.raises(Unauthenticated):
        keys.owner(header(hash_of(ALICE)))
    assert ApiKeys.from_file("").owner(()) == ""


ZERO = "0" * 64


@pytest.mark.parametrize(
    "text",
    ["", "alice", "alice notahash", f"a/b {ZERO}", f"a {ZERO} more", f"a {ZERO} 0", f"a {ZERO} 1 1"],
)
def test_a_broken_file_of_keys_is_refused_at_the_start(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError):
        ApiKeys.from_file(str(path))


def test_a_missing_file_of_keys_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError):
        ApiKeys.from_file(str(tmp_path / "nowhere"))
