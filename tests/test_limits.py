"""Promise: what is too much of anything is refused by a status that names field and limit, before it costs anything."""

import grpc
import pytest
from gateway_world import chat, gateway, say
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import InvalidRequest
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.router.gateway import limits
from expertmesh.router.gateway.limits import check_json, check_limits
from expertmesh.router.gateway.rpc_errors import from_rpc

CALL = pb.ToolCall(name="t", arguments_json="{}")
MANY = [
    ({"chat": pb.Chat(messages=[pb.Message(role="user", content="x")] * 4097)}, "chat.messages", "4097 messages"),
    (
        {"chat": pb.Chat(messages=[pb.Message(role="assistant", tool_calls=[CALL] * 257)])},
        "chat.messages[0].tool_calls",
        "257 tool calls",
    ),
    ({"chat": chat("x"), "tools": [pb.Tool(name="t")] * 257}, "tools", "257 tools"),
    ({"chat": chat("x"), "tools": [pb.Tool(name="é" * 129)]}, "tools[0].name", "258 bytes"),
    (
        {"chat": chat("x"), "tools": [pb.Tool(name="t", parameters_json='{"a":' + "[" * 64 + "]" * 64 + "}")]},
        "tools[0].parameters_json",
        "65 levels",
    ),
    (
        {"chat": pb.Chat(messages=[pb.Message(role="assistant", tool_calls=[CALL, pb.ToolCall(name="x" * 257)])])},
        "chat.messages[0].tool_calls[1].name",
        "257 bytes",
    ),
    (
        {"chat": chat("x"), "tools": [pb.Tool(name="t", parameters_json='"' + "a" * limits.MAX_JSON_BYTES)]},
        "tools[0].parameters_json",
        "bytes",
    ),
    (
        {"prompt": "x", "sampling": pb.SamplingOptions(stop_token_ids=[1] * 1025)},
        "sampling.stop_token_ids",
        "1025 ids",
    ),
]


async def test_too_many_or_too_deep_names_field_and_limit():
    async with gateway(say("x")) as world:
        for fields, field, got in MANY:
            error = await world.refused(world.generation.Generate(pb.GenerateRequest(**fields), timeout=30))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith(f"{field}: got "), error.details()
            assert got in error.details()
            assert "at most" in error.details()
        assert world.engine.submitted == []


async def test_a_request_or_metadata_too_large_is_resource_exhausted_and_the_connection_goes_on():
    async with gateway(say("x"), max_request_bytes=1000) as world:
        error = await world.refused(world.generation.Generate(pb.GenerateRequest(prompt="x" * 1001), timeout=30))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1000" in error.details()
        for metadata in ([("x-large", "v" * limits.MAX_METADATA_BYTES)], [("x-many", "v" * 2000)] * 9):
            call = world.generation.Generate(pb.GenerateRequest(prompt="x"), timeout=30, metadata=metadata)
            error = await world.refused(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
            assert f"{limits.MAX_METADATA_BYTES}" in error.details()
        assert await world.generate(prompt="x")


async def test_a_long_message_is_cut_and_arrives():
    names = [pb.Tool(name=f"{i:03}" + "é" * 50) for i in range(200)]
    async with gateway(say("x")) as world:
        choice = pb.ToolChoice(mode=pb.ToolChoice.NAMED, name="other")
        request = pb.GenerateRequest(chat=chat("x"), tools=names, tool_choice=choice)
        error = await world.refused(world.generation.Generate(request, timeout=30))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("tool_choice.name: got 'other'")
        assert error.details().endswith("...")
        found = from_rpc(error.code(), error.details(), tuple(error.trailing_metadata() or ()))
        assert isinstance(found, InvalidRequest)
        assert found.field == "tool_choice.name"


def nested(kinds: list[str]) -> str:
    text = "1"
    for kind in kinds:
        text = f"[{text}]" if kind == "list" else f'{{"]}}\\"[{{": {text}}}'
    return text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["list", "object"]), max_size=2 * limits.MAX_JSON_DEPTH))
def test_depth_is_counted_outside_of_strings(kinds: list[str]):
    if len(kinds) <= limits.MAX_JSON_DEPTH:
        check_json("f", nested(kinds))
        return
    with pytest.raises(InvalidRequest, match=f"{len(kinds)} levels deep"):
        check_json("f", nested(kinds))


@pytest.mark.parametrize("text", ['"' + '\\"' * 100_000, '"\\' * 100_000, "]" * 200_000, "\\" * 200_000])
def test_text_that_is_no_json_is_left_to_the_parser_in_linear_time(text: str):
    check_json("f", text)


def test_what_a_large_agent_sends_is_within_the_limits():
    schema = '{"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, 2]}}}}'
    messages = [pb.Message(role="user", content="word " * 1000)] * 1000
    tools = [pb.Tool(name=f"tool_{i}", parameters_json=schema) for i in range(128)]
    check_limits(pb.GenerateRequest(chat=pb.Chat(messages=messages), tools=tools))
