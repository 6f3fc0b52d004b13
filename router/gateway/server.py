"""The public gRPC front of a gateway: Generation, Sessions, Cluster, health, reflection.

Handlers take bytes and give bytes, so malformed protobuf is answered by us, an event is serialised once, and a stream
is one `write` an event. Everything else is in `generation.py`. Every error leaves as a typed status (`rpc_errors.py`).

A request's life here: deadline from the call, `traceparent` from its metadata into the request's span and on over the
link; a dropped or expired call cancels its handler and with it the generation, which aborts the work in the engine.
Constructor arguments are small protocols, so the server is tested without Ray, Redis or an engine."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2

from ... import telemetry as names
from ...errors import ExpertMeshError, InvalidRequest, NotFound, SessionStoreUnavailable, Unavailable
from ...proto import expertmesh_pb2 as pb
from ...telemetry import Telemetry
from .api_keys import ApiKeys
from .cluster_service import ClusterService, TopologySource
from .events import EventWriter
from .foreign_services import add_foreign_services
from .generation import CommittedTurn, Generation, GenerationConfig, Generations, Sessions, Tier, record_failure
from .journal import Journal
from .limits import MAX_METADATA_BYTES, check_limits
from .link import bind
from .reader_watch import STALL_S, WRITE_BUFFER_BYTES, ReaderWatch
from .resume import GRACE_S, Resumables, ResumableStream
from .rpc_errors import status_code, status_message, trailing_metadata
from .session import SessionRecord
from .tokenizer import Tokenizer
from .validation import check_name, parse

LAST_WORDS_S = 0.5  # for streams that were just cut to say so: else clients see CANCELLED, which nobody asks again
DRAIN_RETRY_S = 1.0
MAX_PAGE = 500
MAX_STREAMS = 4096  # at once on one connection; a client's next calls wait in the client
_SERVICES = ("Generation", "Sessions", "Cluster")
_log = logging.getLogger(__name__)


class SessionSource(Sessions, Protocol):
    """The session store (`session.py`) as the Sessions service uses it."""

    async def get(self, session_id: str, owner: str = "") -> SessionRecord: ...

    async def list(
        self, owner: str = "", *, page_size: int = 50, page_token: str = ""
    ) -> tuple[list[SessionRecord], str]: ...

    async def delete(self, session_id: str, owner: str = "") -> None: ...

    async def fork(
        self, session_id: str, new_session_id: str, owner: str = "", *, at_version: int = 0
    ) -> SessionRecord: ...


class GatewayServer:
    """`start`, serve, `drain`. `num_running` generations are in work."""

    def __init__(
        self,
        config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        tier: Tier,
        sessions: SessionSource | None = None,
        journal: Journal | None = None,
        api_keys: ApiKeys | None = None,
        topology: TopologySource | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        cluster_token: str = "",
        max_message_bytes: int = 64 << 20,
        max_request_bytes: int = 16 << 20,
        credentials: grpc.ServerCredentials | None = None,
        layout: str = "",
        num_logical_experts: int = 0,
        num_moe_layers: int = 0,
        resume_grace_s: float = GRACE_S,
        stall_s: float = STALL_S,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.address = ""  # host:port once started
        self.telemetry = telemetry or Telemetry.off()
        self.generations = Generations(
            config,
            tokenizer=tokenizer,
            tier=tier,
            sessions=sessions,
            telemetry=self.telemetry,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._resumables: Resumables | None = None
        if journal is not None:
            self._resumables = Resumables(self.generations, journal, self._track, grace_s=resume_grace_s)
        self._sessions = sessions
        self._host, self._port, self._credentials = host, port, credentials
        self._options = _server_options(max_message_bytes, max_request_bytes)
        facts = pb.Topology(
            model=config.model,
            layout=layout,
            num_logical_experts=num_logical_experts,
            num_moe_layers=num_moe_layers,
        )
        self._cluster = ClusterService(topology, facts, cluster_token)
        self._api_keys = api_keys or ApiKeys()
        self.readers = ReaderWatch(stall_s)
        self._running: dict[tuple[str, str], Generation | CommittedTurn] = {}  # by owner and request id
        self._num_readers = 0  # of resumable streams
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def start(self) -> str:
        """Bind and serve; returns host:port."""
        self._server = grpc.aio.server(options=self._options)
        self._server.add_generic_rpc_handlers(self._handlers())
        full_names = tuple(f"{pb.DESCRIPTOR.package}.{name}" for name in _SERVICES)
        add_foreign_services(self._server, self._health, full_names, _as_status)
        self.address = f"{self._host}:{bind(self._server, self._host, self._port, self._credentials)}"
        self._cluster.address = self.address
        await self._server.start()
        for name in ("", *full_names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.address

    async def drain(self, grace_s: float = 30.0) -> None:
        """NOT_SERVING, nothing new, let the running ones end (at most `grace_s`, then they are cut), stop."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        await self.stop()

    async def stop(self) -> None:
        if self._resumables is not None:
            await self._resumables.stop()
        if self.generations.pending is not None:
            await self.generations.pending.close()
        if self._server is not None:
            await self._server.stop(LAST_WORDS_S)

    # ---- Generation

    async def _generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata() or ())
        span = self.telemetry.start(names.SPAN_REQUEST, str(metadata.get("traceparent", "")))
        try:
            if self._draining:
                raise Unavailable("this gateway is draining; dial another one", retry_after_s=DRAIN_RETRY_S)
            owner = self._owner(context)
            request = parse(pb.GenerateRequest, data)
            check_limits(request)
            if request.resumable:
                self._journaled()
            generation = await self.generations.prepare(
                request,
                owner=owner,
                remaining_s=context.time_remaining(),
                traceparent=span.traceparent or str(metadata.get("traceparent", "")),
            )
            span.set(names.ATTR_REQUEST_ID, generation.request_id)
            if request.resumable and isinstance(generation, Generation):
                stream = await self._journaled().begin(generation, request)
                await self._read(stream, 0, context)
            else:
                await self._stream(generation, context)
        except ExpertMeshError as error:
            record_failure(self.telemetry, error)
            span.end(error)
            raise
        finally:
            span.end()

    async def _stream(self, generation: Generation | CommittedTurn, context: grpc.aio.ServicerContext) -> None:
        with self._track(generation):
            async with self.readers.watched(context.write) as write:
                writer = EventWriter(write)
                await generation.finish(writer, await generation.run(writer))

    @contextlib.contextmanager
    def _track(self, generation: Generation | CommittedTurn) -> Iterator[None]:
        """It runs: it can be cancelled, and a drain waits for it."""
        key = (generation.owner, generation.request_id)
        if key in self._running:
            raise InvalidRequest("request_id", generation.request_id, "an id that is not running already")
        self._running[key] = generation
        self._idle.clear()
        try:
            yield
        finally:
            del self._running[key]
            self._check_idle()

    async def _read(self, stream: ResumableStream, offset: int, context: grpc.aio.ServicerContext) -> None:
        """A drain waits for readers too: the last events of a stream follow its work."""
        self._num_readers += 1
        self._idle.clear()
        try:
            async with self.readers.watched(context.write) as write:
                await stream.read(offset, write)
        finally:
            self._num_readers -= 1
            self._check_idle()

    def _check_idle(self) -> None:
        if not self._running and not self._num_readers:
            self._idle.set()

    async def _cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        check_name("request_id", request.request_id)
        generation = self._running.get((self._owner(context), request.request_id))
        if generation is None:
            raise NotFound("running request", request.request_id)
        generation.cancel()
        return pb.CancelResponse()

    async def _resume(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        owner = self._owner(context)
        request = parse(pb.ResumeRequest, data)
        check_name("request_id", request.request_id)
        if self._draining:
            raise Unavailable("this gateway is draining; dial another one", retry_after_s=DRAIN_RETRY_S)
        if self._resumables is None:
            raise NotFound("resumable request", request.request_id)
        stream = self._resumables.resume(owner, request.request_id)
        await self._read(stream, request.from_offset, context)

    def _owner(self, context: grpc.aio.ServicerContext) -> str:
        return self._api_keys.owner(context.invocation_metadata() or ())

    def _journaled(self) -> Resumables:
        if self._resumables is None:
            raise InvalidRequest("resumable", True, "false: this gateway keeps no stream journal")
        return self._resumables

    # ---- Sessions

    async def _get_session(self, request: pb.GetSessionRequest, context: grpc.aio.ServicerContext) -> pb.Session:
        return encode_session(
            await self._store().get(check_name("session_id", request.session_id), self._owner(context))
        )

    async def _list_sessions(
        self, request: pb.ListSessionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSessionsResponse:
        if request.page_size > MAX_PAGE:
            raise InvalidRequest("page_size", request.page_size, f"0..{MAX_PAGE}")
        if request.page_token:
            check_name("page_token", request.page_token)
        found, token = await self._store().list(
            self._owner(context), page_size=request.page_size or 50, page_token=request.page_token
        )
        return pb.ListSessionsResponse(sessions=[encode_session(s) for s in found], next_page_token=token)

    async def _delete_session(
        self, request: pb.DeleteSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteSessionResponse:
        await self._store().delete(check_name("session_id", request.session_id), self._owner(context))
        return pb.DeleteSessionResponse()

    async def _fork_session(self, request: pb.ForkSessionRequest, context: grpc.aio.ServicerContext) -> pb.Session:
        record = await self._store().fork(
            check_name("session_id", request.session_id),
            check_name("new_session_id", request.new_session_id),
            self._owner(context),
            at_version=request.at_version,
        )
        return encode_session(record)

    async def _export_session(
        self, request: pb.ExportSessionRequest, context: grpc.aio.ServicerContext
    ) -> pb.SessionExport:
        record = await self._store().get(check_name("session_id", request.session_id), self._owner(context))
        ids = [pb.TurnIds(input_ids=t.input_ids, output_ids=t.output_ids, seed=t.seed) for t in record.turns]
        return pb.SessionExport(session=encode_session(record), turn_ids=ids)

    def _store(self) -> SessionSource:
        if self._sessions is None:
            raise SessionStoreUnavailable("this gateway has no session store")
        return self._sessions

    # ---- shells: bytes and errors

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        package = pb.DESCRIPTOR.package
        methods = {
            "Generation": {
                "Generate": _streaming(self._generate),
                "Resume": _streaming(self._resume),
                "Cancel": _unary(self._cancel, pb.CancelRequest),
            },
            "Sessions": {
                "Get": _unary(self._get_session, pb.GetSessionRequest),
                "List": _unary(self._list_sessions, pb.ListSessionsRequest),
                "Delete": _unary(self._delete_session, pb.DeleteSessionRequest),
                "Fork": _unary(self._fork_session, pb.ForkSessionRequest),
                "Export": _unary(self._export_session, pb.ExportSessionRequest),
            },
            "Cluster": {
                "GetTopology": _unary(self._cluster.get_topology, pb.GetTopologyRequest),
                "Scale": _unary(self._cluster.scale, pb.ScaleRequest),
                "Drain": _unary(self._cluster.drain, pb.DrainRequest),
                "Rebalance": _unary(self._cluster.rebalance, pb.RebalanceRequest),
            },
        }
        return tuple(grpc.method_handlers_generic_handler(f"{package}.{k}", v) for k, v in methods.items())


def _streaming(
    method: Callable[[bytes, grpc.aio.ServicerContext], Awaitable[None]],
) -> grpc.RpcMethodHandler:
    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> None:
        async with _as_status(context):
            await method(data, context)

    return grpc.unary_stream_rpc_method_handler(handle)


def _unary(
    method: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]], request_class: Any
) -> grpc.RpcMethodHandler:
    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with _as_status(context):
            response = await method(parse(request_class, data), context)
            encoded: bytes = response.SerializeToString()
            return encoded
        return b""  # nobody is there to get it

    return grpc.unary_unary_rpc_method_handler(handle)


class _as_status(contextlib.AbstractAsyncContextManager[None, bool | None]):
    """An error of the tree becomes its status. Any other is our bug: INTERNAL to the client, a traceback in the log."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> bool | None:
        if isinstance(error, ExpertMeshError):
            await self._context.abort(status_code(error), status_message(error), trailing_metadata(error))
        if isinstance(error, grpc.aio.InternalError):  # a write to a client that has gone: nobody is left to be told
            return True
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            _log.error("a handler failed", exc_info=error)
            await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}")
        return None


def _server_options(max_message_bytes: int, max_request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),  # between the two gRPC refuses by chance
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.http2.write_buffer_size", WRITE_BUFFER_BYTES),
        ("grpc.server_handshake_timeout_ms", 10_000),  # a peer that connects and says nothing
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),  # a taken port must be an error, not a silent share
    ]


# ---- records as messages


def encode_session(record: SessionRecord) -> pb.Session:
    session = pb.Session(
        session_id=record.session_id,
        version=record.version,
        created_at=record.created_at,
        expires_at=record.expires_at,
    )
    if settings := record.settings:
        session.thinking.mode = settings.get("thinking_mode", 0)
        if (budget := settings.get("budget_tokens")) is not None:
            session.thinking.budget_tokens = budget
        session.history_policy = settings.get("history_policy", 0)
    for index, turn in enumerate(record.turns):
        session.turns.add(
            messages=[_encode_message(m) for m in turn.messages],
            usage=pb.Usage(**turn.usage),
            request_id=turn.request_id,
            finished_at=turn.finished_at,
            began_at=turn.began_at,
            suspect=index in record.suspect_turns,
        )
    return session


def _encode_message(message: dict[str, Any]) -> pb.Message:
    calls = [
        pb.ToolCall(name=c["name"], arguments_json=json.dumps(c["arguments"], ensure_ascii=False))
        for c in message.get("tool_calls", ())
    ]
    return pb.Message(
        role=message["role"],
        content=message["content"],
        reasoning_content=message.get("reasoning_content", ""),
        tool_calls=calls,
    )
