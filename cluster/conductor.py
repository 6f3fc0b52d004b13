"""The Conductor: what the one restartable Ray actor around the membership core does (`conductor_client.py` makes it).

`membership.py` decides, `membership_host.py` keeps its clock and the members' mailboxes; this shell adds the last
report of each process and who waits for a change of the topology. All of it is soft. After a restart the members find
themselves unknown, join again with the epoch that they are in, and the highest is adopted; tokens flow meanwhile, since
no step needs the Conductor."""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from dataclasses import replace
from typing import Any

import ray

from ..config import ClusterConfig
from ..errors import EpochError, InvalidRequest
from ..experts.eplb import EplbConfig
from ..experts.placing import eplb_place
from ..model_config import ModelConfig
from ..model_source import describe_model
from ..router.epoch import Epoch
from ..router.placement import Placement
from ..router.status import ClusterState, Decision, ExpertRows, ProcessStatus, ScaleWish
from .membership import Membership, State
from .membership_host import MembershipHost
from .membership_messages import Command, Event, Join, Leave, Lost, PlacementRequested, PrepareFailed, Rejoin
from .rebalance import LoadBook, Rebalancer, Wish, answer
from .stray_workers import StrayWorkers

LOST_AFTER_S = 60.0  # a member that polls no more for so long is taken out of the next epoch
GATEWAY_STALE_S = 25.0  # gateways report every 10 s at least; one that is silent for so long is gone
CLOSING_PAUSE_S = 0.5
MAX_FAILURES = 20
MAX_DECISIONS = 50
MAX_SUSPECT_SPANS = 256
# Trying again cannot help.
_BROKEN_MODEL = ("CheckpointError", "ModelNotFound", "ChecksumMismatch", "DiskFull")
_HOPELESS = (*_BROKEN_MODEL, "ConfigError", "StartupError", "KernelError")
_log = logging.getLogger(__name__)


class Conductor:
    """Plain class of coroutines, which `conductor_client.ConductorActor` gives to Ray."""

    def __init__(self, config_text: str) -> None:
        self._config = ClusterConfig.from_json(config_text)
        model = describe_model(self._config.model, self._config.weights)
        self._eplb = EplbConfig(num_redundant=self._config.num_redundant_experts)
        self._book = LoadBook(model.num_layers, model.num_experts)
        self._rebalancer = Rebalancer(self._config.rebalance, self._eplb, self._book)
        self._placing: asyncio.Task[None] | None = None
        self._strays = StrayWorkers()
        self._sweeping: asyncio.Task[None] | None = None
        self._core, self._num_expert = membership_of(self._config, model, self._eplb, self._book)
        self._host = MembershipHost(self._core, on_change=self._on_change)
        self._polled_at: dict[str, float] = {}
        self._closing = asyncio.Event()
        self._reports: dict[str, ProcessStatus] = {}
        self._reported_at: dict[str, float] = {}
        self._failures: list[str] = []
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._num_returned = 0
        self._suspect_spans: deque[tuple[float, float]] = deque(maxlen=MAX_SUSPECT_SPANS)
        self._scale_wish: ScaleWish | None = None
        self._seen: tuple[Epoch | None, bool] = (None, False)
        self._version = time.time_ns()  # a restarted Conductor does not repeat versions that watchers have seen
        self._changed = asyncio.Event()  # replaced at each change: whoever waits holds the old one

    # ---- members (`member_agent.ConductorClient`)

    async def join(self, event: Join) -> None:
        if self._closing.is_set():
            await asyncio.sleep(CLOSING_PAUSE_S)
            return
        member_id = event.member.member_id
        if self._core.states.get(member_id) is State.DEAD:
            self._num_returned += 1
            self._note(f"{member_id} was given up and lives: it joins again")
        self._polled_at[member_id] = time.monotonic()
        await self._host.join(event)

    async def tell(self, event: Event) -> None:
        """A member's event: it has prepared, has committed, saw the epoch break, leaves."""
        if isinstance(event, PrepareFailed) and self._core.epoch is None and event.reason.startswith(_HOPELESS):
            await self.fail(event.member_id, event.reason)
        await self._host.tell(event)

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> tuple[int, list[Command]]:
        """What the member must do now, waited for. While the cluster ends, nobody is known: who leaves is let go."""
        self._polled_at[member_id] = time.monotonic()
        poll = asyncio.ensure_future(self._host.next_commands(member_id, after, timeout_s))
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait({poll, closing}, return_when=asyncio.FIRST_COMPLETED)
        closing.cancel()
        if self._closing.is_set():
            poll.cancel()
            return 0, [Rejoin(member_id)]
        self._polled_at[member_id] = time.monotonic()
        return await poll

    async def place(self, placement: Placement) -> None:
        """Serve by this table of experts from the next epoch on; same members, another version."""
        self._host.take(PlacementRequested(placement))

    async def rebalance(self, reason: str) -> str:
        """Place the experts anew now, by the loads seen so far; what came of it, in one line."""
        epoch = self._core.epoch
        wish = self._rebalancer.look(epoch, time.monotonic(), asked=reason) if epoch else None
        if epoch is None or wish is None:
            return "nothing to place: there are no two shards that serve in one epoch"
        return await self._place_anew(epoch, wish)

    async def drain(self, member_id: str) -> str:
        """Take one expert shard out in good order; its experts are served elsewhere first. InvalidRequest names who
        can be drained."""
        shards = [i for i, m in self._core.members.items() if m.expert and not m.attention]
        living = [i for i in shards if self._core.states.get(i) is not State.DEAD]
        if member_id not in living:
            raise InvalidRequest("member_id", member_id, f"one of the expert shards {', '.join(living) or '(none)'}")
        self._host.take(Leave(member_id))
        self._note(f"{member_id} drains: asked for")
        return f"{member_id} leaves; Serve starts a shard in its place"

    # ---- the number of shards (`autoscale.ServePolicy` asks and tells)

    async def scale(self, wish: ScaleWish) -> str:
        """From the next look of Serve's policy on: a fixed number of shards, or other bounds."""
        if not self._num_expert or self._config.layout == "colocated":
            raise InvalidRequest("layout", self._config.layout, "a cluster with a tier of expert shards")
        self._scale_wish = replace(wish, number=time.time_ns())
        self._note(f"{wish}: asked for")
        return str(wish)

    async def scale_wish(self) -> ScaleWish | None:
        return self._scale_wish

    async def decided(self, told: dict[str, Any]) -> None:
        """The policy changed its mind."""
        self._note(str(told["reason"]))
        epoch = self._core.epoch
        wish = self._rebalancer.look(epoch, time.monotonic(), asked="asked by the policy") if epoch else None
        if told.get("rebalance") and epoch is not None and wish is not None:
            self._begin(epoch, wish)

    def _note(self, text: str) -> None:
        _log.info("%s", text)
        self._decisions.append(Decision(at=time.time(), text=text))

    # ---- placing by load

    async def report_rows(self, rows: ExpertRows) -> None:
        """What an expert owner was asked for; may begin a rebalance."""
        self._book.take(rows)
        epoch = self._core.epoch
        if epoch is None or not self._core.ready or self._placing is not None:
            return
        wish = self._rebalancer.look(epoch, time.monotonic())
        if wish is not None:
            self._begin(epoch, wish)

    def _begin(self, epoch: Epoch, wish: Wish) -> None:
        if self._placing is None:
            self._placing = asyncio.create_task(self._place_quietly(epoch, wish))

    async def _place_quietly(self, epoch: Epoch, wish: Wish) -> None:
        try:
            await self._place_anew(epoch, wish)
        except EpochError as error:
            self._note(f"{wish.reason}: no placement: {error}")
        finally:
            self._placing = None

    async def _place_anew(self, epoch: Epoch, wish: Wish) -> str:
        self._rebalancer.changed(time.monotonic())  # the next look is an interval away, whatever comes of this one
        version = epoch.placement_version + 1  # for the plan only: the epoch that brings it in gives the real one
        plan = await asyncio.to_thread(answer, wish, epoch, self._config.rebalance, self._eplb, version)
        if not plan.moves or plan.predicted_gain < wish.min_gain:
            return f"{wish.reason}: no other placement is worth its copies ({plan.predicted_gain:.2f} x predicted)"
        if self._core.epoch is None or self._core.epoch.placement_version != epoch.placement_version:
            return f"{wish.reason}: the members changed meanwhile"
        text = (
            f"{wish.reason}: {len(plan.moves)} copies, max / mean to {plan.after.max_over_mean:.2f}, "
            f"{plan.predicted_gain:.2f} x predicted"
        )
        self._note(text)
        self._host.take(PlacementRequested(plan.placement))
        return text

    async def epoch(self) -> Epoch | None:
        """The epoch in force."""
        return self._core.epoch

    async def close(self) -> None:
        """The cluster ends: members may go without waiting for one another."""
        self._closing.set()

    def _give_up_silent(self) -> None:
        """Members that poll no more are dead. Looked at when others report: an idle Conductor needs no timer."""
        limit = time.monotonic() - LOST_AFTER_S
        for member_id in [i for i, at in self._polled_at.items() if at < limit]:
            del self._polled_at[member_id]
            self._reports.pop(member_id, None)
            self._host.take(Lost(member_id))
        stale = time.monotonic() - GATEWAY_STALE_S
        for name in [
            p.name for p in self._reports.values() if p.role == "gateway" and self._reported_at[p.name] < stale
        ]:
            self._drop(name)

    def _look_for_strays(self) -> None:
        """Looked at when others report, as above; one look at a time."""
        if ray.is_initialized() and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.create_task(self._end_strays())

    async def _end_strays(self) -> None:
        try:
            for line in await self._strays.look():
                self._note(line)
        except (ray.exceptions.RayError, RuntimeError) as error:
            _log.warning("could not look for stray workers: %s", error)  # the GCS is away: the next look is soon

    def _drop(self, name: str) -> None:
        del self._reports[name], self._reported_at[name]
        self._notify()

    # ---- reports and the topology

    async def report(self, status: ProcessStatus) -> None:
        """Take a process's present numbers; wakes the watchers when who serves where changed."""
        known = self._reports.get(status.name)
        for other in [p for p in self._reports.values() if _takes_place_of(status, p)]:
            self._drop(other.name)
        self._reports[status.name] = status
        self._reported_at[status.name] = time.monotonic()
        self._give_up_silent()
        self._look_for_strays()
        suspect = [span for span in status.suspect_spans if span not in self._suspect_spans]
        self._suspect_spans.extend(suspect)
        if known is None or _serving(known) != _serving(status) or suspect:
            self._notify()

    async def forget(self, name: str) -> None:
        """A process ends in good order."""
        self._reported_at.pop(name, None)
        self._polled_at.pop(name, None)
        if self._reports.pop(name, None) is not None:
            self._notify()

    async def fail(self, name: str, message: str) -> None:
        """A process could not start. The driver that waits for READY ends with this message."""
        self._failures = [*self._failures, f"{name}: {message}"][-MAX_FAILURES:]
        self._notify()

    async def state(self) -> ClusterState:
        now = time.monotonic()
        epoch = self._core.epoch
        ranks: dict[str, int] = {}
        if epoch is not None:
            ep_ranks = {rank: ep_rank for ep_rank, rank in enumerate(epoch.expert_ranks)}
            ranks = {m.member_id: ep_ranks.get(rank, -1) for rank, m in enumerate(epoch.members)}
        processes = tuple(p for p in map(self._with_state, self._reports.values()) if p.state != "dead")
        num_gateways = sum(p.role == "gateway" and p.state == "ready" for p in processes)
        return ClusterState(
            version=self._version,
            epoch=epoch.number if epoch else 0,
            placement_version=epoch.placement_version if epoch else 0,
            ranks=ranks,
            processes=processes,
            ages_s={name: now - at for name, at in self._reported_at.items()},
            failures=tuple(self._failures),
            ready=self._core.ready and num_gateways >= self._config.num_gateways,
            summary=self._summary(processes, num_gateways),
            conductor_pid=os.getpid(),
            decisions=tuple(self._decisions),
            num_returned=self._num_returned,
            suspect_spans=tuple(self._suspect_spans),
        )

    async def watch(self, version: int, timeout_s: float) -> ClusterState:
        """The state as soon as it is newer than `version`, or as it is after `timeout_s`."""
        if self._version == version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
        return await self.state()

    def _on_change(self) -> None:
        """After every event of the core: wake the watchers where the epoch or readiness is another."""
        seen = (self._core.epoch, self._core.ready)
        if seen != self._seen:
            if seen[0] is not None and seen[0] is not self._seen[0]:
                self._rebalancer.changed(time.monotonic())
                self._book.learn(seen[0])
            self._seen = seen
            self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _with_state(self, process: ProcessStatus) -> ProcessStatus:
        """A member's own report says what it does; whether it serves is the membership's to say."""
        state = self._core.states.get(process.name)
        return process if state is None else replace(process, state=state.value)

    def _summary(self, processes: tuple[ProcessStatus, ...], num_gateways: int) -> str:
        config = self._config
        joined = [m for name, m in self._core.members.items() if self._core.states.get(name) is not State.DEAD]
        parts = [f"attention {sum(m.attention for m in joined)}/{config.num_attention_replicas}"]
        if self._num_expert:
            parts.append(f"experts {sum(m.expert for m in joined)}/{self._num_expert}")
        parts.append(f"gateways {num_gateways}/{config.num_gateways}")
        if self._core.epoch is not None:
            parts.append(f"epoch {self._core.epoch.number}")
        elif self._core.changing:
            parts.append("forming the first epoch")
        if self._core.last_failure:
            parts.append(self._core.last_failure)
        parts += [p.detail for p in processes if p.state in ("loading", "joining") and p.detail]
        return ", ".join(parts)


def membership_of(
    config: ClusterConfig, model: ModelConfig, eplb: EplbConfig, book: LoadBook
) -> tuple[Membership, int]:
    """The core for this configuration, and how many expert owners its first epoch waits for."""
    num_expert = config.num_expert_ranks if model.num_experts else 0
    core = Membership(
        num_attention=config.num_attention_replicas,
        num_expert=num_expert,
        place=eplb_place(
            model.num_layers,
            model.num_experts,
            eplb,
            loads=lambda: book.history,
            moe_layers=tuple(model.moe_layer_ids),
        ),
        make_key=lambda: secrets.token_hex(16),
        prepare_timeout_s=max(config.startup_timeout_s, config.exchange.epoch_timeout_s),
        commit_timeout_s=config.exchange.epoch_timeout_s,
    )
    return core, num_expert


def _serving(status: ProcessStatus) -> tuple[str, str, str, int]:
    """The part of a report that decides where gateways dial and whether the start is complete."""
    return status.role, status.state, status.address, status.epoch


def _takes_place_of(new: ProcessStatus, old: ProcessStatus) -> bool:
    """A gateway that listens where another one did: that one is dead."""
    return new.role == old.role == "gateway" and new.name != old.name and new.address == old.address != ""
