"""The client for asyncio: `AsyncClient`, its streams and sessions. Use one inside one event loop."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio

from ...proto import expertmesh_pb2 as pb
from ..gateway.tls import ClientTls
from . import gateways
from .events import AnswerDelta, Event, Finished
from .gateways import DEFAULT_ADDRESS, Attempts, Gateways, Route, Unary
from .requests import GenerateOptions, Messages, make_request

T = TypeVar("T")


class AsyncClient:
    """As `blocking.Client`, with `await` and `async for`."""

    def __init__(
        self,
        addresses: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        api_key: str = "",
        cluster_token: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        self.gateways = Gateways(addresses, grpc.aio, api_key=api_key, cluster_token=cluster_token, tls=tls)

    def generate(self, messages: Messages = "", **options: Unpack[GenerateOptions]) -> "AsyncStream":
        timeout_s = options.pop("timeout_s", None)
        return AsyncStream(self, Route(self.gateways, make_request(messages, **options), timeout_s))  # type: ignore[misc]

    def resume(self, request_id: str, from_offset: int = 0, *, timeout_s: float | None = None) -> "AsyncStream":
        request = pb.GenerateRequest(request_id=request_id, resumable=True)
        return AsyncStream(self, Route(self.gateways, request, timeout_s, next_offset=from_offset))

    def session(self, session_id: str = "") -> "AsyncSession":
        return AsyncSession(self, session_id or f"s-{secrets.token_hex(8)}")

    async def cancel(self, request_id: str) -> None:
        await self.call(gateways.cancel(request_id))

    async def get_session(self, session_id: str) -> pb.Session:
        return await self.call(gateways.get_session(session_id))

    async def list_sessions(self) -> AsyncIterator[pb.Session]:
        page_token = ""
        while True:
            page = await self.call(gateways.list_sessions(page_token))
            for session in page.sessions:
                yield session
            page_token = page.next_page_token
            if not page_token:
                return

    async def delete_session(self, session_id: str) -> None:
        await self.call(gateways.delete_session(session_id))

    async def fork_session(self, session_id: str, new_session_id: str, *, at_version: int = 0) -> pb.Session:
        return await self.call(gateways.fork_session(session_id, new_session_id, at_version))

    async def export_session(self, session_id: str) -> pb.SessionExport:
        return await self.call(gateways.export_session(session_id))

    async def topology(self, *, timeout_s: float = 5.0) -> pb.Topology:
        return await self.call(gateways.get_topology(timeout_s))

    async def scale(self, num_shards: int = 0, *, min_shards: int = 0, max_shards: int = 0) -> str:
        """So many expert shards from now on; 0 = as many as the load asks for, within these bounds (0 = as
        configured). One line says what happens."""
        return (await self.call(gateways.scale(num_shards, min_shards, max_shards))).summary

    async def drain(self, member_id: str) -> str:
        """Take one expert shard out in good order; another one starts in its place."""
        return (await self.call(gateways.drain(member_id))).summary

    async def rebalance(self) -> str:
        """Place the experts anew by the loads seen so far."""
        return (await self.call(gateways.rebalance())).summary

    async def close(self) -> None:
        for channel in self.gateways.take_channels():
            await channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.close()

    async def call(self, call: Unary[T]) -> T:
        attempts = Attempts(self.gateways, call)
        while True:
            try:
                answer: T = await attempts.invoke()
                return answer
            except grpc.RpcError as error:
                attempts.failed(error)


class AsyncStream(AsyncIterator[Event]):
    """As `blocking.Stream`; `aclose()` (or `async with`) hangs up."""

    def __init__(self, client: AsyncClient, route: Route) -> None:
        self._client, self._route = client, route
        self._call: Any = route.open()

    @property
    def request_id(self) -> str:
        return self._route.request.request_id

    @property
    def finished(self) -> Finished | None:
        return self._route.finished

    @property
    def num_resumed(self) -> int:
        return self._route.num_resumed

    async def __anext__(self) -> Event:
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                await asyncio.sleep(self._route.failed(error))
                self._call = self._route.open()
                continue
            if message is grpc.aio.EOF:
                raise StopAsyncIteration
            return self._route.came(message)

    async def answer(self) -> str:
        return "".join([e.text async for e in self if isinstance(e, AnswerDelta)])

    async def aclose(self) -> None:
        self._call.cancel()

    async def cancel(self) -> None:
        await self._client.cancel(self.request_id)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.aclose()


class AsyncSession:
    """As `blocking.Session`."""

    def __init__(self, client: AsyncClient, session_id: str) -> None:
        self._client, self.session_id = client, session_id

    def send(self, messages: Messages, **options: Unpack[GenerateOptions]) -> AsyncStream:
        options["session_id"] = self.session_id
        return self._client.generate(messages, **options)

    async def record(self) -> pb.Session:
        return await self._client.get_session(self.session_id)

    async def export(self) -> pb.SessionExport:
        return await self._client.export_session(self.session_id)

    async def fork(self, new_session_id: str = "", *, at_version: int = 0) -> "AsyncSession":
        made = self._client.session(new_session_id)
        await self._client.fork_session(self.session_id, made.session_id, at_version=at_version)
        return made

    async def delete(self) -> None:
        await self._client.delete_session(self.session_id)
