"""What is known about each process of a cluster: reported by it, collected by the Conductor, shown by a gateway.

It is soft state: a report replaces the last one, nothing is decided from it except where gateways dial and whether the
start is complete. Membership itself is the epoch's (`epoch.py`)."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from ..errors import ExpertMeshError, Unavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """One report. `state`: loading, joining, ready, draining. The counters are those of MemberStatus."""

    name: str  # member id, or gateway id
    role: str  # attention, expert, colocated, gateway
    state: str = "loading"
    detail: str = ""  # what it is doing, for people: "1.2 of 3.1 GB"
    pid: int = 0
    node: str = ""
    address: str = ""  # host:port of the link (attention) or of the public service (gateway)
    epoch: int = 0  # the epoch in force in this process, 0 = none yet
    # attention
    num_running: int = 0
    num_waiting: int = 0
    num_free_kv_blocks: int = 0
    num_kv_blocks: int = 0
    num_steps: int = 0  # since start
    step_s: float = 0.0  # seconds in them
    exchange_s: float = 0.0  # of step_s: moving rows, and waiting for those who compute them
    # expert
    num_physical_experts: int = 0
    num_rows: int = 0  # (token, expert) rows computed since start
    busy_fraction: float = 0.0  # computing rows / wall, over the last window
    weight_bytes: int = 0
    faults: str = ""  # damaged rows and weights that were found here since start, for people; "" = none
    suspect_spans: tuple[tuple[float, float], ...] = ()  # unix seconds in which damaged weights were used here

    @property
    def attention(self) -> bool:
        return self.role in ("attention", "colocated")

    @property
    def expert(self) -> bool:
        return self.role in ("expert", "colocated")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertRows:
    """Rows that a member has computed in each of its slots since this placement came into force."""

    name: str
    placement_version: int
    rows: "npt.NDArray[np.int64]"  # [num_layers, slots_per_rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the cluster decided about itself, and why: a number of shards, or a placement."""

    at: float  # seconds since 1970
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleWish:
    """What an operator asked the expert tier to be: so many shards, or automatic within bounds."""

    num_shards: int = 0  # 0 = automatic
    min_shards: int = 0  # bounds of the automatic number; 0 = as configured
    max_shards: int = 0
    number: int = 0  # a later wish has a higher one

    def __str__(self) -> str:
        if self.num_shards:
            return f"{self.num_shards} shards"
        return f"{self.min_shards or 'the configured least'} to {self.max_shards or 'the configured most'} shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """The Conductor's view. `version` grows when who serves where changes, not with every load figure."""

    version: int = 0
    epoch: int = 0
    placement_version: int = 0
    ranks: dict[str, int] = field(default_factory=dict)  # member id -> ep_rank in the epoch, -1 = owns no experts
    processes: tuple[ProcessStatus, ...] = ()
    ages_s: dict[str, float] = field(default_factory=dict)  # name -> seconds since its last report
    failures: tuple[str, ...] = ()  # starts that failed, oldest first: "<process>: <error>: <message>"
    ready: bool = False  # all processes of the configuration serve in one epoch
    summary: str = ""  # one line for people
    conductor_pid: int = 0
    decisions: tuple[Decision, ...] = ()  # the last ones, oldest first
    suspect_spans: tuple[tuple[float, float], ...] = ()  # of all processes, the last ones
    num_returned: int = 0  # members that were given up and lived: false suspicions, and processes stopped for a while

    @property
    def gateways(self) -> tuple[str, ...]:
        return tuple(sorted(p.address for p in self.processes if p.role == "gateway" and p.state == "ready"))

    @property
    def links(self) -> dict[str, str]:
        """Member id -> link address of the attention members that serve in the epoch."""
        return {p.name: p.address for p in self.processes if p.attention and p.address and p.name in self.ranks}


class ConductorLink(Protocol):
    """The Conductor as a process sees it. Every call raises Unavailable while it restarts: then try again later."""

    async def report(self, status: ProcessStatus) -> None: ...

    async def report_rows(self, rows: ExpertRows) -> None: ...

    async def forget(self, name: str) -> None: ...

    async def fail(self, name: str, message: str) -> None: ...

    async def state(self) -> ClusterState: ...

    async def watch(self, version: int, timeout_s: float) -> ClusterState: ...


async def report_forever(
    conductor: ConductorLink,
    read: Callable[[], ProcessStatus],
    *,
    interval_s: float = 1.0,
    heartbeat_s: float = 10.0,
) -> None:
    """Send `read()` when it has changed, looked at every `interval_s`, and at least every `heartbeat_s`.

    An idle process costs one small call a heartbeat. A Conductor that restarts misses nothing: each report is whole."""
    sent: ProcessStatus | None = None
    sent_at = 0.0
    while True:
        status = read()
        if status != sent or monotonic() - sent_at >= heartbeat_s:
            try:
                await conductor.report(status)
                sent, sent_at = status, monotonic()
            except Unavailable:
                pass  # it restarts; soft state is sent again
        await asyncio.sleep(interval_s)


async def report_rows_forever(
    conductor: ConductorLink, read: Callable[[], ExpertRows | None], *, interval_s: float = 2.0
) -> None:
    """Send an expert owner's row counts where they have changed. What is lost with a Conductor comes with the next
    report, since each is whole."""
    sent = 0, 0  # placement version, all rows
    while True:
        await asyncio.sleep(interval_s)
        rows = read()
        if rows is None or (rows.placement_version, int(rows.rows.sum())) == sent:
            continue
        with contextlib.suppress(Unavailable):
            await conductor.report_rows(rows)
            sent = rows.placement_version, int(rows.rows.sum())


async def report_failure(conductor: ConductorLink, name: str, error: BaseException) -> None:
    """Tell why this process could not start; the caller raises. Nobody to tell is not worth hiding the error for."""
    with contextlib.suppress(Unavailable):
        await conductor.fail(name, describe_error(error))


def describe_error(error: BaseException) -> str:
    """One line for people: our errors by their message, others with their type and place."""
    if isinstance(error, ExpertMeshError):
        return f"{type(error).__name__}: {error}"
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__}: {error}{where}"
