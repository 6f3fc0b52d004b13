"""How large a request may be, in every dimension that costs us something: counts, bytes of JSON, nesting. Pure.

The transport bounds bytes (`max_request_bytes`, `MAX_METADATA_BYTES`: RESOURCE_EXHAUSTED by gRPC itself); what is small
in bytes and dear all the same is bounded here, as an InvalidRequest that names field and limit. JSON is bounded before
it is parsed: nesting costs stack, in our parser as in the template and the grammar compiler that get the value."""

import re
from collections.abc import Sequence
from typing import Any

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb

MAX_METADATA_BYTES = 16 << 10  # of all headers of one call together, 32 bytes each for gRPC's books included
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_TOOL_CALLS = 256  # of one message
MAX_NAME_BYTES = 256  # of a tool
MAX_STOP_TOKEN_IDS = 1024
MAX_JSON_BYTES = 256 << 10
MAX_JSON_DEPTH = 64
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def check_limits(request: pb.GenerateRequest) -> None:
    """InvalidRequest for the first thing of which there is too much."""
    _check_count("chat.messages", request.chat.messages, MAX_MESSAGES, "messages")
    for i, message in enumerate(request.chat.messages):
        path = f"chat.messages[{i}].tool_calls"
        _check_count(path, message.tool_calls, MAX_TOOL_CALLS, "tool calls")
        for j, call in enumerate(message.tool_calls):
            _check_bytes(f"{path}[{j}].name", call.name, MAX_NAME_BYTES)
            check_json(f"{path}[{j}].arguments_json", call.arguments_json)
    _check_count("tools", request.tools, MAX_TOOLS, "tools")
    for i, tool in enumerate(request.tools):
        _check_bytes(f"tools[{i}].name", tool.name, MAX_NAME_BYTES)
        check_json(f"tools[{i}].parameters_json", tool.parameters_json)
    _check_count("sampling.stop_token_ids", request.sampling.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")


def check_json(field: str, text: str) -> None:
    """JSON text that is short and flat enough to be parsed."""
    _check_bytes(field, text, MAX_JSON_BYTES)
    deepest = depth = 0
    for found in _BRACKETS.finditer(text):
        first = found[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    if deepest > MAX_JSON_DEPTH:
        raise InvalidRequest(field, f"JSON {deepest} levels deep", f"at most {MAX_JSON_DEPTH} levels")


def _check_count(field: str, values: Sequence[Any], most: int, noun: str) -> None:
    if len(values) > most:
        raise InvalidRequest(field, f"{len(values)} {noun}", f"at most {most}")


def _check_bytes(field: str, text: str, most: int) -> None:
    size = len(text.encode())
    if size > most:
        raise InvalidRequest(field, f"{size} bytes", f"at most {most} bytes")
