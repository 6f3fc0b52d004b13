"""The blocking client: `Client`, its streams and sessions. Thread-safe."""

import secrets
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from ...proto import expertmesh_pb2 as pb
from ..gateway.tls import ClientTls
from . import gateways
from .events import AnswerDelta, Event, Finished
from .gateways import DEFAULT_ADDRESS, Attempts, Gateways, Route, Unary
from .requests import GenerateOptions, Messages, make_request

T = TypeVar("T")


class Client:
    """Blocking client over one or more gateways. Thread-safe."""

    def __init__(
        self,
        addresses: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        api_key: str = "",
        cluster_token: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        """`tls`: the gateways speak TLS (`ClientTls()` trusts the public roots, `ClientTls(ca_file=...)` an own CA).
        `cluster_token`: for the cluster's own calls."""
        self.gateways = Gateways(addresses, grpc, api_key=api_key, cluster_token=cluster_token, tls=tls)

    def generate(self, messages: Messages = "", **options: Unpack[GenerateOptions]) -> "Stream":
        """Start one generation; iterate for events."""
        timeout_s = options.pop("timeout_s", None)
        return Stream(self, Route(self.gateways, make_request(messages, **options), timeout_s))  # type: ignore[misc]

    def resume(self, request_id: str, from_offset: int = 0, *, timeout_s: float | None = None) -> "Stream":
        """The events of a resumable request from this one on, whoever began it: while it runs and after its end."""
        request = pb.GenerateRequest(request_id=request_id, resumable=True)
        return Stream(self, Route(self.gateways, request, timeout_s, next_offset=from_offset))

    def session(self, session_id: str = "") -> "Session":
        """A conversation kept by the cluster; a new one where no id is given."""
        return Session(self, session_id or f"s-{secrets.token_hex(8)}")

    def cancel(self, request_id: str) -> None:
        """End a running request, whichever gateway of the list has it."""
        self.call(gateways.cancel(request_id))

    def get_session(self, session_id: str) -> pb.Session:
        return self.call(gateways.get_session(session_id))

    def list_sessions(self) -> Iterator[pb.Session]:
        """All sessions, without turns, page by page."""
        page = self.call(gateways.list_sessions(""))
        yield from page.sessions
        while page.next_page_token:
            page = self.call(gateways.list_sessions(page.next_page_token))
            yield from page.sessions

    def delete_session(self, session_id: str) -> None:
        self.call(gateways.delete_session(session_id))

    def fork_session(self, session_id: str, new_session_id: str, *, at_version: int = 0) -> pb.Session:
        """A new session that begins with the first `at_version` turns (0 = all) of another one."""
        return self.call(gateways.fork_session(session_id, new_session_id, at_version))

    def export_session(self, session_id: str) -> pb.SessionExport:
        """Everything of a session, token ids included."""
        return self.call(gateways.export_session(session_id))

    def topology(self, *, timeout_s: float = 5.0) -> pb.Topology:
        return self.call(gateways.get_topology(timeout_s))

    def scale(self, num_shards: int = 0, *, min_shards: int = 0, max_shards: int = 0) -> str:
        """So many expert shards from now on; 0 = as many as the load asks for, within these bounds (0 = as
        configured). One line says what happens."""
        return self.call(gateways.scale(num_shards, min_shards, max_shards)).summary

    def drain(self, member_id: str) -> str:
        """Take one expert shard out in good order; another one starts in its place."""
        return self.call(gateways.drain(member_id)).summary

    def rebalance(self) -> str:
        """Place the experts anew by the loads seen so far."""
        return self.call(gateways.rebalance()).summary

    def close(self) -> None:
        for channel in self.gateways.take_channels():
            channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.close()

    def call(self, call: Unary[T]) -> T:
        """One unary call at the first gateway that can be reached."""
        attempts = Attempts(self.gateways, call)
        while True:
            try:
                answer: T = attempts.invoke()
                return answer
            except grpc.RpcError as error:
                attempts.failed(error)


class Stream(Iterator[Event]):
    """Events of one generation. `answer()` reads to the end; `close()`, or leaving the loop, hangs up."""

    def __init__(self, client: Client, route: Route) -> None:
        self._client, self._route = client, route
        self._call: Any = route.open()

    @property
    def request_id(self) -> str:
        return self._route.request.request_id

    @property
    def finished(self) -> Finished | None:
        """The last event, once it came."""
        return self._route.finished

    @property
    def num_resumed(self) -> int:
        """Calls beyond the first that it took: gateways that were lost under it, and tries to find one."""
        return self._route.num_resumed

    def __next__(self) -> Event:
        while True:
            try:
                return self._route.came(next(self._call))
            except grpc.RpcError as error:
                time.sleep(self._route.failed(error))
                self._call = self._route.open()

    def answer(self) -> str:
        """The whole answer's text; `finished` then has usage and times."""
        return "".join(e.text for e in self if isinstance(e, AnswerDelta))

    def close(self) -> None:
        """The work ends, that of a resumable stream after a grace."""
        self._call.cancel()

    def cancel(self) -> None:
        """The work ends now, whether resumable or not; the stream finishes with CANCELLED."""
        self._client.cancel(self.request_id)

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

    def send(self, messages: Messages, **options: Unpack[GenerateOptions]) -> Stream:
        options["session_id"] = self.session_id
        return self._client.generate(messages, **options)

    def record(self) -> pb.Session:
        return self._client.get_session(self.session_id)

    def export(self) -> pb.SessionExport:
        return self._client.export_session(self.session_id)

    def fork(self, new_session_id: str = "", *, at_version: int = 0) -> "Session":
        """Another conversation that begins as this one did."""
        made = self._client.session(new_session_id)
        self._client.fork_session(self.session_id, made.session_id, at_version=at_version)
        return made

    def delete(self) -> None:
        self._client.delete_session(self.session_id)
