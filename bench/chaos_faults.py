"""The faults of `chaos.py`: each picks a victim with a seeded generator, strikes, and says when and whom."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .chaos_world import HANG_S, ChaosWorld

STOPPED_S = HANG_S + 3.0  # a stopped process goes on after so long
REDIS_AWAY_S = 1.5
GCS_AWAY_S = 4.0
SUCCESSOR_S = 10.0  # Serve looks every 2 s


@dataclass(frozen=True, slots=True)
class FaultReport:
    fault: str
    victim: str
    at: float | None  # monotonic; None = there was nobody to strike

    def __str__(self) -> str:
        return f"{self.fault}: {self.victim or 'nobody there'}"


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    hit: Callable[[ChaosWorld, random.Random], tuple[str, float] | None]  # victim and moment

    def strike(self, world: ChaosWorld, draw: random.Random) -> FaultReport:
        victim, at = self.hit(world, draw) or ("", None)
        return FaultReport(self.name, victim, at)


def _kill(role: str) -> Callable[[ChaosWorld, random.Random], tuple[str, float] | None]:
    def hit(world: ChaosWorld, draw: random.Random) -> tuple[str, float] | None:
        victims = world.serving(role)
        if not victims:
            return None
        victim = draw.choice(sorted(victims, key=lambda p: p.name))
        return _signal(victim.pid, victim.name, signal.SIGKILL)

    return hit


def _stop(role: str) -> Callable[[ChaosWorld, random.Random], tuple[str, float] | None]:
    def hit(world: ChaosWorld, draw: random.Random) -> tuple[str, float] | None:
        victims = world.serving(role)
        if not victims:
            return None
        victim = draw.choice(sorted(victims, key=lambda p: p.name))
        stopped = _signal(victim.pid, victim.name, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        _signal(victim.pid, victim.name, signal.SIGCONT)
        return stopped

    return hit


def _kill_pair(*roles: str) -> Callable[[ChaosWorld, random.Random], tuple[str, float] | None]:
    """One of each role at the same moment."""

    def hit(world: ChaosWorld, draw: random.Random) -> tuple[str, float] | None:
        found = [(_kill_conductor if role == "conductor" else _kill(role))(world, draw) for role in roles]
        struck = [f for f in found if f is not None]
        return (" and ".join(name for name, _ in struck), struck[0][1]) if struck else None

    return hit


def _kill_conductor(world: ChaosWorld, _draw: random.Random) -> tuple[str, float] | None:
    state = world.state()
    return _signal(state.conductor_pid, "conductor", signal.SIGKILL) if state else None


def _kill_serve_controller(_world: ChaosWorld, _draw: random.Random) -> tuple[str, float] | None:
    import ray

    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return _signal(ray.get(controller.get_pid.remote(), timeout=5.0), "Serve controller", signal.SIGKILL)
    return None


def _kill_gcs(world: ChaosWorld, _draw: random.Random) -> tuple[str, float]:
    at = time.monotonic()
    pid = world.nodes[0].kill_gcs()
    time.sleep(GCS_AWAY_S)
    world.nodes[0].start_gcs()
    return f"Ray's control store ({pid})", at


def _kill_gateway_and_gcs(world: ChaosWorld, draw: random.Random) -> tuple[str, float] | None:
    """The control store dies while it makes the gateway's successor: Ray keeps what that one was to have."""
    from ray._private.state import actors

    struck = _kill("gateway")(world, draw)
    deadline = time.monotonic() + SUCCESSOR_S
    while struck and not actors(actor_state_name="PENDING_CREATION") and time.monotonic() < deadline:
        time.sleep(0.01)
    return (f"{struck[0]} and {_kill_gcs(world, draw)[0]}", struck[1]) if struck else None


def _kill_node(world: ChaosWorld, draw: random.Random) -> tuple[str, float] | None:
    index, at = draw.randrange(1, len(world.nodes)), time.monotonic()  # not the head: it has Ray's control store
    world.replace_node(index)
    return f"node {index}", at


def _kill_redis(world: ChaosWorld, _draw: random.Random) -> tuple[str, float] | None:
    at = time.monotonic()
    world.redis.kill()
    time.sleep(REDIS_AWAY_S)
    world.redis.start()
    return "redis", at


def _stop_redis(world: ChaosWorld, _draw: random.Random) -> tuple[str, float] | None:
    at = time.monotonic()
    world.redis.pause()
    time.sleep(REDIS_AWAY_S)
    world.redis.go_on()
    return "redis", at


def _signal(pid: int, name: str, number: signal.Signals) -> tuple[str, float] | None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return None
    return f"{name} ({pid})", time.monotonic()


FAULTS = (
    Fault("shard-kill", _kill("expert")),
    Fault("shard-kill-again", _kill("expert")),
    Fault("shard-stop", _stop("expert")),
    Fault("attention-kill", _kill("attention")),
    Fault("attention-stop", _stop("attention")),
    Fault("gateway-kill", _kill("gateway")),
    Fault("conductor-kill", _kill_conductor),
    Fault("serve-controller-kill", _kill_serve_controller),
    Fault("gcs-kill", _kill_gcs),
    Fault("gateway-and-gcs-kill", _kill_gateway_and_gcs),
    Fault("node-kill", _kill_node),
    Fault("redis-kill", _kill_redis),
    Fault("redis-stop", _stop_redis),
    Fault("shard-and-conductor-kill", _kill_pair("expert", "conductor")),
    Fault("shard-and-attention-kill", _kill_pair("expert", "attention")),
    Fault("attention-and-gateway-kill", _kill_pair("attention", "gateway")),
)
