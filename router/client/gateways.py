"""Which gateway is asked next: for one call, and for a stream that goes on over several.

For both kinds of client. Nothing here waits: they make the calls and sleep, this says where and for how long."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from ...errors import ExpertMeshError, InvalidRequest, NotFound, SlowReader, Unavailable
from ...proto import expertmesh_pb2 as pb
from ...proto import expertmesh_pb2_grpc as pb_grpc
from ..gateway.link import TOKEN_KEY
from ..gateway.rpc_errors import DETAILS_KEY, from_rpc
from ..gateway.tls import ClientTls
from .events import Event, Finished, decode_event

T = TypeVar("T")
DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_FAILING_S = 120.0  # without an event, over all gateways; as long as a gateway waits for an attention replica
_OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.max_reconnect_backoff_ms", 1000))


@dataclass(frozen=True, slots=True)
class Unary(Generic[T]):
    """A call with one answer, of type T."""

    service: str
    method: str
    request: Any
    timeout_s: float | None = 30.0
    elsewhere: tuple[type[ExpertMeshError], ...] = (Unavailable,)  # after these another gateway may say more


class Gateways:
    """The list of gateways, a channel to each that was used, and which one is in favour."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        library: Any,
        *,
        api_key: str = "",
        cluster_token: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        """`library` is `grpc` or `grpc.aio`."""
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self.addresses:
            raise InvalidRequest("addresses", addresses, "at least one host:port of a gateway")
        self._connect = tls.connector(library.secure_channel) if tls else library.insecure_channel
        self._cluster_token, self._api_key = cluster_token, api_key
        self._channels: dict[str, Any] = {}
        self._favourite = 0  # the gateway that answered last
        self.served = False  # a stream was had here: whoever does not answer now is expected back

    def channel(self, address: str) -> Any:
        """One that stays open until `take_channels`."""
        if address not in self._channels:
            self._channels[address] = self._connect(address, options=_OPTIONS)
        return self._channels[address]

    def method(self, service: str, method: str) -> Callable[..., Any]:
        """Of the favourite gateway."""
        stub = getattr(pb_grpc, f"{service}Stub")(self.channel(self.addresses[self._favourite]))
        found: Callable[..., Any] = getattr(stub, method)
        return found

    def metadata(self, service: str) -> tuple[tuple[str, str], ...]:
        if service == "Cluster":
            return ((TOKEN_KEY, self._cluster_token),) if self._cluster_token else ()
        return (("authorization", f"Bearer {self._api_key}"),) if self._api_key else ()

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


class Attempts(Generic[T]):
    """One unary call, at one gateway after the other."""

    def __init__(self, gateways: Gateways, call: Unary[T]) -> None:
        self._gateways, self._call, self._num_failed, self._gateway = gateways, call, 0, 0

    def invoke(self) -> Any:
        """The answer, or what is awaited for it."""
        call = self._call
        self._gateway = self._gateways.favourite
        method = self._gateways.method(call.service, call.method)
        return method(call.request, timeout=call.timeout_s, metadata=self._gateways.metadata(call.service))

    def failed(self, error: grpc.RpcError) -> None:
        """Raises its typed error, unless another gateway is to be asked."""
        found = error_of(error)
        self._num_failed += 1
        if not isinstance(found, self._call.elsewhere) or self._num_failed >= len(self._gateways.addresses):
            raise found from None
        self._gateways.turn(self._gateway)


class Route:
    """Where one stream is to be had next, from which event on, and what has come of it."""

    def __init__(
        self,
        gateways: Gateways,
        request: pb.GenerateRequest,
        timeout_s: float | None,
        *,
        next_offset: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`next_offset` None: begin it; else it runs, or has run, and goes on with that event."""
        self.request = request
        self.finished: Finished | None = None
        self.num_resumed = 0  # times that the stream went on in another call
        self._gateways, self._clock = gateways, clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._next_offset = next_offset  # of the first event that has not come; None = nothing is known to run
        self._num_failed = 0  # calls since the last event
        self._failing_since = 0.0
        self._gateway = 0  # that the present call went to

    def open(self) -> Any:
        """The call at the favourite gateway."""
        self._gateway = self._gateways.favourite
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - self._clock())
        metadata = self._gateways.metadata("Generation")
        if self._next_offset is None:
            return self._gateways.method("Generation", "Generate")(self.request, timeout=timeout_s, metadata=metadata)
        self.num_resumed += self.finished is None and bool(self._num_failed)
        resume = pb.ResumeRequest(request_id=self.request.request_id, from_offset=self._next_offset)
        return self._gateways.method("Generation", "Resume")(resume, timeout=timeout_s, metadata=metadata)

    def came(self, message: pb.GenerateEvent) -> Event:
        event = decode_event(message)
        self._next_offset, self._num_failed, self._gateways.served = event.offset + 1, 0, True
        if isinstance(event, Finished):
            self.finished = event
        return event

    def failed(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next call; raises the typed error where there is none to make."""
        found = error_of(error)
        if not self._num_failed:
            self._failing_since = self._clock()
        self._num_failed += 1
        begun = self._next_offset is not None
        # A resumable request may be made again: where it runs already, the second call joins it.
        patient = self.request.resumable and (begun or self._gateways.served)
        once_round = self._num_failed >= len(self._gateways.addresses)
        gives_up = self._clock() - self._failing_since > MAX_FAILING_S if patient else once_round
        if not isinstance(found, Unavailable | SlowReader) or gives_up or (begun and not patient):
            raise found from None
        self._gateways.turn(self._gateway)
        if not patient:
            return 0.0
        whole_rounds = self._num_failed // len(self._gateways.addresses)
        return min(0.05 * whole_rounds, 1.0)  # nobody there: give one the time to come back


def error_of(error: Any) -> ExpertMeshError:
    metadata, message = tuple(error.trailing_metadata() or ()), error.details() or ""
    nobody_said_it = not any(key == DETAILS_KEY for key, _ in metadata) and "ocally cancelled" not in message
    if error.code() is grpc.StatusCode.CANCELLED and nobody_said_it:
        return Unavailable(
            f"the gateway ended under the call ({message})"
        )  # its server cancels what is left at its end
    return from_rpc(error.code(), message, metadata)


# ---------------------------------------------------------------- the calls


def cancel(request_id: str) -> Unary[pb.CancelResponse]:
    """Whichever gateway has it: one that does not know it is not the last word."""
    request = pb.CancelRequest(request_id=request_id)
    return Unary("Generation", "Cancel", request, 5.0, elsewhere=(Unavailable, NotFound))


def get_session(session_id: str) -> Unary[pb.Session]:
    return Unary("Sessions", "Get", pb.GetSessionRequest(session_id=session_id))


def list_sessions(page_token: str) -> Unary[pb.ListSessionsResponse]:
    return Unary("Sessions", "List", pb.ListSessionsRequest(page_token=page_token))


def delete_session(session_id: str) -> Unary[pb.DeleteSessionResponse]:
    return Unary("Sessions", "Delete", pb.DeleteSessionRequest(session_id=session_id))


def fork_session(session_id: str, new_session_id: str, at_version: int) -> Unary[pb.Session]:
    request = pb.ForkSessionRequest(session_id=session_id, new_session_id=new_session_id, at_version=at_version)
    return Unary("Sessions", "Fork", request)


def export_session(session_id: str) -> Unary[pb.SessionExport]:
    return Unary("Sessions", "Export", pb.ExportSessionRequest(session_id=session_id))


def get_topology(timeout_s: float) -> Unary[pb.Topology]:
    return Unary("Cluster", "GetTopology", pb.GetTopologyRequest(), timeout_s)


def scale(num_shards: int, min_shards: int, max_shards: int) -> Unary[pb.OperationResult]:
    request = pb.ScaleRequest(num_shards=num_shards, min_shards=min_shards, max_shards=max_shards)
    return Unary("Cluster", "Scale", request)


def drain(member_id: str) -> Unary[pb.OperationResult]:
    return Unary("Cluster", "Drain", pb.DrainRequest(member_id=member_id))


def rebalance() -> Unary[pb.OperationResult]:
    return Unary("Cluster", "Rebalance", pb.RebalanceRequest(), timeout_s=90.0)
