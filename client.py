"""The client of an expertmesh cluster: typed events, sessions, cancel on close, another gateway when one is away.

    with Client(["127.0.0.1:50051"]) as client:
        for event in client.generate("Why is the sky blue?"):
            if isinstance(event, AnswerDelta):
                print(event.text, end="")
        talk = client.session("holiday-plans")
        print(talk.send("Where is it warm in March?").answer())

`AsyncClient` is the same with `async for` and `await`. Every failure is an error of `expertmesh.errors` with its facts.
A request moves to the next gateway of the list as long as no event came. A stream that broke later is resumed, at
whichever gateway answers, if it was asked to be `resumable=True`: its events go on without a gap or a repetition. Else
it is an error, as nobody knows what was said last. Leaving the loop, or `close()`, cancels the work; that of a
resumable stream goes on for a grace, unless `cancel` ends it."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import grpc
import grpc.aio

from .errors import ExpertMeshError, InvalidRequest, NotFound, Unavailable
from .proto import expertmesh_pb2 as pb
from .proto import expertmesh_pb2_grpc as pb_grpc
from .request import FinishReason
from .router.gateway.link import TOKEN_KEY
from .router.gateway.rpc_errors import from_rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_RESUMES = 40  # failed calls in a row, over all gateways; about half a minute
_OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.max_reconnect_backoff_ms", 1000))
_SAMPLING = frozenset(pb.SamplingOptions.DESCRIPTOR.fields_by_name)
_MODES = {None: pb.ThinkingOptions.DEFAULT, "on": pb.ThinkingOptions.ON, "off": pb.ThinkingOptions.OFF}
_HISTORY = {
    None: pb.HISTORY_POLICY_UNSPECIFIED,
    "drop": pb.HISTORY_POLICY_DROP_THINKING,
    "keep": pb.HISTORY_POLICY_KEEP_THINKING,
}
_CHOICES = {"auto": pb.ToolChoice.AUTO, "none": pb.ToolChoice.NONE, "required": pb.ToolChoice.REQUIRED}

Messages = str | Sequence[Mapping[str, Any]]


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Started:
    offset: int
    request_id: str
    session_id: str
    model: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    offset: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    offset: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    offset: int
    index: int
    name: str
    arguments_text: str
    malformed: bool
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    offset: int
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    committed: bool
    session_version: int
    queue_s: float
    time_to_first_token_s: float
    time_to_first_answer_token_s: float
    total_s: float
    stop_matched: str


Event = Started | ReasoningDelta | AnswerDelta | ToolCallDelta | Finished


# ---------------------------------------------------------------- blocking


class Client:
    """Blocking client over one or more gateways. Thread-safe."""

    def __init__(
        self, addresses: str | Sequence[str] = DEFAULT_ADDRESS, *, api_key: str = "", cluster_token: str = ""
    ) -> None:
        self.gateways = Gateways(addresses, grpc.insecure_channel, cluster_token, api_key)

    def generate(self, messages: Messages = "", **options: Any) -> "Stream":
        """Start one generation; iterate for events. `messages`: a user's text, or a list of {"role", "content", ...};
        the options are those of `make_request` and `timeout_s`."""
        timeout_s = options.pop("timeout_s", None)
        return Stream(self.gateways, make_request(messages, **options), timeout_s)

    def session(self, session_id: str = "") -> "Session":
        """A conversation kept by the cluster; a new one where no id is given."""
        return Session(self, session_id or f"s-{secrets.token_hex(8)}")

    def cancel(self, request_id: str) -> None:
        """End a running request, whichever gateway of the list has it."""
        for attempt in range(len(self.gateways.addresses)):
            failed = self.gateways.favourite
            try:
                self.call("Generation", "Cancel", pb.CancelRequest(request_id=request_id))
                return
            except NotFound:
                if attempt + 1 == len(self.gateways.addresses):
                    raise
                self.gateways.turn(failed)

    def get_session(self, session_id: str) -> pb.Session:
        found: pb.Session = self.call("Sessions", "Get", pb.GetSessionRequest(session_id=session_id))
        return found

    def list_sessions(self) -> Iterator[pb.Session]:
        """All sessions, without turns, page by page."""
        token = ""
        while True:
            page = self.call("Sessions", "List", pb.ListSessionsRequest(page_token=token))
            yield from page.sessions
            token = page.next_page_token
            if not token:
                return

    def delete_session(self, session_id: str) -> None:
        self.call("Sessions", "Delete", pb.DeleteSessionRequest(session_id=session_id))

    def fork_session(self, session_id: str, new_session_id: str, *, at_version: int = 0) -> pb.Session:
        """A new session that begins with the first `at_version` turns (0 = all) of another one."""
        request = pb.ForkSessionRequest(session_id=session_id, new_session_id=new_session_id, at_version=at_version)
        found: pb.Session = self.call("Sessions", "Fork", request)
        return found

    def export_session(self, session_id: str) -> pb.SessionExport:
        found: pb.SessionExport = self.call("Sessions", "Export", pb.ExportSessionRequest(session_id=session_id))
        return found

    def topology(self, *, timeout_s: float = 5.0) -> pb.Topology:
        found: pb.Topology = self.call("Cluster", "GetTopology", pb.GetTopologyRequest(), timeout_s=timeout_s)
        return found

    def close(self) -> None:
        for channel in self.gateways.take_channels():
            channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.close()

    def call(self, service: str, method: str, request: Any, *, timeout_s: float | None = 30.0) -> Any:
        """One unary call at the first gateway that can be reached."""
        attempt = 0
        while True:
            failed = self.gateways.favourite
            try:
                metadata = self.gateways.metadata(service)
                return getattr(self.gateways.stub(service), method)(request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                found = _error_of(error)
                if not self.gateways.move_on(found, attempt, failed):
                    raise found from None
                attempt += 1


class Stream(Iterator[Event]):
    """Events of one generation. `answer()` reads to the end; `close()` cancels."""

    def __init__(self, gateways: "Gateways", request: pb.GenerateRequest, timeout_s: float | None) -> None:
        self.finished: Finished | None = None
        self._route = _Route(gateways, request)
        self._request, self._timeout_s = request, timeout_s
        self._call: Any = self._route.open(timeout_s)

    @property
    def request_id(self) -> str:
        return self._request.request_id

    def __next__(self) -> Event:
        while True:
            try:
                event = decode_event(next(self._call))
            except grpc.RpcError as error:
                found = _error_of(error)
                pause_s = self._route.after(found)
                if pause_s is None:
                    raise found from None
                time.sleep(pause_s)
                self._call = self._route.open(self._timeout_s)
                continue
            self._route.came(event)
            if isinstance(event, Finished):
                self.finished = event
            return event

    def answer(self) -> str:
        """The whole answer's text; `finished` then has usage and times."""
        return "".join(e.text for e in self if isinstance(e, AnswerDelta))

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call") and self.finished is None:
            self._call.cancel()  # a loop that was left early


class Session:
    """One conversation: `send` continues it, the cluster remembers it."""

    def __init__(self, client: Client, session_id: str) -> None:
        self._client, self.session_id = client, session_id

    def send(self, messages: Messages, **options: Any) -> Stream:
        return self._client.generate(messages, session_id=self.session_id, **options)

    def record(self) -> pb.Session:
        return self._client.get_session(self.session_id)

    def delete(self) -> None:
        self._client.delete_session(self.session_id)


# ---------------------------------------------------------------- asyncio


class AsyncClient:
    """The same over grpc.aio; use it inside one event loop."""

    def __init__(
        self, addresses: str | Sequence[str] = DEFAULT_ADDRESS, *, api_key: str = "", cluster_token: str = ""
    ) -> None:
        self.gateways = Gateways(addresses, grpc.aio.insecure_channel, cluster_token, api_key)

    def generate(self, messages: Messages = "", **options: Any) -> "AsyncStream":
        """As `Client.generate`; iterate with `async for`."""
        timeout_s = options.pop("timeout_s", None)
        return AsyncStream(self.gateways, make_request(messages, **options), timeout_s)

    def session(self, session_id: str = "") -> "AsyncSession":
        return AsyncSession(self, session_id or f"s-{secrets.token_hex(8)}")

    async def cancel(self, request_id: str) -> None:
        """End a running request, whichever gateway of the list has it."""
        for attempt in range(len(self.gateways.addresses)):
            failed = self.gateways.favourite
            try:
                await self.call("Generation", "Cancel", pb.CancelRequest(request_id=request_id))
                return
            except NotFound:
                if attempt + 1 == len(self.gateways.addresses):
                    raise
                self.gateways.turn(failed)

    async def get_session(self, session_id: str) -> pb.Session:
        found: pb.Session = await self.call("Sessions", "Get", pb.GetSessionRequest(session_id=session_id))
        return found

    async def list_sessions(self) -> AsyncIterator[pb.Session]:
        token = ""
        while True:
            page = await self.call("Sessions", "List", pb.ListSessionsRequest(page_token=token))
            for session in page.sessions:
                yield session
            token = page.next_page_token
            if not token:
                return

    async def delete_session(self, session_id: str) -> None:
        await self.call("Sessions", "Delete", pb.DeleteSessionRequest(session_id=session_id))

    async def fork_session(self, session_id: str, new_session_id: str, *, at_version: int = 0) -> pb.Session:
        request = pb.ForkSessionRequest(session_id=session_id, new_session_id=new_session_id, at_version=at_version)
        found: pb.Session = await self.call("Sessions", "Fork", request)
        return found

    async def export_session(self, session_id: str) -> pb.SessionExport:
        found: pb.SessionExport = await self.call("Sessions", "Export", pb.ExportSessionRequest(session_id=session_id))
        return found

    async def topology(self, *, timeout_s: float = 5.0) -> pb.Topology:
        found: pb.Topology = await self.call("Cluster", "GetTopology", pb.GetTopologyRequest(), timeout_s=timeout_s)
        return found

    async def close(self) -> None:
        for channel in self.gateways.take_channels():
            await channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.close()

    async def call(self, service: str, method: str, request: Any, *, timeout_s: float | None = 30.0) -> Any:
        attempt = 0
        while True:
            failed = self.gateways.favourite
            try:
                metadata = self.gateways.metadata(service)
                return await getattr(self.gateways.stub(service), method)(request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                found = _error_of(error)
                if not self.gateways.move_on(found, attempt, failed):
                    raise found from None
                attempt += 1


class AsyncStream(AsyncIterator[Event]):
    """Events of one generation; `aclose()` (or `async with`) cancels."""

    def __init__(self, gateways: "Gateways", request: pb.GenerateRequest, timeout_s: float | None) -> None:
        self.finished: Finished | None = None
        self._route = _Route(gateways, request)
        self._request, self._timeout_s = request, timeout_s
        self._call: Any = self._route.open(timeout_s)

    @property
    def request_id(self) -> str:
        return self._request.request_id

    async def __anext__(self) -> Event:
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                found = _error_of(error)
                pause_s = self._route.after(found)
                if pause_s is None:
                    raise found from None
                await asyncio.sleep(pause_s)
                self._call = self._route.open(self._timeout_s)
                continue
            if message is grpc.aio.EOF:
                raise StopAsyncIteration
            event = decode_event(message)
            self._route.came(event)
            if isinstance(event, Finished):
                self.finished = event
            return event

    async def answer(self) -> str:
        return "".join([e.text async for e in self if isinstance(e, AnswerDelta)])

    async def aclose(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.aclose()


class AsyncSession:
    def __init__(self, client: AsyncClient, session_id: str) -> None:
        self._client, self.session_id = client, session_id

    def send(self, messages: Messages, **options: Any) -> AsyncStream:
        return self._client.generate(messages, session_id=self.session_id, **options)

    async def record(self) -> pb.Session:
        return await self._client.get_session(self.session_id)

    async def delete(self) -> None:
        await self._client.delete_session(self.session_id)


# ---------------------------------------------------------------- gateways


class Gateways:
    """The list of gateways, a channel to each that was used, and which one is in favour. For both kinds of client."""

    def __init__(
        self, addresses: str | Sequence[str], connect: Callable[..., Any], cluster_token: str, api_key: str
    ) -> None:
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self.addresses:
            raise InvalidRequest("addresses", addresses, "at least one host:port of a gateway")
        self._connect, self._cluster_token, self._api_key = connect, cluster_token, api_key
        self._channels: dict[str, Any] = {}
        self._favourite = 0  # the gateway that answered last

    def stub(self, service: str) -> Any:
        address = self.addresses[self._favourite]
        if address not in self._channels:
            self._channels[address] = self._connect(address, options=_OPTIONS)
        return getattr(pb_grpc, f"{service}Stub")(self._channels[address])

    def metadata(self, service: str) -> tuple[tuple[str, str], ...]:
        if service == "Cluster":
            return ((TOKEN_KEY, self._cluster_token),) if self._cluster_token else ()
        return (("authorization", f"Bearer {self._api_key}"),) if self._api_key else ()

    def move_on(self, error: ExpertMeshError, attempt: int, failed: int) -> bool:
        """Turn from the gateway that failed; False where all were tried or the next would say the same."""
        if not isinstance(error, Unavailable) or attempt + 1 >= len(self.addresses):
            return False
        self.turn(failed)
        return True

    @property
    def favourite(self) -> int:
        """Index of the gateway that the next call goes to."""
        return self._favourite

    def turn(self, failed: int) -> None:
        """To the next one, unless another call has turned from `failed` already."""
        if self._favourite == failed:
            self._favourite = (failed + 1) % len(self.addresses)

    def take_channels(self) -> list[Any]:
        channels, self._channels = list(self._channels.values()), {}
        return channels


class _Route:
    """Where a stream is to be had next, and from which event on. Pure but for the stubs."""

    def __init__(self, gateways: Gateways, request: pb.GenerateRequest) -> None:
        self._gateways, self._request = gateways, request
        self._next_offset = 0  # of the first event that has not come
        self._num_failed = 0  # calls since the last event
        self._gateway = 0  # that the present call went to

    def open(self, timeout_s: float | None) -> Any:
        self._gateway = self._gateways.favourite
        stub = self._gateways.stub("Generation")
        metadata = self._gateways.metadata("Generation")
        if not self._next_offset:
            return stub.Generate(self._request, timeout=timeout_s, metadata=metadata)
        resume = pb.ResumeRequest(request_id=self._request.request_id, from_offset=self._next_offset)
        return stub.Resume(resume, timeout=timeout_s, metadata=metadata)

    def came(self, event: Event) -> None:
        self._next_offset, self._num_failed = event.offset + 1, 0

    def after(self, error: ExpertMeshError) -> float | None:
        """Seconds to wait before the next call, None where there is none to make."""
        attempt, self._num_failed = self._num_failed, self._num_failed + 1
        if not self._next_offset:
            return 0.0 if self._gateways.move_on(error, attempt, self._gateway) else None
        if not self._request.resumable or not isinstance(error, Unavailable) or attempt >= MAX_RESUMES:
            return None
        self._gateways.turn(self._gateway)
        whole_rounds = self._num_failed // len(self._gateways.addresses)
        return min(0.05 * whole_rounds, 1.0)  # nobody there: give one the time to come back


# ---------------------------------------------------------------- records


def make_request(
    messages: Messages = "",
    *,
    prompt: str = "",
    token_ids: Sequence[int] = (),
    session_id: str = "",
    request_id: str = "",
    thinking: Literal["on", "off"] | None = None,
    thinking_budget: int | None = None,
    include_token_ids: bool = False,
    resumable: bool = False,
    history: Literal["drop", "keep"] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | None = None,
    **sampling: Any,
) -> pb.GenerateRequest:
    """A request from plain values: `messages`, or else `prompt` (no template) or `token_ids`. `thinking` None leaves
    the mode to session and model. `tool_choice`: auto, none, required, or a tool's name. `history`: whether
    a session's later prompts keep old thinking. `sampling`: any field of SamplingOptions, such as temperature."""
    unknown = sorted(set(sampling) - _SAMPLING)
    if unknown:
        raise InvalidRequest(unknown[0], sampling[unknown[0]], f"an option of generate or one of {sorted(_SAMPLING)}")
    if thinking not in _MODES:
        raise InvalidRequest("thinking", thinking, "'on', 'off' or None")
    if history not in _HISTORY:
        raise InvalidRequest("history", history, "'drop', 'keep' or None")
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    try:
        request = pb.GenerateRequest(
            request_id=request_id or f"r-{secrets.token_hex(8)}",
            prompt=prompt,
            session_id=session_id,
            include_token_ids=include_token_ids,
            resumable=resumable,
            history_policy=_HISTORY[history],
            sampling=pb.SamplingOptions(**{k: v for k, v in sampling.items() if v is not None}),
            thinking=pb.ThinkingOptions(mode=_MODES[thinking], budget_tokens=thinking_budget),
            tools=[_encode_tool(tool) for tool in tools],
        )
        if messages:
            request.chat.CopyFrom(pb.Chat(messages=_encode_messages(messages)))
        if tool_choice is not None:
            mode = _CHOICES.get(tool_choice, pb.ToolChoice.NAMED)
            name = tool_choice if mode == pb.ToolChoice.NAMED else ""
            request.tool_choice.CopyFrom(pb.ToolChoice(mode=mode, name=name))
        if token_ids:
            request.token_ids.ids.extend(token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", str(error), "values of the types in expertmesh.proto") from None
    return request


def decode_event(message: pb.GenerateEvent) -> Event:
    kind = message.WhichOneof("event")
    if kind == "answer":
        return AnswerDelta(message.offset, message.answer.text, tuple(message.answer.token_ids))
    if kind == "reasoning":
        return ReasoningDelta(message.offset, message.reasoning.text, tuple(message.reasoning.token_ids))
    if kind == "started":
        s = message.started
        return Started(message.offset, s.request_id, s.session_id, s.model, s.prompt_tokens, s.seed)
    if kind == "tool_call":
        t = message.tool_call
        return ToolCallDelta(message.offset, t.index, t.name, t.arguments_text, t.malformed, tuple(t.token_ids))
    return _decode_finished(message.offset, message.finished)


def _decode_finished(offset: int, finished: pb.Finished) -> Finished:
    usage, timings = finished.usage, finished.timings
    return Finished(
        offset=offset,
        reason=FinishReason(finished.reason),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        committed=finished.committed,
        session_version=finished.session_version,
        queue_s=timings.queue_s,
        time_to_first_token_s=timings.time_to_first_token_s,
        time_to_first_answer_token_s=timings.time_to_first_answer_token_s,
        total_s=timings.total_s,
        stop_matched=finished.stop_matched,
    )


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


def _error_of(error: Any) -> ExpertMeshError:
    return from_rpc(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
