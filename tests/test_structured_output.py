"""Promise: an answer has the form that was asked for, whatever the seed, the thinking, neighbours and faults."""

import asyncio
import json
import re
import threading

import grpc
import pytest
from demo_world import CHECKPOINT, TOKENIZER, another_gateway, demo_world
from grammar_walks import compiled

from expertmesh.client import AnswerDelta, ReasoningDelta, ToolCallDelta
from expertmesh.cluster.attention.grammar import GrammarCompiler
from expertmesh.errors import ExpertMeshError, InvalidRequest
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.proto import expertmesh_pb2_grpc as pb_grpc
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.request import AnswerGrammar, FinishReason
from expertmesh.router import grammar as library_of
from expertmesh.router.client.requests import make_request
from expertmesh.router.gateway.journal import Journal

QUESTION = "What is 4821 + 377?"
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99999},
        "kind": {"enum": ["even", "odd"]},
        "digits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["sum", "kind", "digits"],
}
REGEX = r"[0-9]{1,5} \+ [0-9]{1,5} = [0-9]{1,6}\."
CHOICE = ["five thousand", "5198", "I do not know"]
FORMATS = {"json_schema": SCHEMA, "regex": REGEX, "choice": CHOICE}
TOOL = {"name": "calculator", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}}


def check(kind: str, answer: str) -> None:
    if kind == "regex":
        assert re.fullmatch(REGEX, answer, re.ASCII), answer
    elif kind == "choice":
        assert answer in CHOICE
    else:
        value = json.loads(answer)
        assert set(SCHEMA["required"]) <= set(value) <= set(SCHEMA["properties"])
        assert 0 <= value["sum"] <= 99999
        assert value["kind"] in ("even", "odd")
        assert len(value["digits"]) <= 4
        assert all(0 <= d <= 9 for d in value["digits"])
        assert len(value.get("note", "")) <= 8


async def read(stream) -> tuple[list[int], str, str]:
    ids, thought, answer = [], "", ""
    async for event in stream:
        if isinstance(event, ReasoningDelta | AnswerDelta | ToolCallDelta):
            ids += event.token_ids
        if isinstance(event, ReasoningDelta):
            thought += event.text
        elif isinstance(event, AnswerDelta):
            answer += event.text
    return ids, thought, answer


def ask(world, kind: str = "", question: str = QUESTION, **options):
    if kind:
        options[kind] = FORMATS[kind]
    return world.client.generate(question, include_token_ids=True, **{"max_tokens": 250, **options})


async def test_every_answer_has_its_form_for_any_seed_and_any_thinking():
    modes = [{"thinking": "off"}, {}, *({"thinking_budget": n} for n in range(9))]
    async with demo_world(max_num_seqs=64) as world:

        async def one(kind: str, mode: dict, seed: int) -> None:
            stream = ask(world, kind, temperature=1.0, top_k=0, top_p=1.0, seed=seed, **mode)
            ids, thought, answer = await read(stream)
            check(kind, answer)
            end = stream.finished
            assert end.reason is FinishReason.STOP
            assert end.completion_tokens == len(ids)
            assert end.reasoning_tokens == (0 if mode in modes[0:1] + modes[2:3] else ids.index(END_THINK) + 1)
            tail = ids[end.reasoning_tokens :]
            assert TOKENIZER.decode(tail).lstrip("\n") == answer
            assert (thought == "") == (not end.reasoning_tokens)

        jobs = [one(k, m, 7) for k in FORMATS for m in modes]
        await asyncio.gather(*jobs, *(one(k, modes[0], seed) for k in FORMATS for seed in range(6)))


END_THINK = TOKENIZER.special_ids.end_think


async def test_a_neighbour_with_a_grammar_changes_no_bit():
    async with demo_world() as world:

        async def plain() -> list[tuple[int, float, tuple[float, ...]]]:
            request = make_request(QUESTION, temperature=0.9, seed=5, logprobs=3, max_tokens=60, thinking="off")
            async with grpc.aio.insecure_channel(world.server.address) as channel:
                events = [e async for e in pb_grpc.GenerationStub(channel).Generate(request)]
            return [(x.token_id, x.logprob, tuple(t.logprob for t in x.top)) for e in events for x in e.answer.logprobs]

        alone = await plain()
        assert alone
        crowd = [ask(world, k, temperature=0.8, seed=s, thinking="off") for k in FORMATS for s in range(3)]
        together, *_ = await asyncio.gather(plain(), *(read(s) for s in crowd))
        assert together == alone


async def answers(world) -> list[tuple[list[int], str, str]]:
    streams = [
        ask(world, kind, temperature=1.0, seed=seed, **mode)
        for kind in FORMATS
        for mode in ({"thinking": "off"}, {"thinking_budget": 5})
        for seed in range(2)
    ]
    return await asyncio.gather(*(read(s) for s in streams))


async def test_preemption_and_failover_change_no_token():
    async with demo_world(num_blocks=1024) as world:
        expected = await answers(world)
    async with demo_world(num_blocks=24, max_num_seqs=16) as world:
        assert await answers(world) == expected
        assert world.engines[0].scheduler.num_preemptions > 0
    async with demo_world(replicas=2, max_num_seqs=16) as world:
        work = asyncio.create_task(answers(world))
        first = world.engines[0]
        canaries = [ask(world), ask(world)]  # one at each replica: when these are 30 tokens in, others have begun
        for _ in range(30):
            await asyncio.gather(*(anext(aiter(c)) for c in canaries))
        assert first.load().num_running > 1
        await asyncio.to_thread(first.stop)
        assert await work == expected
        await asyncio.gather(*(c.answer() for c in canaries))
        assert first.failure is not None


async def test_a_stream_resumed_at_another_gateway_keeps_its_form():
    def ids_of(events) -> list[int]:
        return [i for e in events for i in (*e.reasoning.token_ids, *e.answer.token_ids)]

    with EmbeddedRedis() as redis:
        journals = [Journal(redis.url), Journal(redis.url)]
        options = {"json_schema": SCHEMA, "temperature": 1.0, "seed": 3, "thinking_budget": 10, "max_tokens": 250}
        async with demo_world(journal=journals[0]) as world, another_gateway(world, journals[1]) as other:
            expected, _, answer = await read(world.client.generate(QUESTION, include_token_ids=True, **options))
            check("json_schema", answer)
            async with (
                grpc.aio.insecure_channel(world.server.address) as here,
                grpc.aio.insecure_channel(other) as there,
            ):
                for num_read in (4, 20, 45):  # in the thinking, the closing sentence, the answer
                    request = make_request(QUESTION, include_token_ids=True, resumable=True, **options)
                    call = pb_grpc.GenerationStub(here).Generate(request)
                    begun = [await call.read() for _ in range(num_read)]
                    resume = pb.ResumeRequest(request_id=request.request_id, from_offset=num_read)
                    rest = [e async for e in pb_grpc.GenerationStub(there).Resume(resume)]
                    assert ids_of([*begun, *rest]) == expected
                    assert [e.offset for e in (*begun, *rest)] == list(range(num_read + len(rest)))
                    assert rest[-1].finished.reason == pb.FINISH_REASON_STOP
                    call.cancel()
        for journal in journals:
            await journal.close()


async def test_a_cut_answer_says_so():
    async with demo_world() as world:
        stream = ask(world, "json_schema", max_tokens=5, thinking="off")
        _, _, answer = await read(stream)
        assert stream.finished.reason is FinishReason.LENGTH
        assert answer.startswith("{")
        with pytest.raises(ValueError):
            json.loads(answer)


async def test_tools_that_may_be_called_leave_the_answer_its_form():
    async with demo_world() as world:
        stream = ask(world, "choice", "Use the calculator to compute 4821 + 377.", tools=[TOOL])
        _, _, answer = await read(stream)
        assert (stream.finished.reason, answer) == (FinishReason.TOOL_CALLS, "")
        stream = ask(world, "choice", tools=[TOOL], thinking="off")
        _, _, answer = await read(stream)
        if stream.finished.reason is not FinishReason.TOOL_CALLS:
            check("choice", answer)


UNKEPT = [
    {"json_schema": "nope"},
    {"json_schema": {"type": "integer", "multipleOf": 3}},
    {"json_schema": {"$ref": "#"}},
    {"regex": "("},
    {"regex": r"(?=a)b"},
    {"regex": ""},
    {"choice": []},
    {"choice": ["a", "a"]},
    {"choice": ["a\n"]},
    {"choice": ["x" * 1025]},
    {"choice": ["a"], "stop": ["b"]},
    {"choice": ["a"], "stop_token_ids": [5]},
    {"choice": ["a"], "min_tokens": 3},
    {"choice": ["a"], "ignore_eos": True},
    {"choice": ["a"], "tools": [TOOL], "tool_choice": "required"},
    {"choice": ["a"], "tools": [TOOL], "tool_choice": "calculator"},
]


async def test_what_cannot_be_kept_is_refused_before_any_event():
    async with demo_world() as world:
        for options in UNKEPT:
            with pytest.raises(InvalidRequest):
                await anext(aiter(world.client.generate(QUESTION, **options)))
        with pytest.raises(InvalidRequest, match="a text can match"):  # only compiling tells
            await read(world.client.generate(QUESTION, json_schema={"anyOf": [{"$ref": "#"}]}))


async def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    async with demo_world() as world:
        monkeypatch.setattr(library_of.importlib, "import_module", missing)
        with pytest.raises(ExpertMeshError, match=r"pip install 'expertmesh\[structured\]'") as raised:
            await read(ask(world, "choice"))
        assert raised.value.code == "FAILED_PRECONDITION"


async def test_others_go_on_while_a_grammar_is_compiled_and_it_can_be_cancelled():
    may_compile, asked = threading.Event(), threading.Event()

    def tokenizer():
        asked.set()
        assert may_compile.wait(60)
        return TOKENIZER

    async with demo_world() as world:
        engine = world.engines[0]
        engine._grammars = GrammarCompiler(tokenizer, engine.vocab_size)
        waiting = asyncio.create_task(read(ask(world, "choice", thinking="off")))
        cancelled = ask(world, "regex", request_id="r-cancelled")
        lost = asyncio.create_task(read(cancelled))
        assert await asyncio.to_thread(asked.wait, 60)
        _, _, answer = await read(ask(world))
        assert answer == "4821 + 377 = 5198."
        async with asyncio.timeout(60):
            while engine.load().num_waiting < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await world.client.cancel("r-cancelled")
        await lost
        assert cancelled.finished.reason is FinishReason.CANCELLED
        assert not waiting.done()
        may_compile.set()
        _, _, answer = await waiting
        check("choice", answer)


def test_the_cache_of_grammars_is_bounded():
    compiler = GrammarCompiler.for_checkpoint(CHECKPOINT, TOKENIZER.vocab_size)
    compiler._max_cached_bytes = 20_000
    try:
        for n in range(1, 40):
            compiled(compiler, AnswerGrammar(kind="regex", source=f"[a-z]{{{n}}}"))
            assert compiler.num_cached_bytes <= 20_000 or len(compiler._cache) == 1
        assert 1 <= len(compiler._cache) < 30
    finally:
        compiler.close()
