"""A request from plain values: what may be asked of a generation, with its types, and the message that it becomes."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb

Messages = str | Sequence[Mapping[str, Any]]
"""A user's text, or a list of {"role", "content", ...} as the OpenAI API has them."""

_SAMPLING = frozenset(pb.SamplingOptions.DESCRIPTOR.fields_by_name)
_MODES = {None: pb.ThinkingOptions.DEFAULT, "on": pb.ThinkingOptions.ON, "off": pb.ThinkingOptions.OFF}
_HISTORY = {
    None: pb.HISTORY_POLICY_UNSPECIFIED,
    "drop": pb.HISTORY_POLICY_DROP_THINKING,
    "keep": pb.HISTORY_POLICY_KEEP_THINKING,
}
_CHOICES = {"auto": pb.ToolChoice.AUTO, "none": pb.ToolChoice.NONE, "required": pb.ToolChoice.REQUIRED}


class Sampling(TypedDict, total=False):
    """Fields of SamplingOptions; what is unset or None is the checkpoint's."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    stop_token_ids: Sequence[int]
    stop: str | Sequence[str]
    ignore_eos: bool
    logprobs: int | None


class RequestOptions(Sampling, total=False):
    prompt: str  # instead of messages: no template
    token_ids: Sequence[int]  # instead of messages: encoded already
    session_id: str
    request_id: str  # default: a random one
    thinking: Literal["on", "off"] | None  # None: the session's mode, else the model's own
    thinking_budget: int | None  # tokens, exact
    include_token_ids: bool
    resumable: bool
    history: Literal["drop", "keep"] | None  # whether a session's later prompts keep old thinking
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | None  # auto, none, required, or a tool's name
    json_schema: str | Mapping[str, Any]  # what the answer must be; one of these three
    regex: str
    choice: Sequence[str]


class GenerateOptions(RequestOptions, total=False):
    timeout_s: float | None  # for the whole stream, resumed or not


def make_request(messages: Messages = "", **options: Unpack[RequestOptions]) -> pb.GenerateRequest:
    """`messages`, or else `prompt` or `token_ids`. InvalidRequest: an unknown option or a value of a wrong type;
    ranges are the gateway's to check."""
    unknown = sorted(set(options) - RequestOptions.__annotations__.keys())
    if unknown:
        known = sorted(RequestOptions.__annotations__)
        raise InvalidRequest(unknown[0], options[unknown[0]], f"one of {', '.join(known)}")  # type: ignore[literal-required]
    thinking, history, tool_choice = options.get("thinking"), options.get("history"), options.get("tool_choice")
    if thinking not in _MODES:
        raise InvalidRequest("thinking", thinking, "'on', 'off' or None")
    if history not in _HISTORY:
        raise InvalidRequest("history", history, "'drop', 'keep' or None")
    try:
        request = pb.GenerateRequest(
            request_id=options.get("request_id") or f"r-{secrets.token_hex(8)}",
            prompt=options.get("prompt"),
            session_id=options.get("session_id"),
            include_token_ids=options.get("include_token_ids"),
            resumable=options.get("resumable"),
            history_policy=_HISTORY[history],
            sampling=_encode_sampling(options),
            thinking=pb.ThinkingOptions(mode=_MODES[thinking], budget_tokens=options.get("thinking_budget")),
            tools=[_encode_tool(tool) for tool in options.get("tools") or ()],
        )
        if messages:
            request.chat.CopyFrom(pb.Chat(messages=_encode_messages(messages)))
        if tool_choice is not None:
            mode = _CHOICES.get(tool_choice, pb.ToolChoice.NAMED)
            name = tool_choice if mode == pb.ToolChoice.NAMED else ""
            request.tool_choice.CopyFrom(pb.ToolChoice(mode=mode, name=name))
        if token_ids := options.get("token_ids"):
            request.token_ids.ids.extend(token_ids)
        if (response_format := _encode_format(options)) is not None:
            request.response_format.CopyFrom(response_format)
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", str(error), "values of the types in expertmesh.proto") from None
    return request


def _encode_format(options: Mapping[str, Any]) -> pb.ResponseFormat | None:
    given = [name for name in ("json_schema", "regex", "choice") if options.get(name) is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1], options[given[1]], f"unset beside {given[0]}")
    match given:
        case ["json_schema"]:
            return pb.ResponseFormat(json_schema=_as_json(options["json_schema"]))
        case ["regex"]:
            return pb.ResponseFormat(regex=options["regex"])
        case ["choice"]:
            return pb.ResponseFormat(choice=pb.Choices(values=options["choice"]))
    return None


def _encode_sampling(options: Mapping[str, Any]) -> pb.SamplingOptions:
    values = {k: v for k, v in options.items() if k in _SAMPLING and v is not None}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    return pb.SamplingOptions(**values)


def _encode_messages(messages: Messages) -> list[pb.Message]:
    if isinstance(messages, str):
        return [pb.Message(role="user", content=messages)]
    return [
        pb.Message(
            role=m["role"],
            content=m.get("content") or "",
            reasoning_content=m.get("reasoning_content") or "",
            tool_calls=[
                pb.ToolCall(name=c["name"], arguments_json=_as_json(c.get("arguments", {})))
                for c in m.get("tool_calls") or ()
            ],
        )
        for m in messages
    ]


def _encode_tool(tool: Mapping[str, Any]) -> pb.Tool:
    """Accepts {"name", "description", "parameters"} bare or inside {"type": "function", "function": ...}."""
    function = tool.get("function", tool)
    parameters = function.get("parameters")
    return pb.Tool(
        name=function["name"],
        description=function.get("description", ""),
        parameters_json="" if parameters is None else _as_json(parameters),
    )


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
