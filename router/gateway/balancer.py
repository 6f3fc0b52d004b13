"""Which attention replica gets a request, or none. Pure: views in, name out.

A conversation goes where its KV is unless that replica is clearly busier than the best one: a prefix found saves
prefill, but not at the price of a queue. Load is what waits first, then what runs; each view adds the requests that
this gateway sent since the replica last reported, so a burst between two reports spreads out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...errors import NoReplica, QueueFull
from ...request import EngineLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerConfig:
    max_num_waiting: int = 1024  # queue bound of one replica
    affinity_slack: int = 4  # requests that a conversation's replica may be behind the best one
    retry_after_s: float = 1.0  # told to those who are shed
    # When a replica has room. What it has not room for waits at the gateway, where the order is fair (`tier.py`).
    max_num_seqs: int = 256  # requests that a replica runs at once
    queue_ahead: int = 8  # requests that may wait at a replica, so that it never starves between two reports
    max_unreported_tokens: int = 4096  # prompt tokens sent since its last report: about two steps of prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica as a gateway sees it."""

    replica_id: str
    connected: bool
    load: EngineLoad
    num_unreported: int = 0  # requests sent by this gateway since `load` was reported
    num_unreported_tokens: int = 0  # of their prompts

    @property
    def num_waiting(self) -> int:
        return self.load.num_waiting + self.num_unreported

    @property
    def depth(self) -> int:
        return self.load.num_running + self.num_waiting


def has_room(replica: ReplicaView, config: BalancerConfig) -> bool:
    """Whether it would start one more request soon."""
    return (
        replica.load.num_waiting <= config.queue_ahead
        and replica.depth < config.max_num_seqs + config.queue_ahead
        and replica.num_unreported_tokens < config.max_unreported_tokens
    )


def pick_with_room(replicas: Sequence[ReplicaView], config: BalancerConfig, *, affinity: str = "") -> str | None:
    """As `pick`, among those that have room; None: none has. NoReplica: none can be reached."""
    roomy = [r for r in replicas if r.connected and not r.load.draining and has_room(r, config)]
    if not roomy and any(r.connected and not r.load.draining for r in replicas):
        return None
    return pick(roomy, config, affinity=affinity)


def pick(
    replicas: Sequence[ReplicaView], config: BalancerConfig, *, affinity: str = "", excluded: Collection[str] = ()
) -> str:
    """The replica to send to. NoReplica: none can be reached; QueueFull: every queue is full."""
    reachable = [r for r in replicas if r.connected and not r.load.draining]
    if not reachable:
        raise NoReplica(
            f"none of {len(replicas)} attention replicas can take a request (lost or draining); try again",
            retry_after_s=config.retry_after_s,
        )
    open_ = [r for r in reachable if r.num_waiting < config.max_num_waiting and r.replica_id not in excluded]
    if not open_:
        waiting = sum(r.num_waiting for r in reachable)
        raise QueueFull(
            f"{waiting} requests wait on {len(reachable)} attention replicas, {config.max_num_waiting} each at most; "
            f"try again in {config.retry_after_s:g} s",
            retry_after_s=config.retry_after_s,
        )
    best = min(open_, key=_cost)
    for replica in open_:
        if replica.replica_id == affinity and replica.depth <= best.depth + config.affinity_slack:
            return affinity
    return best.replica_id


def _cost(replica: ReplicaView) -> tuple[int, int, int, str]:
    """Queue, then everything in the replica, then KV in use; the name makes ties the same everywhere."""
    used = replica.load.num_kv_blocks - replica.load.num_free_kv_blocks
    return replica.num_waiting, replica.depth, used, replica.replica_id
