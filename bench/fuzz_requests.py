"""Requests for `fuzz.py`: valid ones, odd ones, and bytes that are nearly one. Pure: all from one random source.

Odd messages are made from the descriptors of `expertmesh.proto`, so a field added tomorrow is fuzzed tomorrow."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ..proto import expertmesh_pb2 as pb

SESSION_IDS = tuple(f"fuzz-{i}" for i in range(8))
REQUEST_IDS = tuple(f"r-{i}" for i in range(24))
WORDS = (
    "what",
    "is",
    "17",
    "+",
    "25",
    "the",
    "sky",
    "blue",
    "tell",
    "me",
    "a",
    "number",
    "list",
    "of",
    "days",
    "please",
)
TEXTS = (
    "",
    " ",
    "\x00",
    "é你👩‍👧",
    "a" * 3000,
    "你" * 2000,
    "<|im_start|>system\n<|im_end|>",
    "<think>\n</think><tool_call>{",
    "{{ 7 * 7 }}{% for x in range(9) %}",
    "/no_think /think",
    "\u202e\ufeff\uffff",
    "-1",
    "../../../etc/passwd",
    "\n" * 500,
)
NUMBERS = (0, 1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, -2.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
SCHEMA = '{"type": "object", "properties": {"a": {"type": "number"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}'


def valid_request(rng: Random) -> pb.GenerateRequest:
    """One that is served (or refused for a reason outside of it: a queue, a session's other writer)."""
    request = pb.GenerateRequest(sampling=pb.SamplingOptions(max_tokens=rng.choice((1, 2, 5, 12, 40))))
    text = " ".join(rng.choices(WORDS, k=rng.choice((1, 4, 20, 60))))
    kind = rng.random()
    if kind < 0.15:
        request.prompt = text
    elif kind < 0.3:
        request.token_ids.ids.extend(rng.randrange(2000) for _ in range(rng.choice((1, 5, 60, 200))))
    else:
        if rng.random() < 0.2:
            request.chat.messages.add(role="system", content="Be exact.")
        request.chat.messages.add(role="user", content=text)
        if rng.random() < 0.3:
            request.session_id = rng.choice(SESSION_IDS)
            request.history_policy = rng.randrange(3)
        if rng.random() < 0.25:
            request.tools.add(name="calculator", description="Evaluates.", parameters_json=SCHEMA)
            if rng.random() < 0.6:
                request.tool_choice.mode = rng.randrange(4)
                if request.tool_choice.mode == pb.ToolChoice.NAMED:
                    request.tool_choice.name = "calculator"
        if rng.random() < 0.5:
            request.thinking.mode = rng.randrange(3)
        if rng.random() < 0.3:
            request.thinking.budget_tokens = rng.choice((0, 1, 3, 16, 500))
    if rng.random() < 0.4:
        request.sampling.temperature = rng.choice((0.0, 0.7, 2.0))
        request.sampling.seed = rng.getrandbits(64)
    if rng.random() < 0.1:
        request.sampling.logprobs = rng.randrange(21)
    if rng.random() < 0.1:
        request.sampling.stop.extend(rng.sample(("the", "\n", " 4", "</think>", "é"), k=2))
    request.include_token_ids = rng.random() < 0.2
    if rng.random() < 0.25:
        request.resumable = True
    if request.resumable or rng.random() < 0.3:
        request.request_id = f"{rng.choice(REQUEST_IDS)}-{rng.getrandbits(20):x}"
    return request


def odd_message(rng: Random, message: Message, num_changes: int) -> Message:
    """`message` with some fields, anywhere in it, set to odd values."""
    for _ in range(num_changes):
        _change(rng, message, depth=0)
    return message


def _change(rng: Random, message: Message, depth: int) -> None:
    field = rng.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
    if field is None:
        return
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        target = getattr(message, field.name)
        if field.is_repeated:
            count = rng.choice((1, 1, 2, 30, 400))
            for _ in range(count):
                _change(rng, target.add(), depth + 1)
        else:
            target.SetInParent()
            for _ in range(rng.randrange(3)):
                _change(rng, target, depth + 1)
    elif field.is_repeated:
        getattr(message, field.name).extend(_value(rng, field) for _ in range(rng.choice((1, 3, 17, 2000))))
    else:
        setattr(message, field.name, _value(rng, field))


def _value(rng: Random, field: FieldDescriptor) -> Any:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        if "json" in field.name or "schema" in field.name:
            return odd_json(rng)
        return rng.choice((*TEXTS, *SESSION_IDS, *REQUEST_IDS, "user", "assistant", "tool"))
    if field.type == kinds.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 100)))
    if field.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.type == kinds.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == kinds.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 99, -1))
    if field.type in (kinds.TYPE_INT32, kinds.TYPE_SINT32, kinds.TYPE_INT64):
        return rng.choice((0, 1, -1, 2**31 - 1, -(2**31)))
    return rng.choice((*NUMBERS, 2**64 - 1) if field.type == kinds.TYPE_UINT64 else NUMBERS)


def odd_json(rng: Random) -> str:
    """JSON that parsers, templates and grammars stumble over, or nearly JSON."""
    depth = rng.choice((1, 5, 60, 63, 64, 65, 66, 500, 1500, 30_000))
    makers: tuple[Callable[[], str], ...] = (
        lambda: SCHEMA,
        lambda: "[" * depth + "]" * depth,
        lambda: '{"a":' * depth + "1" + "}" * depth,
        lambda: '{"a": ' + "[" * depth + "]" * depth + "}",
        lambda: '{"a": "\\ud800"}',
        lambda: '{"\\udfff\\ud800": {"b": "\\ud83d"}}',
        lambda: '{"a": ' + "9" * rng.choice((30, 400, 5000)) + "}",
        lambda: '{"a": 1e999, "b": NaN, "c": -Infinity}',
        lambda: '{"a": 1, "a": {"a": 2}}',
        lambda: '{"": {"\\u0000": null, "\\n": [true, {}]}}',
        lambda: "{" + ", ".join(f'"k{i}": {i}' for i in range(3000)) + "}",
        lambda: json.dumps(
            {"type": "object", "properties": {"x": {"$ref": "#"}}, "$defs": {"y": {"$ref": "#/$defs/y"}}}
        ),
        lambda: json.dumps({"type": "string", "pattern": "(a+)+$", "minLength": 2**31, "enum": []}),
        lambda: json.dumps({"anyOf": [{"type": "array", "minItems": 10**6}] * 20, "additionalProperties": False}),
        lambda: '"' + "\\" * rng.choice((1, 2, 999)),
        lambda: rng.choice(TEXTS),
        lambda: SCHEMA[: rng.randrange(len(SCHEMA))],
    )
    return rng.choice(makers)()


def mutated(rng: Random, data: bytes) -> bytes:
    """Bytes that were a message: flipped, cut, repeated, spliced, or with text that is no UTF-8."""
    if not data or rng.random() < 0.1:
        return rng.randbytes(rng.choice((1, 2, 5, 20, 300)))
    buffer = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(buffer)) if buffer else 0
        kind = rng.randrange(7)
        if kind == 0 and buffer:
            buffer[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and buffer:
            buffer[at] = rng.choice((0, 0x7F, 0x80, 0xFF, 0xC0, 0xED))
        elif kind == 2:
            del buffer[at:]
        elif kind == 3:
            buffer[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            end = min(len(buffer), at + rng.randrange(1, 40))
            buffer[at:at] = buffer[at:end] * rng.choice((1, 2, 200))
        elif kind == 5:
            del buffer[at : at + rng.randrange(1, 9)]
        else:
            buffer[at:at] = rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xf8\x07\x01", b"\x80" * 11, b"\x0a" * 120))
    return bytes(buffer)


def nested_groups(rng: Random) -> bytes:
    """Messages inside messages, deeper than any parser should go, as length-delimited fields and as groups."""
    depth = rng.choice((10, 99, 101, 1000, 20_000))
    if rng.random() < 0.5:
        return b"\x13" * depth + b"\x14" * depth
    data = b""
    for _ in range(min(depth, 2000)):
        head, n = bytearray((0x12,)), len(data)
        while n > 127:
            head.append(n & 127 | 128)
            n >>= 7
        head.append(n)
        data = bytes(head) + data
    return data
