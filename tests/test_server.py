"""Promise: every request is answered exactly or refused by a typed status, and whatever ends a stream ends its work."""

import asyncio
from random import Random
from typing import Any

import grpc
import pytest
from gateway_world import MAX_MODEL_LEN, TOKEN, chat, gateway, rest, say, text_of, tokenizer
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from expertmesh.bench import fuzz_http2
from expertmesh.config import TelemetryConfig
from expertmesh.errors import InvalidRequest, Overloaded
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway import cluster_service
from expertmesh.router.gateway.link import TOKEN_KEY
from expertmesh.router.gateway.rpc_errors import from_rpc
from expertmesh.router.gateway.session import SessionStore
from expertmesh.telemetry import ATTR_REQUEST_ID, SPAN_REQUEST, configure

REPLY = "<think>\na thought 你\n</think>\n\nthe answer 👩‍👧<|im_end|>"


def tree_error(error: grpc.aio.AioRpcError):
    return from_rpc(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))


# ---------------------------------------------------------------- answers


async def test_a_chat_streams_thinking_then_answer_with_gapless_offsets():
    async with gateway(say(REPLY)) as world:
        events = await world.generate(chat=chat("hi"), request_id="r-1")
        assert [e.offset for e in events] == list(range(len(events)))
        started, finished = events[0].started, events[-1].finished
        assert (started.request_id, started.model) == ("r-1", "tiny")
        assert started.prompt_tokens == len(world.engine.submitted[0].prompt_ids)
        assert text_of(events, "reasoning") == "a thought 你"
        assert text_of(events) == "the answer 👩‍👧"
        ids = tokenizer().encode(REPLY)
        assert finished.reason == pb.FINISH_REASON_STOP
        assert finished.usage.completion_tokens == len(ids)
        assert finished.usage.reasoning_tokens == ids.index(151668) + 1
        assert finished.usage.cached_tokens == 1
        timings = finished.timings
        assert 0 < timings.time_to_first_token_s <= timings.time_to_first_answer_token_s <= timings.total_s


async def test_the_engine_gets_the_rendered_prompt_and_the_checkpoints_defaults():
    async with gateway(say("x<|im_end|>")) as world:
        events = await world.generate(chat=chat("hi"))
        request = world.engine.submitted[0]
        assert tokenizer().decode(request.prompt_ids, skip_special=False) == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p) == (pytest.approx(0.6), pytest.approx(0.95))
        assert (sampling.top_k, sampling.stop_token_ids) == (20, {151645, 151643})
        assert sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)
        assert sampling.seed == events[0].started.seed


async def test_a_chosen_seed_is_reported_and_an_assigned_one_differs_each_time():
    async with gateway(say("x")) as world:
        chosen = await world.generate(prompt="a", sampling=pb.SamplingOptions(seed=0))
        assigned = [(await world.generate(prompt="a"))[0].started.seed for _ in range(3)]
        assert chosen[0].started.seed == 0
        assert len(set(assigned)) == 3


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "assistant\n"),
        ({"mode": pb.ThinkingOptions.ON}, "assistant\n"),
        ({"mode": pb.ThinkingOptions.OFF}, "assistant\n<think>\n\n</think>\n\n"),
        ({"budget_tokens": 0}, "assistant\n<think>\n\n</think>\n\n"),
    ],
)
async def test_the_thinking_mode_reaches_the_template(options, ending):
    async with gateway(say("yes")) as world:
        await world.generate(chat=chat("hi /no_think"), thinking=pb.ThinkingOptions(**options))
        prompt = tokenizer().decode(world.engine.submitted[0].prompt_ids, skip_special=False)
        assert prompt.endswith(ending)
        assert "hi /no_think" in prompt


async def test_a_thinking_budget_reaches_the_engine_with_the_closing_sentence():
    async with gateway(say(REPLY)) as world:
        await world.generate(chat=chat("hi"), thinking=pb.ThinkingOptions(budget_tokens=7))
        budget = world.engine.submitted[0].thinking
        assert (budget.budget_tokens, budget.think_id, budget.end_think_id) == (7, 151667, 151668)
        assert len(budget.closing_ids) == 24
        assert budget.closing_ids[0] == 271
        assert budget.closing_ids[-2:] == (151668, 271)


async def test_stop_strings_end_the_text_and_the_work():
    async with gateway(say("one two three four five six seven eight nine ten" * 20)) as world:
        sampling = pb.SamplingOptions(stop=["three f"], max_tokens=400)
        events = await world.generate(chat=chat("hi"), sampling=sampling)
        finished = events[-1].finished
        assert text_of(events) == "one two "
        assert (finished.reason, finished.stop_matched) == (pb.FINISH_REASON_STOP, "three f")
        assert finished.usage.completion_tokens == 4


async def test_plain_prompts_and_token_ids_are_served_without_a_template():
    async with gateway(say("\nanswer\n")) as world:
        events = await world.generate(prompt="Hello world", sampling=pb.SamplingOptions(max_tokens=3))
        assert text_of(events) == "\nanswer\n"
        assert events[-1].finished.reason == pb.FINISH_REASON_LENGTH
        await world.generate(token_ids=pb.TokenIds(ids=[9707, 1879]))
        assert [r.prompt_ids for r in world.engine.submitted] == [(9707, 1879)] * 2


async def test_token_ids_and_logprobs_are_streamed_when_asked_for():
    async with gateway(say(REPLY)) as world:
        sampling = pb.SamplingOptions(logprobs=1)
        events = await world.generate(chat=chat("hi"), include_token_ids=True, sampling=sampling)
        deltas = [getattr(e, e.WhichOneof("event")) for e in events[1:-1]]
        ids = tokenizer().encode(REPLY)
        assert [i for d in deltas for i in d.token_ids] == ids
        assert [x.token_id for d in deltas for x in d.logprobs] == ids
        assert deltas[0].logprobs[0].top[0].logprob == pytest.approx(-0.25)


async def test_256_streams_at_once_each_get_their_own_text():
    def reply(request):
        return tokenizer().encode(f"stream {len(request.prompt_ids)} says {request.prompt_ids[-1]}")

    async with gateway(reply) as world:
        calls = [world.generate(token_ids=pb.TokenIds(ids=[5] * (i % 7 + 1) + [i])) for i in range(256)]
        for i, events in enumerate(await asyncio.gather(*calls)):
            assert text_of(events) == f"stream {i % 7 + 2} says {i}"


async def test_the_trace_context_goes_on_to_the_engine():
    async with gateway(say("x")) as world:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        call = world.generation.Generate(pb.GenerateRequest(prompt="a"), metadata=(("traceparent", trace),))
        assert [e async for e in call]
        assert world.engine.submitted[0].traceparent == trace


async def test_the_request_span_joins_the_callers_trace_and_hands_its_own_on():
    exporter = InMemorySpanExporter()
    telemetry = configure(TelemetryConfig(), role="gateway", instance="g", span_exporter=exporter)
    async with gateway(say("x"), telemetry=telemetry) as world:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        request = pb.GenerateRequest(prompt="a", request_id="r1")
        assert [e async for e in world.generation.Generate(request, metadata=(("traceparent", trace),))]
        await world.refused(world.generation.Generate(pb.GenerateRequest()))
        served, refused = exporter.get_finished_spans()
        assert (served.name, served.attributes[ATTR_REQUEST_ID]) == (SPAN_REQUEST, "r1")
        assert f"{served.parent.span_id:016x}" == "b7ad6b7169203331"
        assert f"{served.context.span_id:016x}" in world.engine.submitted[0].traceparent
        assert not refused.status.is_ok
    telemetry.shutdown()


# ---------------------------------------------------------------- what bad input gets

S = pb.SamplingOptions
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "chat, prompt, token_ids", "exactly one"),
    ({"prompt": ""}, "chat, prompt, token_ids", "exactly one"),
    ({"prompt": "a", "chat": chat("b")}, "chat, prompt, token_ids", "exactly one"),
    ({"prompt": "a", "token_ids": pb.TokenIds(ids=[1])}, "chat, prompt, token_ids", "exactly one"),
    ({"chat": pb.Chat()}, "chat.messages", "at least one message"),
    ({"token_ids": pb.TokenIds()}, "token_ids.ids", "at least one"),
    ({"token_ids": pb.TokenIds(ids=[1, 151669])}, "token_ids.ids[1]", "0..151668"),
    ({"token_ids": pb.TokenIds(ids=[2**32 - 1])}, "token_ids.ids[0]", "0..151668"),
    ({"token_ids": pb.TokenIds(ids=[1] * 512)}, "token_ids", "at most 511"),
    ({"prompt": "word " * 600}, "prompt", "at most 511"),
    ({"chat": chat("word " * 600)}, "chat", "at most 511"),
    ({"chat": pb.Chat(messages=[pb.Message(role="robot", content="x")])}, "chat.messages[0].role", "one of system"),
    ({"chat": pb.Chat(messages=[pb.Message(role="", content="x")])}, "chat.messages[0].role", "one of system"),
    ({"chat": pb.Chat(messages=[pb.Message(role="user")])}, "chat.messages[0].content", "text"),
    (
        {"chat": pb.Chat(messages=[pb.Message(role="user", content="x", reasoning_content="y")])},
        "chat.messages[0].reasoning_content",
        "assistant only",
    ),
    ({"prompt": "a", "request_id": "a b"}, "request_id", "A-Z"),
    ({"prompt": "a", "request_id": "x" * 65}, "request_id", "1 to 64"),
    ({"chat": chat("a"), "session_id": "../etc"}, "session_id", "A-Z"),
    ({"prompt": "a", "session_id": "s"}, "session_id", "unset with prompt"),
    ({"prompt": "a", "tools": [pb.Tool(name="t")]}, "tools", "none with prompt"),
    ({"chat": chat("a"), "tools": [pb.Tool(name="")]}, "tools[0].name", "a name"),
    ({"chat": chat("a"), "tools": [pb.Tool(name="t", parameters_json="[")]}, "tools[0].parameters_json", "JSON object"),
    ({"prompt": "a", "resumable": True}, "resumable", "false"),
    ({"prompt": "a", "thinking": pb.ThinkingOptions(mode=1)}, "thinking.mode", "DEFAULT"),
    (
        {"token_ids": pb.TokenIds(ids=[1]), "thinking": pb.ThinkingOptions(mode=2)},
        "thinking.mode",
        "DEFAULT with token_ids",
    ),
    ({"chat": chat("a"), "thinking": pb.ThinkingOptions(mode=9)}, "thinking.mode", "DEFAULT (0)"),
    ({"prompt": "a", "sampling": S(temperature=-0.1)}, "sampling.temperature", "0..2"),
    ({"prompt": "a", "sampling": S(temperature=2.5)}, "sampling.temperature", "0..2"),
    ({"prompt": "a", "sampling": S(temperature=float("nan"))}, "sampling.temperature", "0..2"),
    ({"prompt": "a", "sampling": S(temperature=float("inf"))}, "sampling.temperature", "0..2"),
    ({"prompt": "a", "sampling": S(top_p=0)}, "sampling.top_p", "above 0"),
    ({"prompt": "a", "sampling": S(top_p=1.5)}, "sampling.top_p", "at most 1"),
    ({"prompt": "a", "sampling": S(min_p=1)}, "sampling.min_p", "below 1"),
    ({"prompt": "a", "sampling": S(max_tokens=0)}, "sampling.max_tokens", "1..511"),
    ({"prompt": "a", "sampling": S(max_tokens=512)}, "sampling.max_tokens", "1..511"),
    ({"prompt": "a", "sampling": S(max_tokens=5, min_tokens=6)}, "sampling.min_tokens", "0..5"),
    ({"prompt": "a", "sampling": S(presence_penalty=3)}, "sampling.presence_penalty", "-2..2"),
    ({"prompt": "a", "sampling": S(frequency_penalty=-3)}, "sampling.frequency_penalty", "-2..2"),
    ({"prompt": "a", "sampling": S(repetition_penalty=0)}, "sampling.repetition_penalty", "0.01..2"),
    ({"prompt": "a", "sampling": S(repetition_penalty=1e-45)}, "sampling.repetition_penalty", "0.01..2"),
    ({"prompt": "a", "sampling": S(stop_token_ids=[151669])}, "sampling.stop_token_ids[0]", "0..151668"),
    ({"prompt": "a", "sampling": S(stop=["x"] * 17)}, "sampling.stop", "at most 16"),
    ({"prompt": "a", "sampling": S(stop=["x", ""])}, "sampling.stop[1]", "1..256 bytes"),
    ({"prompt": "a", "sampling": S(stop=["é" * 129])}, "sampling.stop[0]", "1..256 bytes"),
    ({"prompt": "a", "sampling": S(logprobs=21)}, "sampling.logprobs", "0..20"),
]


async def test_bad_input_names_field_value_and_range():
    async with gateway(say("x")) as world:
        for fields, field, expected in BAD:
            error = await world.refused(world.generation.Generate(pb.GenerateRequest(**fields)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, fields
            assert error.details().startswith(f"{field}: got "), error.details()
            assert expected in error.details()
            found = tree_error(error)
            assert isinstance(found, InvalidRequest)
            assert found.field == field
        assert world.engine.submitted == []


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"\xff\xff\xff", "GenerateRequest"),
        (b"\x1a\x02\xff\xfe", "GenerateRequest"),  # prompt with invalid UTF-8
        (pb.GenerateRequest(prompt="a").SerializeToString() + b"\xf8\x07\x01", "127: got 'an unknown field'"),
        (b"\x32\x03\xf8\x07\x01", "sampling.127: got 'an unknown field'"),
    ],
)
async def test_malformed_and_unknown_bytes_are_refused_not_ignored(data, part):
    async with gateway(say("x")) as world:
        call = world.channel.unary_stream("/expertmesh.v1.Generation/Generate")(data)
        error = await world.refused(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert part in error.details()


async def test_a_full_queue_is_resource_exhausted_with_a_retry_delay():
    async with gateway(say("x"), max_num_seqs=0) as world:
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = tree_error(error)
        assert isinstance(found, Overloaded)
        assert found.retry_after_s
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        info = error_details_pb2.RetryInfo()
        assert any(d.Unpack(info) for d in status.details)
        assert info.retry_delay.ToNanoseconds() == round(found.retry_after_s * 1e9)


async def test_no_replica_is_unavailable():
    async with gateway(say("x")) as world:
        world.tier.set_replicas({})
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_unknown_requests_are_not_found():
    async with gateway(say("x")) as world:
        for call in (
            world.generation.Cancel(pb.CancelRequest(request_id="nobody")),
            world.generation.Resume(pb.ResumeRequest(request_id="nobody")),
        ):
            assert (await world.refused(call)).code() is grpc.StatusCode.NOT_FOUND


# ---------------------------------------------------------------- ends


async def held(world, **fields):
    """A running stream whose engine stands still after one token."""
    world.engine.allow(1)
    call = world.generation.Generate(pb.GenerateRequest(prompt="a", **fields))
    assert (await call.read()).WhichOneof("event") == "started"
    assert (await call.read()).WhichOneof("event") == "answer"
    return call


async def test_a_dropped_stream_frees_its_work_at_once():
    async with gateway(say("word " * 100)) as world:
        call = await held(world)
        call.cancel()
        assert await asyncio.to_thread(world.engine.wait_idle)
        assert len(world.engine.aborted) == 1


async def test_an_expired_deadline_frees_its_work_and_was_told_to_the_engine():
    async with gateway(say("word " * 100)) as world:
        world.engine.allow(0)
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a"), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await asyncio.to_thread(world.engine.wait_idle)
        assert world.engine.submitted[0].deadline > 0


async def test_streams_cut_at_any_point_leave_nothing_behind():
    random = Random(5)

    async def cut(world, after: int) -> None:
        call = world.generation.Generate(pb.GenerateRequest(prompt="a", sampling=pb.SamplingOptions(max_tokens=400)))
        for _ in range(after):
            await call.read()
        call.cancel()

    async with gateway(say("word " * 400)) as world:  # the books are checked at its end
        await asyncio.gather(*(cut(world, random.randrange(6)) for _ in range(200)))


async def test_cancel_ends_the_stream_with_what_was_said():
    async with gateway(say("word " * 100)) as world:
        call = await held(world, request_id="r1")
        await world.generation.Cancel(pb.CancelRequest(request_id="r1"))
        last = (await rest(call))[-1]
        assert last.finished.reason == pb.FINISH_REASON_CANCELLED
        assert last.finished.usage.completion_tokens == 1
        assert await asyncio.to_thread(world.engine.wait_idle)


async def test_a_running_request_id_is_not_taken_twice_and_cannot_be_resumed_without_a_journal():
    async with gateway(say("word " * 100)) as world:
        call = await held(world, request_id="r1")
        twice = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a", request_id="r1")))
        assert twice.code() is grpc.StatusCode.INVALID_ARGUMENT
        resumed = await world.refused(world.generation.Resume(pb.ResumeRequest(request_id="r1")))
        assert resumed.code() is grpc.StatusCode.NOT_FOUND
        call.cancel()


async def test_draining_says_not_serving_refuses_new_work_and_finishes_the_old():
    async with gateway(say("word " * 20)) as world:
        health = health_pb2_grpc.HealthStub(world.channel)
        check = health_pb2.HealthCheckRequest(service="expertmesh.v1.Generation")
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
        call = await held(world)
        drain = asyncio.create_task(world.server.drain(10))
        watch = health.Watch(health_pb2.HealthCheckRequest())
        async for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        watch.cancel()
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert tree_error(error).retry_after_s
        world.engine.allow(-1)
        assert (await rest(call))[-1].finished.reason == pb.FINISH_REASON_LENGTH
        await drain


# ---------------------------------------------------------------- sessions, cluster, reflection


@pytest.fixture(scope="module")
def redis_url():
    server = EmbeddedRedis()
    yield server.url
    server.stop()


async def test_a_session_continues_and_its_transcript_is_kept(redis_url):
    store = SessionStore(redis_url)
    async with gateway(say(REPLY), sessions=store) as world:
        first = await world.generate(chat=chat("one"), session_id="talk", request_id="t1")
        second = await world.generate(chat=chat("two"), session_id="talk")
        assert [e[-1].finished.session_version for e in (first, second)] == [1, 2]
        assert all(e[-1].finished.committed for e in (first, second))
        prompt = tokenizer().decode(world.engine.submitted[1].prompt_ids, skip_special=False)
        assert prompt == (
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nthe answer 👩‍👧<|im_end|>\n"
            "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )
        session = await world.sessions.Get(pb.GetSessionRequest(session_id="talk"))
        assert session.version == 2
        reply = session.turns[0].messages[1]
        assert (reply.content, reply.reasoning_content) == ("the answer 👩‍👧", "a thought 你")
        assert session.turns[0].request_id == "t1"
        assert (await store.get("talk")).turns[0].output_ids == tokenizer().encode(REPLY)
        assert (await store.get("talk")).affinity == "attention-0"
        listed = await world.sessions.List(pb.ListSessionsRequest())
        assert [s.session_id for s in listed.sessions] == ["talk"]
        await world.sessions.Delete(pb.DeleteSessionRequest(session_id="talk"))
        error = await world.refused(world.sessions.Get(pb.GetSessionRequest(session_id="talk")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
    await store.close()


async def test_of_two_turns_on_one_version_one_is_aborted_with_the_version(redis_url):
    store = SessionStore(redis_url)
    async with gateway(say("x<|im_end|>"), sessions=store) as world:
        world.engine.allow(0)
        calls = [world.generation.Generate(pb.GenerateRequest(chat=chat("a"), session_id="race")) for _ in range(2)]
        for call in calls:
            await call.read()  # started: both have read version 0
        world.engine.allow(-1)
        results = []
        for call in calls:
            try:
                results.append((await rest(call))[-1].finished.session_version)
            except grpc.aio.AioRpcError as error:
                results.append(tree_error(error))
        errors = [r for r in results if not isinstance(r, int)]
        assert [r for r in results if isinstance(r, int)] == [1]
        assert (errors[0].code, errors[0].current_version) == ("ABORTED", 1)
    await store.close()


async def test_a_cancelled_turn_is_not_committed(redis_url):
    store = SessionStore(redis_url)
    async with gateway(say("word " * 100), sessions=store) as world:
        world.engine.allow(1)
        call = world.generation.Generate(pb.GenerateRequest(chat=chat("a"), session_id="cut", request_id="r1"))
        await call.read()
        await world.generation.Cancel(pb.CancelRequest(request_id="r1"))
        last = (await rest(call))[-1].finished
        assert not last.committed
        assert (await store.open("cut")).version == 0
    await store.close()


async def test_without_redis_sessions_are_unavailable_and_the_rest_is_not(tmp_path):
    store = SessionStore(f"unix://{tmp_path}/nobody", timeout_s=0.2)
    async with gateway(say("x"), sessions=store) as world:
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(chat=chat("a"), session_id="s")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert tree_error(error).retry_after_s
        assert text_of(await world.generate(chat=chat("a"))) == "x"
    await store.close()


@pytest.mark.parametrize(
    ("peer", "local"),
    [("ipv4:127.0.0.1:5", True), ("ipv6:[::1]:5", True), ("unix:/x", True), ("ipv4:10.0.0.1:5", False), ("", False)],
)
def test_a_local_caller_is_told_by_its_address(peer, local):
    assert cluster_service.is_local(peer) is local


async def test_topology_shows_members_to_this_host_and_to_holders_of_the_token(monkeypatch):
    async with gateway(say("x"), layout="disaggregated", num_logical_experts=16, num_moe_layers=2) as world:
        ask = pb.GetTopologyRequest()
        assert len((await world.cluster.GetTopology(ask)).members) == 2
        monkeypatch.setattr(cluster_service, "is_local", lambda _peer: False)
        public = await world.cluster.GetTopology(ask)
        assert (public.model, public.epoch, list(public.gateways)) == ("tiny", 3, ["127.0.0.1:50051"])
        assert len(public.members) == 0
        full = await world.cluster.GetTopology(ask, metadata=((TOKEN_KEY, TOKEN),))
        assert [(m.member_id, m.ep_rank, m.pid) for m in full.members] == [("a", -1, 11), ("e", 0, 12)]
        assert (full.layout, full.num_logical_experts, full.num_moe_layers) == ("disaggregated", 16, 2)
        error = await world.refused(world.cluster.GetTopology(ask, metadata=((TOKEN_KEY, "wrong"),)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_reflection_lists_the_services():
    async with gateway(say("x")) as world:
        stub = reflection_pb2_grpc.ServerReflectionStub(world.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        async for answer in call:
            found = {s.name for s in answer.list_services_response.service}
        assert {f"expertmesh.v1.{n}" for n in ("Generation", "Sessions", "Cluster")} <= found
        assert "grpc.health.v1.Health" in found


async def test_a_bug_is_internal_without_a_traceback(monkeypatch):
    async with gateway(say("x")) as world:
        monkeypatch.setattr(world.server.generations, "prepare", None)
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="a")))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details() == "internal error: TypeError"


async def test_a_path_that_is_no_utf8_ends_its_call_alone():
    """grpcio 1.84 and 1.85 end the whole server on it."""
    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/\xff"), (b":authority", b"x")]
    headers += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    async with gateway(say("x")) as world:
        host, port = world.server.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        request = fuzz_http2.frame(fuzz_http2.HEADERS, 5, 1, fuzz_http2.header_block(headers))
        writer.write(fuzz_http2.PREFACE + fuzz_http2.frame(fuzz_http2.SETTINGS, 0, 0) + request)
        async with asyncio.timeout(60):
            received = b""
            while b"grpc-status" not in received:  # its answer
                data = await reader.read(1 << 16)
                assert data, "the server hung up"
                received += data
        writer.close()
        assert text_of(await world.generate(prompt="a")) == "x"
