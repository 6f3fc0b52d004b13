"""What a client sent, checked: every mistake is an InvalidRequest that names field, value and range. Pure.

Unknown fields are mistakes too: a newer client that asks for something must not be served as if it had not."""

import json
import re
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb
from ...request import SamplingParams
from .tokenizer import GenerationDefaults

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME_FORM = "1 to 64 characters of A-Z a-z 0-9 _ -"
ROLES = ("system", "user", "assistant", "tool")
MAX_STOPS, MAX_STOP_BYTES, MAX_LOGPROBS = 16, 256, 20


def parse(message_class: Any, data: bytes) -> Any:
    """Bytes to message; malformed protobuf, invalid UTF-8 and unknown fields are the client's mistakes."""
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("request", f"{len(data)} bytes", f"a {message.DESCRIPTOR.name}: {error}") from None
    _check_unknown(message, "")
    return message


def _check_unknown(message: Message, path: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        name = message.DESCRIPTOR.name
        raise InvalidRequest(f"{path}{unknown[0].field_number}", "an unknown field", f"only the fields of {name}")
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.is_repeated:
            for i, item in enumerate(value):
                _check_unknown(item, f"{path}{field.name}[{i}].")
        else:
            _check_unknown(value, f"{path}{field.name}.")


def check_name(field: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise InvalidRequest(field, value, NAME_FORM)
    return value


def check_input(request: pb.GenerateRequest) -> None:
    """Exactly one of chat, prompt and token_ids, and what goes with it."""
    given = [f for f in ("chat", "token_ids") if request.HasField(f)] + (["prompt"] if request.prompt else [])
    if len(given) != 1:
        raise InvalidRequest("chat, prompt, token_ids", given or "none of them", "exactly one input that is not empty")
    if request.request_id:
        check_name("request_id", request.request_id)
    if request.session_id:
        check_name("session_id", request.session_id)
        if given != ["chat"]:
            raise InvalidRequest("session_id", request.session_id, f"unset with {given[0]}: sessions hold chats")
    if request.tools and given != ["chat"]:
        raise InvalidRequest(
            "tools", f"{len(request.tools)} tools", f"none with {given[0]}: they go into a chat template"
        )
    if request.HasField("tool_choice") and not request.tools:
        raise InvalidRequest("tool_choice", "set", "unset without tools")
    if request.history_policy:
        if request.history_policy not in pb.HistoryPolicy.values():
            raise InvalidRequest("history_policy", request.history_policy, "DROP_THINKING (1) or KEEP_THINKING (2)")
        if not request.session_id:
            raise InvalidRequest("history_policy", request.history_policy, "unset without session_id")
    mode = request.thinking.mode
    if mode not in pb.ThinkingOptions.Mode.values():
        raise InvalidRequest("thinking.mode", mode, "DEFAULT (0), ON (1) or OFF (2)")
    if mode and given != ["chat"]:
        name = pb.ThinkingOptions.Mode.Name(mode)
        raise InvalidRequest("thinking.mode", name, f"DEFAULT with {given[0]}: the mode goes into a chat template")


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise InvalidRequest(field, [], "at least one token id")
    if max(ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(ids) if token_id >= vocab_size)
        raise InvalidRequest(f"{field}[{index}]", ids[index], f"0..{vocab_size - 1}, the ids of the vocabulary")


def chat_messages(chat: pb.Chat) -> list[dict[str, Any]]:
    """The messages as dictionaries for the template and the session record."""
    if not chat.messages:
        raise InvalidRequest("chat.messages", [], "at least one message")
    return [_message(f"chat.messages[{i}]", m) for i, m in enumerate(chat.messages)]


def _message(path: str, message: pb.Message) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidRequest(f"{path}.role", message.role, f"one of {', '.join(ROLES)}")
    if message.role == "user" and not message.content:
        raise InvalidRequest(f"{path}.content", "", "text")
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role != "assistant":
        for field in ("reasoning_content", "tool_calls"):
            if getattr(message, field):
                raise InvalidRequest(f"{path}.{field}", "set", f"unset for role {message.role}: assistant only")
        return found
    if message.reasoning_content:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [_tool_call(f"{path}.tool_calls[{i}]", c) for i, c in enumerate(message.tool_calls)]
    return found


def _tool_call(path: str, call: pb.ToolCall) -> dict[str, Any]:
    if not call.name:
        raise InvalidRequest(f"{path}.name", "", "the name of a tool")
    return {"name": call.name, "arguments": _json_object(f"{path}.arguments_json", call.arguments_json or "{}")}


def tool_definitions(tools: Sequence[pb.Tool], choice: pb.ToolChoice) -> list[dict[str, Any]]:
    """Tools in the form that Hugging Face templates take; none where the choice is NONE."""
    found = []
    if choice.mode not in pb.ToolChoice.Mode.values():
        raise InvalidRequest("tool_choice.mode", choice.mode, "AUTO (0), NONE (1), REQUIRED (2) or NAMED (3)")
    if choice.mode == pb.ToolChoice.NAMED and choice.name not in {tool.name for tool in tools}:
        raise InvalidRequest("tool_choice.name", choice.name, f"one of {[tool.name for tool in tools]}")
    if choice.name and choice.mode != pb.ToolChoice.NAMED:
        raise InvalidRequest("tool_choice.name", choice.name, "unset unless the mode is NAMED")
    for i, tool in enumerate(tools):
        if not tool.name:
            raise InvalidRequest(f"tools[{i}].name", "", "a name")
        function: dict[str, Any] = {"name": tool.name, "description": tool.description}
        if tool.parameters_json:
            function["parameters"] = _json_object(f"tools[{i}].parameters_json", tool.parameters_json)
        found.append({"type": "function", "function": function})
    return [] if choice.mode == pb.ToolChoice.NONE else found


def _json_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(field, text, "a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidRequest(field, text, "a JSON object")
    return value


def sampling_params(
    options: pb.SamplingOptions,
    defaults: GenerationDefaults,
    *,
    eos: frozenset[int],
    vocab_size: int,
    room: int,
    seed: int,
) -> SamplingParams:
    """Options over the checkpoint's defaults. `room` tokens fit behind the prompt; `seed` is the default seed."""

    def number(name: str, default: float, ok: str, low: float, high: float, *, open_: str = "") -> float:
        value = getattr(options, name) if options.HasField(name) else default
        if not low <= value <= high or (value == low and "(" in open_) or (value == high and ")" in open_):  # NaN too
            raise InvalidRequest(f"sampling.{name}", value, ok)
        return float(value)

    max_tokens = options.max_tokens if options.HasField("max_tokens") else room
    if not 1 <= max_tokens <= room:
        raise InvalidRequest("sampling.max_tokens", max_tokens, f"1..{room}, what the context leaves behind the prompt")
    min_tokens = options.min_tokens if options.HasField("min_tokens") else 0
    if min_tokens > max_tokens:
        raise InvalidRequest("sampling.min_tokens", min_tokens, f"0..{max_tokens}, at most max_tokens")
    if options.stop_token_ids:
        check_token_ids("sampling.stop_token_ids", options.stop_token_ids, vocab_size)
    if options.HasField("logprobs") and options.logprobs > MAX_LOGPROBS:
        raise InvalidRequest("sampling.logprobs", options.logprobs, f"0..{MAX_LOGPROBS}")
    return SamplingParams(
        temperature=number("temperature", defaults.temperature, "0..2, 0 is greedy", 0, 2),
        top_p=number("top_p", defaults.top_p, "above 0, at most 1", 0, 1, open_="("),
        top_k=min(options.top_k if options.HasField("top_k") else defaults.top_k, vocab_size),
        min_p=number("min_p", defaults.min_p, "0 or more, below 1", 0, 1, open_=")"),
        seed=options.seed if options.HasField("seed") else seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        presence_penalty=number("presence_penalty", 0.0, "-2..2", -2, 2),
        frequency_penalty=number("frequency_penalty", 0.0, "-2..2", -2, 2),
        repetition_penalty=number("repetition_penalty", defaults.repetition_penalty, "0.01..2", 0.01, 2),  # a divisor
        stop_token_ids=frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else eos),
        num_logprobs=options.logprobs if options.HasField("logprobs") else -1,
    )


def stop_strings(options: pb.SamplingOptions) -> tuple[str, ...]:
    if len(options.stop) > MAX_STOPS:
        raise InvalidRequest("sampling.stop", f"{len(options.stop)} strings", f"at most {MAX_STOPS}")
    for i, stop in enumerate(options.stop):
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidRequest(f"sampling.stop[{i}]", stop, f"1..{MAX_STOP_BYTES} bytes")
    return tuple(options.stop)
