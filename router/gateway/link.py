"""The one multiplexed gRPC stream between a gateway and an attention replica, a message a step.

Why: a call per token through a Serve handle costs milliseconds; here the cost of a step's message is shared by all
requests of the gateway, so the cost per token falls as the batch grows. Requests are named by small handles. Submit and
abort travel up; tokens, rejections and load travel down.

Both ends hold what is not sent (not read) of a request as one record and add to it, so a slow peer makes messages
larger, never a queue longer. At the replica that is bounded by the request's own max_tokens, at the gateway by bytes
too (`backlog.py`): a stream whose client leaves more unread is ended.

    LinkServer   in the replica: `publish` is called once a step from the engine thread
    LinkClient   in the gateway: `generate` returns a RequestStream, closing which aborts the request"""

import asyncio
import contextlib
import hmac
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio

from ...errors import ExpertMeshError, ReplicaLost, SlowReader, StartupError
from ...proto import expertmesh_pb2 as pb
from ...proto import expertmesh_pb2_grpc as pb_grpc
from ...request import EngineLoad, EngineRequest, FinishReason, RequestOutput
from .backlog import Backlog
from .link_messages import (
    PROTOCOL_VERSION,
    add_output,
    decode_load,
    decode_submit,
    encode_load,
    encode_submit,
)
from .rpc_errors import make_error

TOKEN_KEY = "x-expertmesh-token"
LOAD_PERIOD_S = 1.0  # a changed load is told at least so often when no tokens flow
BACKOFF_S = (0.05, 2.0)  # first and longest pause before connecting again
CONNECT_TIMEOUT_S = 5.0
MAX_BACKLOG_BYTES = 1 << 20  # of one stream at the gateway: 262,144 ids, or 3,000 tokens with 20 log-probabilities each
_NO_LOAD = EngineLoad(num_running=0, num_waiting=0, num_free_kv_blocks=0, num_kv_blocks=0)
_log = logging.getLogger(__name__)


class EngineHandle(Protocol):
    """What the link needs of the engine. All thread-safe, none blocks."""

    def submit(self, request: EngineRequest) -> None:
        """Queue it; an ExpertMeshError (QueueFull, InvalidRequest) is sent to the gateway as a rejection."""
        ...

    def abort(self, request_id: str) -> None: ...

    def load(self) -> EngineLoad: ...


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Bounds and keepalive of link sockets: a silent peer is noticed within 15 s even when nothing is sent."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),  # a taken port must be an error, not a silent share
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def token_matches(metadata: Any, cluster_token: str) -> bool:
    """Constant-time check of the cluster token; an empty one asks for nothing."""
    given = next((v for k, v in metadata or () if k == TOKEN_KEY), "")
    return not cluster_token or hmac.compare_digest(str(given).encode(), cluster_token.encode())


# ---------------------------------------------------------------- in the attention replica


class LinkServer(pb_grpc.LinkServicer):
    """Serves links to any number of gateways. Make it, give `publish` to the engine, then `start(engine)`."""

    def __init__(
        self,
        *,
        replica_id: str,
        max_model_len: int,
        cluster_token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        max_message_bytes: int = 64 << 20,
    ) -> None:
        self.replica_id = replica_id
        self.address = ""  # host:port once started
        self._max_model_len, self._cluster_token = max_model_len, cluster_token
        self._host, self._port, self._max_message_bytes = host, port, max_message_bytes
        self._draining = False
        self._engine: EngineHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: grpc.aio.Server | None = None
        self._routes: dict[str, tuple[_GatewayLink, int]] = {}  # request id in the engine -> link, handle
        self._links: set[_GatewayLink] = set()
        self._no_links = asyncio.Event()
        self._no_links.set()
        self._num_links = 0  # ever
        self._num_steps = 0

    @property
    def num_requests(self) -> int:
        return len(self._routes)

    async def start(self, engine: EngineHandle) -> str:
        """Bind and serve; returns host:port."""
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._server = grpc.aio.server(options=channel_options(self._max_message_bytes))
        pb_grpc.add_LinkServicer_to_server(self, self._server)
        self.address = f"{self._host}:{bind(self._server, self._host, self._port)}"
        await self._server.start()
        return self.address

    def publish(self, outputs: Sequence[RequestOutput]) -> None:
        """What one step gave. Called from the engine thread, once a step; never blocks."""
        if self._loop is not None and outputs:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver, outputs)

    def drain(self) -> None:
        """Tell the gateways to send nothing new; what runs goes on."""
        self._draining = True
        for link in self._links:
            link.wake()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Hang up (after `grace_s`); returns when every link's work is aborted."""
        if self._server is not None:
            await self._server.stop(grace_s)
        await self._no_links.wait()

    async def Open(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        assert self._engine is not None
        if not token_matches(context.invocation_metadata(), self._cluster_token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the link needs the cluster token in {TOKEN_KEY}")
        hello = await context.read()
        if hello is grpc.aio.EOF or hello.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a link is hello")
        if hello.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this replica speaks link version {PROTOCOL_VERSION}, the gateway {hello.hello.protocol_version}",
            )
        self._num_links += 1
        link = _GatewayLink(f"{hello.hello.gateway_id}.{self._num_links}")
        self._links.add(link)
        self._no_links.clear()
        writer = asyncio.create_task(self._write(link, context))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self._take(link, message)
        except asyncio.CancelledError:
            _log.info("link to gateway %s ended", link.name)  # it went away, or this server stops
        finally:
            writer.cancel()
            self._links.discard(link)
            for request_id in link.request_ids.values():
                self._routes.pop(request_id, None)
                self._engine.abort(request_id)
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.UsageError):
                await writer
            if not self._links:
                self._no_links.set()

    def _take(self, link: "_GatewayLink", message: pb.GatewayMessage) -> None:
        assert self._engine is not None
        kind = message.WhichOneof("message")
        if kind == "abort":
            request_id = link.request_ids.pop(message.abort.handle, None)
            if request_id is not None:
                del self._routes[request_id]
                link.forget(message.abort.handle)
                self._engine.abort(request_id)
                link.wake()  # there may be room again
        elif kind == "submit":
            handle = message.submit.handle
            link.num_submitted += 1
            request_id = f"{message.submit.request_id}@{link.name}.{handle}"  # one engine serves several gateways
            link.request_ids[handle] = request_id
            self._routes[request_id] = (link, handle)
            try:
                self._engine.submit(decode_submit(message.submit, request_id))
            except ExpertMeshError as error:
                self._end(request_id)
                link.reject(handle, error.code, error.message, error.retry_after_s)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """On the event loop: sort one step's outputs by gateway."""
        self._num_steps += 1
        touched: dict[int, _GatewayLink] = {}
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue  # aborted meanwhile
            link, handle = route
            if output.finish_reason is FinishReason.ERROR:
                link.forget(handle)
                link.reject(handle, output.error_code or "INTERNAL", output.error_message, None)
            else:
                link.add(handle, output)
            if output.finish_reason:
                self._end(output.request_id)
            touched[id(link)] = link
        for link in touched.values():
            link.wake()

    def _end(self, request_id: str) -> None:
        link, handle = self._routes.pop(request_id)
        link.request_ids.pop(handle, None)

    async def _write(self, link: "_GatewayLink", context: grpc.aio.ServicerContext) -> None:
        assert self._engine is not None
        hello = pb.ReplicaHello(
            replica_id=self.replica_id, protocol_version=PROTOCOL_VERSION, max_model_len=self._max_model_len
        )
        await context.write(pb.ReplicaMessage(hello=hello))
        told = None
        while True:
            load = encode_load(self._engine.load(), draining=self._draining, num_submitted=link.num_submitted)
            messages = link.take(self._num_steps, load)
            if not messages and load != told:
                messages = [pb.ReplicaMessage(load=load)]
            for message in messages:
                await context.write(message)
            told = load
            if not link.has_unsent:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(link.woken.wait(), LOAD_PERIOD_S)
            link.woken.clear()


class _GatewayLink:
    """Replica's end of one link: handles in use, and what has not been sent yet."""

    __slots__ = ("_rejects", "_step", "_tokens", "name", "num_submitted", "request_ids", "woken")

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_submitted = 0
        self.request_ids: dict[int, str] = {}  # handle -> request id in the engine
        self.woken = asyncio.Event()
        self._step = pb.StepTokens()
        self._tokens: dict[int, pb.RequestTokens] = {}  # handle -> its record inside _step
        self._rejects: list[pb.Reject] = []

    @property
    def has_unsent(self) -> bool:
        return bool(self._tokens or self._rejects)

    def wake(self) -> None:
        self.woken.set()

    def add(self, handle: int, output: RequestOutput) -> None:
        tokens = self._tokens.get(handle)
        if tokens is None:
            tokens = self._tokens[handle] = self._step.requests.add(handle=handle)
        add_output(tokens, output)

    def reject(self, handle: int, code: str, message: str, retry_after_s: float | None) -> None:
        self._rejects.append(pb.Reject(handle=handle, code=code, message=message, retry_after_s=retry_after_s or 0.0))
        self.wake()

    def forget(self, handle: int) -> None:
        """Its unsent tokens are wanted no more (the record stays, empty; the peer ignores it)."""
        tokens = self._tokens.pop(handle, None)
        if tokens is not None:
            tokens.Clear()

    def take(self, step_id: int, load: pb.ReplicaLoad) -> list[pb.ReplicaMessage]:
        messages = [pb.ReplicaMessage(reject=r) for r in self._rejects]
        self._rejects = []
        if self._tokens:
            self._step.step_id = step_id
            self._step.load.CopyFrom(load)
            messages.insert(0, pb.ReplicaMessage(step=self._step))
        self._step, self._tokens = pb.StepTokens(), {}
        return messages


# ---------------------------------------------------------------- in the gateway


class LinkClient:
    """One replica as a gateway reaches it: connects, reconnects with a growing pause, until closed."""

    def __init__(
        self,
        replica_id: str,
        address: str,
        *,
        gateway_id: str,
        cluster_token: str,
        max_message_bytes: int = 64 << 20,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called after each report of load and each end of a connection."""
        self.max_backlog_bytes = max_backlog_bytes
        self.replica_id, self.address = replica_id, address
        self.connected = asyncio.Event()
        self.load = _NO_LOAD
        self._unreported: deque[int] = deque()  # prompt tokens of each request sent that `load` does not know
        self.num_unreported_tokens = 0
        self._num_sent = 0  # requests, on this connection
        self.max_model_len = 0
        self._on_change = on_change
        self._gateway_id, self._cluster_token, self._max_message_bytes = gateway_id, cluster_token, max_message_bytes
        self._streams: dict[int, RequestStream] = {}
        self._next_handle = 1
        self._outbox: deque[pb.GatewayMessage] = deque()
        self._outgoing = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"link to {replica_id}")

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    @property
    def num_unreported(self) -> int:
        """Requests sent that `load` does not know."""
        return len(self._unreported)

    def generate(self, request: EngineRequest) -> "RequestStream":
        """Submit at once; iterate for the outputs. ReplicaLost when there is no connection."""
        if not self.connected.is_set():
            raise ReplicaLost(f"attention replica {self.replica_id} at {self.address} is not connected")
        handle = self._next_handle
        self._next_handle += 1
        stream = self._streams[handle] = RequestStream(self, handle, request)
        self._num_sent += 1
        self._unreported.append(len(request.prompt_ids))
        self.num_unreported_tokens += len(request.prompt_ids)
        self._send(pb.GatewayMessage(submit=encode_submit(handle, request)))
        return stream

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def release(self, handle: int, *, abort: bool) -> None:
        """A stream ends; `abort` tells the replica."""
        if self._streams.pop(handle, None) is not None and abort and self.connected.is_set():
            self._send(pb.GatewayMessage(abort=pb.Abort(handle=handle)))

    def _send(self, message: pb.GatewayMessage) -> None:
        self._outbox.append(message)
        self._outgoing.set()

    async def _run(self) -> None:
        pause = BACKOFF_S[0]
        while True:
            lost = "closed the link"
            try:
                async with grpc.aio.insecure_channel(
                    self.address, options=channel_options(self._max_message_bytes)
                ) as channel:
                    await self._serve(pb_grpc.LinkStub(channel).Open(metadata=((TOKEN_KEY, self._cluster_token),)))
            except grpc.aio.AioRpcError as error:
                lost = f"{error.code().name}: {error.details()}"
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    _log.warning("link to %s at %s: %s", self.replica_id, self.address, lost)
            except TimeoutError:
                lost = f"did not answer within {CONNECT_TIMEOUT_S:g} s"
            finally:
                was_connected = self.connected.is_set()
                self.connected.clear()
                self._lose(lost)
            pause = BACKOFF_S[0] if was_connected else min(2 * pause, BACKOFF_S[1])
            await asyncio.sleep(pause)

    async def _serve(self, call: Any) -> None:
        """One connection, until it ends."""
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                hello = pb.GatewayHello(gateway_id=self._gateway_id, protocol_version=PROTOCOL_VERSION)
                await call.write(pb.GatewayMessage(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF:
                await call  # raises the status
                return
            self.max_model_len = first.hello.max_model_len
            self._outbox.clear()
            self._forget_sent()
            writer = asyncio.create_task(self._write(call))
            self.connected.set()
            self._on_change()
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take(message)
                message = None  # a step's records may be megabytes; the next message may be a while
            await call
        except asyncio.InvalidStateError as error:  # the call ended under a pending read
            raise TimeoutError from error
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader reports the loss
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._outgoing.clear()
                await self._outgoing.wait()

    def _take(self, message: pb.ReplicaMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "step":
            self._take_load(message.step.load)
            streams = self._streams
            for tokens in message.step.requests:
                stream = streams.get(tokens.handle)
                if stream is not None:
                    stream.give(tokens)
        elif kind == "reject":
            reject = message.reject
            stream = self._streams.get(reject.handle)
            if stream is not None:
                stream.fail(make_error(reject.code, reject.message, retry_after_s=reject.retry_after_s or None))
        elif kind == "load":
            self._take_load(message.load)

    def _take_load(self, load: pb.ReplicaLoad) -> None:
        self.load = decode_load(load)
        while len(self._unreported) > self._num_sent - load.num_submitted:
            self.num_unreported_tokens -= self._unreported.popleft()
        self._on_change()

    def _forget_sent(self) -> None:
        self.load, self._num_sent, self.num_unreported_tokens = _NO_LOAD, 0, 0
        self._unreported.clear()

    def _lose(self, why: str) -> None:
        streams, self._streams = self._streams, {}
        self._forget_sent()
        for stream in streams.values():
            stream.fail(ReplicaLost(f"attention replica {self.replica_id} at {self.address}: {why}"))
        self._on_change()


class RequestStream(AsyncIterator[RequestOutput]):
    """Outputs of one request as they come; steps that came meanwhile are one output, or pieces of it. One reader."""

    __slots__ = ("_backlog", "_ended", "_error", "_handle", "_link", "_request_id", "_waiter")

    def __init__(self, link: LinkClient, handle: int, request: EngineRequest) -> None:
        self._link, self._handle, self._request_id = link, handle, request.request_id
        self._backlog = Backlog(with_logprobs=request.sampling.num_logprobs >= 0)
        self._error: ExpertMeshError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def replica_id(self) -> str:
        return self._link.replica_id

    def give(self, tokens: pb.RequestTokens) -> None:
        self._backlog.add(tokens)
        if tokens.finish_reason:
            self._link.release(self._handle, abort=False)
        if self._backlog.num_bytes > self._link.max_backlog_bytes:
            error = SlowReader(f"left {self._backlog.num_tokens} tokens ({self._backlog.num_bytes >> 10} KiB) unread")
            self.abort()
            self._ended, self._error = False, error
        self._wake()

    def fail(self, error: ExpertMeshError) -> None:
        self._link.release(self._handle, abort=False)
        self._error = error
        self._wake()

    def take(self) -> RequestOutput | None:
        """What is here, None for nothing yet; raises the stream's error, StopAsyncIteration after its end."""
        if self._backlog:
            output = self._backlog.take(self._request_id)
            if output.finish_reason:
                self._ended = True
            return output
        if self._error is not None:
            error, self._error, self._ended = self._error, None, True
            raise error
        if self._ended:
            raise StopAsyncIteration
        return None

    def wait(self) -> "asyncio.Future[None]":
        """Done when there may be something to take. One waiter."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    async def __anext__(self) -> RequestOutput:
        while (output := self.take()) is None:
            await self.wait()
        return output

    async def aclose(self) -> None:
        """Abort unless it is over. Idempotent; never waits."""
        self.abort()

    def abort(self) -> None:
        self._ended, self._error = True, None
        self._backlog = Backlog(with_logprobs=False)
        self._link.release(self._handle, abort=True)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
    """Listen on one interface, with TLS where there are credentials; the port in force. A taken port: StartupError."""
    address = f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error}; choose a free port or an own address") from None
    return int(bound)
