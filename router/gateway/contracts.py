"""What a generation stands on and is read by: small protocols, so that each side is tested with a real other one."""

from collections.abc import AsyncIterator, Awaitable
from typing import Protocol

from ...proto import expertmesh_pb2 as pb
from ...request import EngineRequest, RequestOutput
from .conversation import Delta
from .session import SessionRecord, TurnRecord


class OutputStream(Protocol):
    """Outputs of one request; aborting ends the iteration and the work."""

    @property
    def replica_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    def abort(self) -> None: ...


class Tier(Protocol):
    def generate(self, request: EngineRequest, *, affinity: str = "", owner: str = "") -> OutputStream: ...


class Writer(Protocol):
    """Where the events of one stream go, in the form of the transport (`events.py` for gRPC)."""

    def started(self, offset: int, started: pb.Started) -> Awaitable[None]: ...

    def delta(self, offset: int, delta: Delta, *, with_ids: bool) -> Awaitable[None]: ...

    def finished(self, offset: int, finished: pb.Finished) -> Awaitable[None]: ...


class Sessions(Protocol):
    """What a generation needs of the session store (`session.py`)."""

    async def open(self, session_id: str, owner: str = "") -> SessionRecord: ...

    async def commit(
        self, session_id: str, expected_version: int, turn: TurnRecord, *, owner: str = "", affinity: str = ""
    ) -> int: ...
