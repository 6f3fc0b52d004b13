"""Promise: the client commands do what they say against a gateway, with keys; Ctrl-C ends a turn, resumable or not."""

import asyncio
import io
import json
from pathlib import Path

import pytest
from gateway_world import World, gateway, say

from expertmesh import cli
from expertmesh.client import Client, Event
from expertmesh.cluster.commands.connect import API_KEY_VARIABLE
from expertmesh.cluster.commands.console import TurnPrinter, run_turn
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.request import FinishReason
from expertmesh.router.gateway.api_keys import ApiKeys, hash_of
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.session import SessionStore

REPLY = "<think>\nwhy\n</think>\n\nbecause 你好<|im_end|>"
KEYS = ApiKeys({hash_of("key"): "alice"})


@pytest.fixture(scope="module")
def redis_url():
    with EmbeddedRedis() as server:
        yield server.url


async def test_a_conversation_is_made_listed_forked_exported_and_deleted(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    async def run(world: World, *words: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(cli.main, [*words, "--address", world.server.address])
        return code, *capsys.readouterr()

    store, journal = SessionStore(redis_url), Journal(redis_url)
    async with gateway(say(REPLY), sessions=store, journal=journal, api_keys=KEYS) as world:
        code, out, err = await run(world, "generate", "hi")
        assert (code, out) == (1, "")
        assert err.startswith("expertmesh: Unauthenticated: ")
        assert (await run(world, "generate", "hi", "--api-key", "key"))[1] == "<think>\nwhy\n</think>\n\nbecause 你好\n"
        monkeypatch.setenv(API_KEY_VARIABLE, "key")
        code, out, _ = await run(world, "generate", "hi", "--session", "s", "--json")
        assert (code, json.loads(out)["answer"]) == (0, "because 你好")
        assert (await run(world, "sessions", "fork", "s", "t"))[1] == "t: 1 turns\n"
        listed = (await run(world, "sessions", "list"))[1]
        assert [line.split()[:2] for line in listed.splitlines()] == [["s", "1"], ["t", "1"]]
        exported = json.loads((await run(world, "sessions", "export", "s"))[1])
        assert exported["session"]["turns"][0]["messages"][1]["content"] == "because 你好"
        assert len(exported["turn_ids"][0]["output_ids"]) > 3
        assert (await run(world, "sessions", "delete", "t"))[0] == 0
        code, _, err = await run(world, "sessions", "delete", "t")
        assert (code, err.count("NotFound")) == (1, 1)
        assert [json.loads((await run(world, "sessions", "list", "--json"))[1])["session_id"]] == ["s"]
    await journal.close()
    await store.close()


async def test_the_form_of_the_answer_goes_to_the_engine(tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    async with gateway(say("7<|im_end|>")) as world:
        for words in (["--regex", "[0-9]"], ["--choice", "7", "--choice", "8"], ["--json-schema", str(schema)]):
            assert await asyncio.to_thread(cli.main, ["generate", "hi", "--address", world.server.address, *words]) == 0
        kinds = [request.grammar.kind for request in world.engine.submitted if request.grammar is not None]
        assert kinds == ["regex", "choice", "json_schema"]
        missing = ["generate", "hi", "--address", world.server.address, "--json-schema", str(tmp_path / "nowhere")]
        assert await asyncio.to_thread(cli.main, missing) == 2
        assert len(world.engine.submitted) == 3


@pytest.mark.parametrize("resumable", [False, True])
async def test_an_interrupt_ends_the_turn_at_once(redis_url: str, resumable: bool):
    class Interrupted(TurnPrinter):
        def show(self, event: Event) -> None:
            raise KeyboardInterrupt

    def use(address: str) -> object:
        with Client(address) as client:
            return run_turn(client.generate("hi", resumable=resumable), Interrupted(io.StringIO()))

    journal = Journal(redis_url)
    async with gateway(say("word " * 100), journal=journal) as world:
        world.engine.allow(1)
        assert await asyncio.to_thread(use, world.server.address) is None
        assert await asyncio.to_thread(world.engine.wait_idle)  # long before the grace of a resumable stream
        assert len(world.engine.aborted) == 1
    await journal.close()


async def test_a_cancelled_resumable_stream_says_so_to_who_resumes_it(redis_url: str):
    journal = Journal(redis_url)
    async with gateway(say("word " * 100), journal=journal) as world:
        world.engine.allow(1)

        def use() -> list[Event]:
            with Client(world.server.address) as client:
                stream = client.generate("hi", resumable=True, request_id="gone")
                next(stream)
                stream.cancel()
                stream.close()
                return list(client.resume("gone"))

        events = await asyncio.to_thread(use)
        assert events[-1].reason is FinishReason.CANCELLED
    await journal.close()
