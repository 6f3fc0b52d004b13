"""The attention tier as a gateway sees it: links to all replicas, a choice per request, and failover.

Where no replica has room for one more, requests wait at the gateway, where the order between API keys is fair
(`waiting_room.py`); as long as there is room nothing of this is touched.

A replica that dies takes no stream with it: the request goes to another one with the tokens so far (`output_ids`),
which replays them and goes on. Draws are keyed by (seed, position), so it says what the first one would have said."""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace

from ...errors import ExpertMeshError, NoReplica, Overloaded, ReplicaLost, SlowReader, Unavailable
from ...request import EngineRequest, RequestOutput
from .balancer import BalancerConfig, ReplicaView, pick, pick_with_room
from .link import MAX_BACKLOG_BYTES, LinkClient, RequestStream
from .waiting_room import Ticket, WaitingRoom, WaitingRoomConfig

FAILOVER_WAIT_S = 120.0  # for a replica to come (back), with its weights to load; a request's deadline ends it sooner
MAX_FAILOVERS = 8


class AttentionTier:
    """Owns one LinkClient per replica. `set_replicas` follows the topology."""

    def __init__(
        self,
        *,
        gateway_id: str,
        cluster_token: str,
        config: BalancerConfig | None = None,
        waiting: WaitingRoomConfig | None = None,
        weights: Mapping[str, float] | None = None,
        max_message_bytes: int = 64 << 20,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`weights`: owner -> share of a full tier, 1 where there is none."""
        self.config = config or BalancerConfig()
        self.waiting_room = WaitingRoom(waiting or WaitingRoomConfig(), weights or {}, clock)
        self.clock = clock
        self._gateway_id, self._cluster_token, self._max_message_bytes = gateway_id, cluster_token, max_message_bytes
        self._max_backlog_bytes = max_backlog_bytes
        self._links: dict[str, LinkClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_replicas(self, addresses: Mapping[str, str]) -> None:
        """Replica id -> host:port of its link. New ones are dialled, missing ones hung up, moved ones dialled again."""
        for replica_id, link in list(self._links.items()):
            if addresses.get(replica_id) != link.address:
                del self._links[replica_id]
                task = asyncio.create_task(link.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for replica_id, address in addresses.items():
            if replica_id not in self._links:
                self._links[replica_id] = LinkClient(
                    replica_id,
                    address,
                    gateway_id=self._gateway_id,
                    cluster_token=self._cluster_token,
                    max_message_bytes=self._max_message_bytes,
                    max_backlog_bytes=self._max_backlog_bytes,
                    on_change=self._let_in,
                )

    @property
    def num_connected(self) -> int:
        return sum(link.connected.is_set() for link in self._links.values())

    @property
    def num_in_flight(self) -> int:
        return sum(link.num_in_flight for link in self._links.values())

    async def wait_connected(self, timeout_s: float, *, count: int = 1) -> None:
        """Until `count` replicas are connected; NoReplica past the bound."""
        deadline = self.clock() + timeout_s
        while self.num_connected < count:
            waits = [
                asyncio.ensure_future(k.connected.wait()) for k in self._links.values() if not k.connected.is_set()
            ]
            left = deadline - self.clock()
            if left <= 0:
                raise NoReplica(f"{self.num_connected} of {count} attention replicas connected in {timeout_s:g} s")
            if not waits:
                await asyncio.sleep(min(left, 0.05))
                continue
            await asyncio.wait(waits, timeout=min(left, 0.5), return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    def generate(self, request: EngineRequest, *, affinity: str = "", owner: str = "") -> "TierStream":
        """Submit to the best replica, at once where one has room (NoReplica, QueueFull), and return its outputs."""
        return TierStream(self, request, affinity, owner)

    def admit(self, request: EngineRequest, affinity: str, owner: str) -> RequestStream | Ticket:
        """A new request: to a replica if there is room and nobody waits, else it waits its turn."""
        if request.output_ids:  # it goes on: it had its turn
            return self.submit(request, affinity, set())
        if not self.waiting_room:
            replica_id = pick_with_room(self._views(), self.config, affinity=affinity)
            if replica_id is not None:
                return self._links[replica_id].generate(request)
        return self.waiting_room.enter(owner, request, affinity)

    def submit(self, request: EngineRequest, affinity: str, excluded: set[str]) -> RequestStream:
        """To the best replica now, whether there is room or not."""
        return self._links[pick(self._views(), self.config, affinity=affinity, excluded=excluded)].generate(request)

    def _let_in(self) -> None:
        """As many of those who wait as there is room for. Called with each report of a replica, once a step."""
        while self.waiting_room:
            try:
                if pick_with_room(self._views(), self.config) is None:
                    return
            except (NoReplica, Overloaded):
                return
            self.waiting_room.let_in(self._place)

    def _place(self, ticket: Ticket) -> RequestStream:
        replica_id = pick_with_room(self._views(), self.config, affinity=ticket.affinity)
        assert replica_id is not None  # there was room a moment ago
        return self._links[replica_id].generate(ticket.request)

    def _views(self) -> list[ReplicaView]:
        return [
            ReplicaView(
                replica_id=k.replica_id,
                connected=k.connected.is_set(),
                load=k.load,
                num_unreported=k.num_unreported,
                num_unreported_tokens=k.num_unreported_tokens,
            )
            for k in self._links.values()
        ]

    async def close(self) -> None:
        self.set_replicas({})
        await asyncio.gather(*self._closing)


class TierStream(AsyncIterator[RequestOutput]):
    """Outputs of one request, over as many replicas as it takes. Closing it aborts the request."""

    __slots__ = (
        *("_closed", "_num_failovers", "_owner", "_received", "_refused", "_request", "_stream", "_ticket", "_tier"),
        "_waited_s",
    )

    def __init__(self, tier: AttentionTier, request: EngineRequest, affinity: str, owner: str) -> None:
        self._tier, self._request, self._owner = tier, request, owner
        self._closed = asyncio.Event()
        self._received = array("i")  # ids, for a failover
        self._num_failovers = 0
        self._refused: set[str] = set()  # replicas that are not asked again for this request
        self._waited_s = 0.0  # for its turn; told with the first output
        admitted = tier.admit(request, affinity, owner)
        self._ticket = admitted if isinstance(admitted, Ticket) else None
        self._stream: RequestStream | None = admitted if isinstance(admitted, RequestStream) else None

    @property
    def replica_id(self) -> str:
        """Where it runs now: the affinity hint of the next turn."""
        return self._stream.replica_id if self._stream is not None else ""

    async def __anext__(self) -> RequestOutput:
        if self._ticket is not None:
            await self._wait_for_turn(self._ticket)
        while True:
            stream = self._stream
            if stream is None or self._closed.is_set():
                self.abort()
                raise StopAsyncIteration
            try:
                output = stream.take()
                if output is None:
                    await stream.wait()
                    continue
            except ReplicaLost:
                self._stream = None
                self._stream = await self._fail_over()
                continue
            except SlowReader:  # no fault of the replica
                raise
            except (Overloaded, Unavailable) as error:
                self._stream = self._pass_over(stream.replica_id, error)
                continue
            self._received.extend(output.token_ids)
            if self._waited_s:
                output.queue_s, self._waited_s = output.queue_s + self._waited_s, 0.0
            return output

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            if self._ticket is None and not self._request.output_ids:
                self._tier.waiting_room.charge(self._owner, self._request, len(self._received))
        if self._ticket is not None:
            self._tier.waiting_room.leave(self._ticket)
            self._ticket = None
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    async def _wait_for_turn(self, ticket: Ticket) -> None:
        started = self._tier.clock()
        while not ticket.admitted.done():
            await asyncio.wait([ticket.admitted], timeout=FAILOVER_WAIT_S)
            if not ticket.admitted.done() and not self._tier.num_connected:
                self.abort()
                raise NoReplica(f"no attention replica came within {FAILOVER_WAIT_S:g} s")
        if self._ticket is not None:  # not aborted meanwhile
            self._ticket, self._stream = None, ticket.admitted.result()
            self._waited_s = self._tier.clock() - started

    def _pass_over(self, replica_id: str, error: ExpertMeshError) -> RequestStream:
        """One that answers refused (no room, leaving, failed): another one, or the refusal where there is none."""
        self._stream = None
        self._refused.add(replica_id)
        try:
            return self._tier.submit(self._so_far(), "", self._refused)
        except (Overloaded, Unavailable):
            raise error from None

    def _so_far(self) -> EngineRequest:
        if not self._received:
            return self._request
        return replace(self._request, output_ids=(*self._request.output_ids, *self._received))

    async def _fail_over(self) -> RequestStream | None:
        """Send prompt and tokens so far to another replica, waiting for one where none is there; None = closed."""
        self._num_failovers += 1
        if self._num_failovers > MAX_FAILOVERS:
            raise ReplicaLost(f"lost {self._num_failovers} attention replicas under one request; giving up")
        request = self._so_far()
        deadline = self._tier.clock() + FAILOVER_WAIT_S
        while not self._closed.is_set():
            try:
                return self._tier.submit(request, "", set())
            except (NoReplica, ReplicaLost):
                left = deadline - self._tier.clock()
                if left <= 0:
                    raise
                await self._wait_connected(left)
        return None

    async def _wait_connected(self, timeout_s: float) -> None:
        """Until a replica is there or the stream is closed; NoReplica past the bound."""
        waits = [asyncio.create_task(self._tier.wait_connected(timeout_s)), asyncio.create_task(self._closed.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[0].done():
                waits[0].result()
        finally:
            for wait in waits:
                wait.cancel()
