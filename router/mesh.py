"""This process's membership of the cluster: bids out, headers in, epochs switched at step boundaries.

`ClusterMesh` is a member among others (or alone); `LocalMesh` owns both roles in one process and needs no socket. Both
are one machine: bids go to the epoch's leader (a direct call where that is this process, the control channel
elsewhere), headers come back through the callback given to `start`, and `enter` makes the named step of the header.

An epoch has three moments here. `prepare` (any thread, beside the running steps): communicator where the membership is
new, experts of the placement resident, channel to the leader. `commit`: the leader may name the epoch in its next
header. `enter` of that header: the switch, on every member at the same step. `rollback` forgets a prepared epoch; at
most two are alive. Locks: `_lock` guards all state; callbacks run without it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from ..config import ClusterConfig, ExchangeConfig
from ..errors import EpochError, ExpertMeshError, ReplicaLost
from ..kernels.peer_memory import gpu_name
from .backends import build_exchange
from .contracts import LocalExperts
from .control import Channel, ControlServer, Kind, connect, decode_bid, decode_done, encode_bid, encode_done
from .device_exchange import DeviceExchange, LocalDeviceExchange
from .device_step import DeviceExperts, DeviceStep
from .epoch import Epoch, Member, StepHeader
from .exchange import Exchange, LocalExchange, RowShape
from .group import RendezvousStore, beside_steps, build_gloo, use_batch_scheduling
from .guard import Guard, OnSuspect
from .leader import BidPlaced, EpochInstalled, GraceOver, IssueHeader, Leader, LeaderEvent, StepDone
from .placement import Placement
from .step import Step
from .timer import Timer

_STEPS_TO_LEAVE = 2  # steps in a new membership after which nobody is in a step of the old one

OnHeader = Callable[[StepHeader], None]
OnTrouble = Callable[[int, ExpertMeshError], None]  # (epoch number, what broke): the agent reports it to the Conductor


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshOptions:
    """What a member needs of the cluster's configuration."""

    interface: str = "127.0.0.1"
    cluster_token: str = ""
    max_prefill_tokens_per_step: int = 1024
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    buckets: tuple[int, ...] = ()  # sizes of captured steps, for `StepHeader.bucket`; the same on all members

    @classmethod
    def of(cls, config: ClusterConfig) -> "MeshOptions":
        return cls(
            interface=config.network.interface,
            cluster_token=config.network.cluster_token,
            max_prefill_tokens_per_step=config.scheduler.max_prefill_tokens_per_step,
            buckets=config.scheduler.graph_buckets,
            exchange=config.exchange,
        )


@dataclass(slots=True, eq=False)
class _Prepared:
    """An epoch that this member can enter."""

    epoch: Epoch
    rank: int
    exchange: Exchange | DeviceExchange

    @property
    def shard_ids(self) -> list[str]:
        return [self.epoch.members[rank].member_id for rank in self.epoch.expert_ranks]


class ClusterMesh:
    """One member. Attention members listen for those that they may lead; `member` says where."""

    def __init__(
        self,
        member_id: str,
        *,
        attention: bool,
        experts: LocalExperts | None,  # None = this member owns none
        shape: RowShape,
        options: MeshOptions,
        on_trouble: OnTrouble | None = None,
        on_suspect: OnSuspect | None = None,  # engine thread: a shard whose rows are bad again and again
        listen: bool = True,
        copies_port: int = 0,  # of a member that gives copies of its experts
    ) -> None:
        use_batch_scheduling()
        self._experts, self._shape, self._options = experts, shape, options
        self._on_trouble = on_trouble
        self.guard = Guard(on_suspect=on_suspect)
        self._on_header: OnHeader = _drop
        self._lock = threading.RLock()
        self._step_over = threading.Condition(self._lock)
        self._leader = Leader(max_prefill_tokens=options.max_prefill_tokens_per_step, buckets=options.buckets)
        self._leads = False
        self._closed = False
        self._timer = Timer(lambda: self._lead(GraceOver()))
        self._epochs: dict[int, _Prepared] = {}
        self._preparing: Epoch | None = None  # the newest that was asked for, prepared or not
        self._current: _Prepared | None = None  # entered ...
        self._entered_at = 0  # ... with this step
        self._committed: _Prepared | None = None  # the newest that may be entered
        self._leader_id = ""  # to whom bids go
        self._bid: tuple[int, int, str] | None = None  # not answered yet
        self._last_source_step = 0
        self._last_step_id = 0
        self._highest_number = 0
        self._last_epoch = 0  # the newest that a header named
        self._broken = 0  # the last epoch that something broke in
        self._batch_scheduled = False
        self._step: Step | DeviceStep | None = None
        self._under_way: tuple[int, int, float] | None = None  # epoch, step, since when
        # The exchange of the epoch before: a slower peer may still read from it.
        self._replaced: Exchange | DeviceExchange | None = None
        self._replaced_steps = 0
        self._load = np.zeros((0, 0), dtype=np.int64)
        self._channels: dict[str, Channel] = {}
        self._server: ControlServer | None = None
        self._store: RendezvousStore | None = None
        if attention and listen:
            self._server = ControlServer(
                member_id, options.interface, options.cluster_token, self._on_frame, self._on_member_lost
            )
            self._store = RendezvousStore(options.interface)
        self.member = Member(
            member_id=member_id,
            attention=attention,
            expert=experts is not None,
            host=options.interface,
            control_port=self._server.port if self._server else 0,
            store_port=self._store.port if self._store else 0,
            copies_port=copies_port,
            gpu=gpu_name(shape.device) if shape.device.type == "cuda" else "",
        )

    # -- what the engine uses (contracts.Mesh)

    def start(self, on_header: OnHeader) -> None:
        """`on_header` is called from a control thread, or from within `bid` on the leader itself: it must only pass the
        header on to the engine thread."""
        self._on_header = on_header

    @property
    def rank(self) -> int:
        if self._current is None:
            raise EpochError("no epoch has been entered yet")
        return self._current.rank

    def bid(self, num_decode_tokens: int, num_prefill_tokens: int, traceparent: str = "") -> None:
        with self._lock:
            self._bid = (num_decode_tokens, num_prefill_tokens, traceparent)
        self._place_bid()

    def enter(self, header: StepHeader) -> Step | DeviceStep:
        """Where rows live on a GPU, a DeviceStep; what it enqueues at once goes to torch's current stream, and so must
        the layers."""
        if not self._batch_scheduled:
            use_batch_scheduling()  # of the engine's thread
            self._batch_scheduled = True
        with self._lock:
            if self._step is not None:
                self._step.close()
            prepared = self._epochs.get(header.epoch)
            if prepared is None or (self._current and header.epoch < self._current.epoch.number):
                current = self._current.epoch.number if self._current else "none"
                raise EpochError(f"header of epoch {header.epoch}, in force here: {current}")
            if header.step_id <= self._last_step_id and prepared is self._current:
                raise EpochError(f"header of step {header.step_id} after step {self._last_step_id}")
            if header.placement_version != prepared.epoch.placement_version:
                raise EpochError(f"header names placement {header.placement_version} in epoch {header.epoch}")
            self._last_step_id = header.step_id  # lower in an epoch whose leader slept through the last one's steps
            if prepared is not self._current:
                self._entered_at = header.step_id  # first: what is told late of the epoch before must not end this one
                self._switch(prepared)
            self._replaced_steps += 1
            if self._replaced_steps > _STEPS_TO_LEAVE:
                self._abort_replaced()
        self._under_way = header.epoch, header.step_id, monotonic()
        self._step = self._make_step(prepared, header)
        return self._step

    def _make_step(self, prepared: _Prepared, header: StepHeader) -> Step | DeviceStep:
        exchange = prepared.exchange
        if isinstance(exchange, DeviceExchange):
            return DeviceStep(
                header,
                rank=prepared.rank,
                placement=prepared.epoch.placement,
                exchange=exchange,
                experts=cast(DeviceExperts | None, self._experts),
                shape=self._shape,
                on_launched=lambda: self._step_done(prepared, header.step_id, None),
                on_done=lambda error: self._device_step_done(prepared, header.step_id, error),
                guard=self.guard,
                shard_ids=prepared.shard_ids,
            )
        return Step(
            header,
            rank=prepared.rank,
            placement=prepared.epoch.placement,
            exchange=exchange,
            experts=self._experts,
            shape=self._shape,
            load=self._load if self._experts is not None else None,
            on_done=lambda error: self._host_step_done(prepared, header.step_id, error),
            guard=self.guard,
            shard_ids=prepared.shard_ids,
        )

    def _device_step_done(self, prepared: _Prepared, step_id: int, error: BaseException | None) -> None:
        """The leader was told when it was launched: only a failure is news."""
        self._note_end(step_id)
        if error is not None:
            self._step_done(prepared, step_id, error)

    def _host_step_done(self, prepared: _Prepared, step_id: int, error: BaseException | None) -> None:
        self._note_end(step_id)
        self._step_done(prepared, step_id, error)

    def _note_end(self, step_id: int) -> None:
        if self._under_way is not None and self._under_way[1] <= step_id:  # not of one that was launched behind it
            self._under_way = None

    # -- what the member's agent uses

    def long_step(self) -> tuple[int, int] | None:
        """(epoch, step) of the step under way if it has taken half of the exchange's deadline. From any thread."""
        under_way = self._under_way
        if under_way is None or monotonic() < under_way[2] + self._options.exchange.timeout_base_s / 2:
            return None
        return under_way[:2]

    @property
    def experts(self) -> LocalExperts | None:
        return self._experts

    @property
    def epoch(self) -> Epoch | None:
        """The epoch in force here: the newest committed one (an idle member enters it with its next step)."""
        return self._committed.epoch if self._committed else None

    @property
    def highest_number(self) -> int:
        """The highest epoch number ever prepared here: a fence for a Conductor that lost its own count."""
        return self._highest_number

    def load(self) -> tuple[int, npt.NDArray[np.int64]]:
        """(placement version, rows per slot [num_layers, slots_per_rank] since that version came into force)."""
        while True:
            current, load = self._current, self._load.copy()
            if current is None:
                return 0, load
            version = current.epoch.placement_version
            if self._experts is not None and isinstance(current.exchange, DeviceExchange):
                counted = cast(DeviceExperts, self._experts).rows_per_slot(version)
                load = np.zeros((len(counted), current.epoch.placement.slots_per_rank), dtype=np.int64)
                load[:, : counted.shape[1]] = counted
            if current is self._current:  # else it was left meanwhile, and its rows with it
                return version, load

    def peers(self) -> tuple[Member, ...]:
        """The other members of all epochs that are known here, the newest first."""
        with self._lock:
            known = [p.epoch for p in self._epochs.values()]
            newest = [self._preparing] if self._preparing is not None else []
        found = {m.member_id: m for epoch in [*newest, *reversed(known)] for m in epoch.members}
        return tuple(m for name, m in found.items() if name != self.member.member_id)

    def prepare(self, epoch: Epoch) -> None:
        """Make the epoch enterable. Blocks (call it from a worker thread); EpochError where a peer does not come."""
        rank = epoch.rank_of(self.member.member_id)
        with self._lock:
            latest = self._committed
            known = self._epochs.get(epoch.number)
            if (
                known is not None
                and known.epoch.same_membership(epoch)
                and _same_table(epoch.placement, known.epoch.placement)
            ):
                return
            if latest and epoch.number <= latest.epoch.number:
                raise EpochError(f"epoch {epoch.number} is not after {latest.epoch.number}")
            if latest and not _same_table(epoch.placement, latest.epoch.placement):
                raise EpochError(
                    f"epoch {epoch.number} has another table under placement version {epoch.placement.version}"
                )
            self._highest_number = max(self._highest_number, epoch.number)
            if self._preparing is not None and epoch.number < self._preparing.number:
                raise EpochError(f"epoch {epoch.number} after epoch {self._preparing.number} was asked for")
            self._preparing = epoch
            stale = [n for n, p in self._epochs.items() if p not in (latest, self._current)]
        for number in stale:
            self.rollback(number)
        with self._lock:
            self._abort_replaced()  # at most two are alive
        if self._experts is not None:
            place = partial(self._experts.set_placement, epoch.placement, epoch.expert_ranks.index(rank))
            steps = latest is not None and latest.epoch.number != self._broken and self._shape.device.type == "cpu"
            beside_steps(place) if steps else place()
        leader = epoch.members[epoch.leader_rank]
        if leader.member_id != self.member.member_id:
            self._connect(leader)
        if latest is not None and epoch.same_membership(latest.epoch):
            exchange = latest.exchange
        else:
            exchange = self._build_exchange(epoch, rank)
        with self._lock:
            overtaken = self._preparing is not None and self._preparing.number > epoch.number
            if not self._closed and not overtaken:
                self._epochs[epoch.number] = _Prepared(epoch, rank, exchange)
                return
            used = any(exchange is p.exchange for p in self._epochs.values())
        if not used:
            exchange.abort()
        raise EpochError("a newer epoch was asked for meanwhile" if overtaken else "this member has left")

    def commit(self, number: int) -> None:
        """All members are prepared. The leader of the epoch before (told first) stops and returns when its step is
        over; the leader of this one begins to name it."""
        with self._lock:
            prepared = self._epochs.get(number)
            if prepared is None:
                raise EpochError(f"epoch {number} was not prepared here")
            self._committed = prepared
            leader_id = prepared.epoch.members[prepared.epoch.leader_rank].member_id
            if self._leads and leader_id != self.member.member_id:
                self._stop_leading()
            if leader_id == self.member.member_id:
                self._leads = True
                event = EpochInstalled(prepared.epoch, self._last_step_id)
            self._leader_id = leader_id
            if self._current is None:
                self._switch(prepared)  # the first: no step runs that it could cut
                if self._shape.device.type == "cuda":
                    torch.cuda.current_stream(self._shape.device).synchronize()  # not the engine's
        if leader_id == self.member.member_id:
            self._lead(event)
        self._place_bid()

    def rollback(self, number: int) -> None:
        with self._lock:
            prepared = self._epochs.get(number)
            if prepared is None or prepared in (self._current, self._committed):
                return
            self._drop_epoch(number)

    def retire(self) -> None:
        """This member is not in the next epoch: stop leading, if it does, when the step in flight is over."""
        with self._lock:
            if self._leads:
                self._stop_leading()
            self._leader_id, self._bid = "", None

    def close(self) -> None:
        """Leave at once: peers in a step with us see a lost peer."""
        with self._lock:
            exchanges = {id(p.exchange): p.exchange for p in self._epochs.values()}
            channels = list(self._channels.values())
            self._epochs.clear()
            self._channels.clear()
            self._leads, self._leader_id, self._closed = False, "", True
            self._abort_replaced()
        self._timer.close()
        for exchange in exchanges.values():
            exchange.abort()
        for channel in channels:
            channel.close()
        if self._server is not None:
            self._server.close()

    # -- leading

    def _lead(self, event: LeaderEvent) -> None:
        """Give the leader core an event and perform its commands; the own header is delivered without the lock."""
        own: StepHeader | None = None
        with self._lock:
            for command in self._leader.step(event, monotonic()):
                if isinstance(command, IssueHeader):
                    own = self._issue(command)
                else:
                    self._timer.set(command.at)
            if not self._leader.step_in_flight:
                self._step_over.notify_all()
        if own is not None:
            self._deliver(own)

    def _issue(self, command: IssueHeader) -> StepHeader | None:
        """Send the header to all recipients but this process, which gets it returned."""
        header, own = command.header, None
        members = self._epochs[header.epoch].epoch.members
        payload = header.encode() if len(command.recipients) > 1 else b""
        for rank in command.recipients:
            member_id = members[rank].member_id
            if member_id == self.member.member_id:
                own = header
            else:
                assert self._server is not None
                try:
                    self._server.send(member_id, Kind.HEADER, payload)
                except ReplicaLost as error:
                    # It would never come, and the others would wait for their deadline: end the step for all.
                    self._epochs[header.epoch].exchange.abort()
                    self._trouble(header.epoch, error)
        return own

    def _stop_leading(self) -> None:
        """Under the lock. No header after this; returns when the step in flight is over on all."""
        self._leads = False
        self._leader.step(EpochInstalled(None), monotonic())
        if not self._step_over.wait_for(
            lambda: not self._leader.step_in_flight, self._options.exchange.epoch_timeout_s
        ):
            raise EpochError("the step in flight did not end: the epoch cannot be left in order")

    # -- frames and reports

    def _place_bid(self) -> None:
        with self._lock:
            if self._bid is None or not self._leader_id:
                return
            num_decode, num_prefill, traceparent = self._bid
            asked = self._last_source_step, traceparent, self.guard.wants_whole
            event = BidPlaced(self.member.member_id, num_decode, num_prefill, *asked)
            leads = self._leads
            if not leads:
                self._to_leader(self._leader_id, Kind.BID, encode_bid(event))
        if leads:
            self._lead(event)

    def _step_done(self, prepared: _Prepared, step_id: int, error: BaseException | None) -> None:
        local = isinstance(prepared.exchange, LocalExchange | LocalDeviceExchange)
        event = StepDone(self.member.member_id, step_id, failed=error is not None and not local)
        if event.failed:
            if not isinstance(error, ExpertMeshError):
                error = ReplicaLost(f"a step failed here: {error!r}")
            self._trouble(prepared.epoch.number, error)
        leader_id = prepared.epoch.members[prepared.epoch.leader_rank].member_id
        if leader_id == self.member.member_id:
            self._lead(event)
        elif self.member.attention or event.failed:
            self._to_leader(leader_id, Kind.DONE, encode_done(event))

    def _to_leader(self, leader_id: str, kind: Kind, payload: bytes) -> None:
        channel = self._channels.get(leader_id)
        if channel is None:
            return
        try:
            channel.send(kind, payload)
        except ReplicaLost as error:
            self._trouble(self.epoch.number if self.epoch else 0, error)

    def _on_frame(self, member_id: str, kind: Kind, payload: bytes) -> None:
        if kind is Kind.HEADER:
            self._deliver(StepHeader.decode(payload))
        elif kind is Kind.BID:
            self._lead(decode_bid(member_id, payload))
        else:
            done = decode_done(member_id, payload)
            current = self._current
            on_device = current is not None and isinstance(current.exchange, DeviceExchange)
            if done.failed and current is not None and on_device and done.step_id >= self._entered_at:
                current.exchange.abort()  # NCCL does not tell a rank that another one gave up
            self._lead(done)

    def _deliver(self, header: StepHeader) -> None:
        with self._lock:
            prepared = self._epochs.get(header.epoch)
            if prepared is None or header.epoch < self._last_epoch:
                return  # of an epoch that is over or never came: a bid stays unanswered and goes to the next leader
            self._last_epoch = header.epoch
            if self._committed is None or self._committed.epoch.number < header.epoch:
                self._committed = prepared  # the leader was told a little earlier
            self._leader_id = prepared.epoch.members[prepared.epoch.leader_rank].member_id
            if header.num_tokens[prepared.rank]:
                self._bid, self._last_source_step = None, header.step_id
        self._on_header(header)

    def _on_member_lost(self, member_id: str) -> None:
        epoch = self.epoch
        if not self._leads:
            return  # a former leader: its members have closed what they need no more
        if epoch and any(m.member_id == member_id for m in epoch.members):
            self._lose(member_id)
            self._trouble(epoch.number, ReplicaLost(f"control channel of {member_id!r} closed", member_id=member_id))

    def _lose(self, member_id: str) -> None:
        """A process is known to be gone: what waits for its GPU need not wait for its deadline."""
        for prepared in {id(p): p for p in (self._current, self._committed) if p is not None}.values():
            if isinstance(prepared.exchange, DeviceExchange):
                for rank, member in enumerate(prepared.epoch.members):
                    if member.member_id == member_id:
                        prepared.exchange.lose(rank, "its process is gone")

    def _trouble(self, epoch_number: int, error: ExpertMeshError) -> None:
        self._broken = epoch_number
        if self._on_trouble is not None:
            self._on_trouble(epoch_number, error)

    # -- epochs

    def _switch(self, prepared: _Prepared) -> None:
        """Under the lock, in the engine thread, between steps."""
        previous, self._current = self._current, prepared
        placement = prepared.epoch.placement
        if self._experts is not None:
            self._experts.use_placement(placement.version)
        if isinstance(prepared.exchange, DeviceExchange):
            prepared.exchange.use_placement(placement)
        self._load = np.zeros((placement.num_layers, placement.slots_per_rank), dtype=np.int64)
        leader_id = prepared.epoch.members[prepared.epoch.leader_rank].member_id
        idle = [self._channels.pop(name) for name in list(self._channels) if name != leader_id]
        if previous is not None and previous.exchange is not prepared.exchange:
            self._abort_replaced()
            self._replaced, self._replaced_steps = previous.exchange, 0
        for number in [n for n in self._epochs if n < prepared.epoch.number]:
            self._drop_epoch(number)
        if idle:  # closing joins a reader thread: not in a step
            threading.Thread(target=_close_all, args=(idle,), name="control-close", daemon=True).start()

    def _drop_epoch(self, number: int) -> None:
        """Under the lock. Forget an epoch that will not be entered any more; its exchange ends unless others use it."""
        exchange = self._epochs.pop(number).exchange
        if exchange is not self._replaced and all(exchange is not p.exchange for p in self._epochs.values()):
            exchange.abort()

    def _abort_replaced(self) -> None:
        """Under the lock, so beside it: to close Gloo's connections takes tens of milliseconds, steps of a stream."""
        replaced, self._replaced = self._replaced, None
        if isinstance(replaced, DeviceExchange):
            replaced.retire()
        elif replaced is not None:
            threading.Thread(target=replaced.abort, name="exchange-abort", daemon=True).start()

    def _build_exchange(self, epoch: Epoch, rank: int) -> Exchange | DeviceExchange:
        options = self._options
        least = max(options.buckets, default=0)
        return build_exchange(epoch, rank, self._shape, options.exchange, least, lambda: self._build_group(epoch, rank))

    def _build_group(self, epoch: Epoch, rank: int) -> ProcessGroup:
        """The wire; fault injection puts another one here (`bench/bit_flips.py`)."""
        timeout_s = self._options.exchange.epoch_timeout_s
        return build_gloo(epoch, rank, interface=self._options.interface, timeout_s=timeout_s)

    def _connect(self, leader: Member) -> None:
        with self._lock:
            if leader.member_id in self._channels:
                return
        channel = connect(
            self.member.member_id,
            leader.host,
            leader.control_port,
            interface=self._options.interface,
            cluster_token=self._options.cluster_token,
            on_frame=self._on_frame,
            on_lost=lambda _: self._on_leader_lost(leader.member_id),
        )
        with self._lock:
            self._channels[leader.member_id] = channel

    def _on_leader_lost(self, leader_id: str) -> None:
        with self._lock:
            lost = self._channels.pop(leader_id, None)
        epoch = self.epoch
        if lost is not None and epoch is not None and epoch.members[epoch.leader_rank].member_id == leader_id:
            self._lose(leader_id)
            gone = ReplicaLost(f"control channel to the leader {leader_id!r} closed", member_id=leader_id)
            self._trouble(epoch.number, gone)


def _same_table(new: Placement, old: Placement) -> bool:
    """A version names one table; loading and switching rely on it."""
    return new.version != old.version or new.physical_to_logical.equal(old.physical_to_logical)


def _close_all(channels: list[Channel]) -> None:
    for channel in channels:
        channel.close()


def _drop(header: StepHeader) -> None:
    """Before `start` nobody waits for headers."""
