"""Give back what Ray keeps for actors that a former control store (GCS) had begun.

A GCS that dies between a raylet's lease of a worker and the actor's creation asks for another worker when it is back,
and the first stays leased: the clean-up after a restart passes over workers without an actor (Ray's issues 56019 and
66199, open for 2.60). That process idles for ever, and holds what was leased with it: a gateway's place on its node, a
unit of a role, a GPU. Serve then waits for ever for a place. A stray worker looks like one of Ray's pool, and those may
go too: Ray starts another. So where a replica has waited for a worker for longer than a start takes, every process of
its job that idles on any node is ended."""

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterable
from typing import Any

import psutil
import ray
from ray._private.state import actors  # what `ray list actors` shows, which needs Ray's dashboard
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_S = 5.0  # a look costs a call to the GCS
WAITS_S = 8.0  # a worker is there within seconds
AGAIN_S = 30.0  # who waits for a host that is to come costs a sweep so often
SWEEP_S = 30.0
IDLE_S = 1.0  # who idles at both ends of so long has not just been leased
IDLE_TITLE = "ray::IDLE"
_REPLICA = "SERVE_REPLICA::"


class Waiting:
    """Which replicas wait for a worker, and whether it is time to do something about it. Pure."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def too_long(self, names: Collection[str], now: float) -> list[str]:
        """Those among `names`, which wait now, that have waited too long; each again after a while."""
        self._due = {name: self._due.get(name, now + WAITS_S) for name in names}
        late = sorted(name for name, due in self._due.items() if due <= now)
        self._due |= dict.fromkeys(late, now + AGAIN_S)
        return late


class StrayWorkers:
    """The Conductor's part: it looks when others report, so that an idle cluster needs no timer."""

    def __init__(self) -> None:
        self._waiting = Waiting()
        self._looked_at = float("-inf")

    async def look(self) -> list[str]:
        """At most every LOOK_S: end stray workers where a replica waits too long. What was done, for people."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return []
        self._looked_at = now
        waiting = await asyncio.to_thread(replicas_without_a_worker)
        late = self._waiting.too_long(waiting, now)
        return await end_stray_workers({waiting[name] for name in late}) if late else []


def replicas_without_a_worker() -> dict[str, str]:
    """Names of the Serve replicas that have been asked for and do not run yet, with their jobs."""
    pending = actors(actor_state_name="PENDING_CREATION").values()
    return {actor["Name"]: actor["JobID"] for actor in pending if actor["Name"].startswith(_REPLICA)}


async def end_stray_workers(jobs: Collection[str]) -> list[str]:
    """On every living node; a node that does not answer in time is passed over."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
    sweep = ray.remote(num_cpus=0, max_retries=0)(end_idle)
    calls = {}
    for node_id, address in nodes.items():
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        calls[asyncio.wrap_future(sweep.options(scheduling_strategy=here).remote(sorted(jobs)).future())] = address
    done, _ = await asyncio.wait(calls, timeout=SWEEP_S)
    ended = {calls[call]: call.result() for call in done if call.exception() is None}
    return [f"node {address}: ended {len(pids)} idle workers of Ray" for address, pids in ended.items() if pids]


def end_idle(jobs: Collection[str]) -> list[int]:
    """This node's workers of these jobs that idle now and a moment later; their pids. Runs in a worker."""
    raylet = psutil.Process(os.getppid())
    before = idle_workers(raylet.children(), jobs)
    time.sleep(IDLE_S)
    strays = [process for process in idle_workers(raylet.children(), jobs) if process in before]
    for process in strays:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [process.pid for process in strays]


def idle_workers(processes: Iterable[Any], jobs: Collection[str]) -> list[Any]:
    """Those among a raylet's children that have a job and do nothing."""
    found = []
    for process in processes:
        try:
            if process.cmdline()[:1] == [IDLE_TITLE] and process.environ().get("RAY_JOB_ID") in jobs:
                found.append(process)
        except psutil.Error:
            continue  # it has ended
    return found
