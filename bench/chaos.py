"""`make chaos`: streams through a cluster whose processes are killed and stopped every few seconds.

The demo model on three Ray nodes of this host (each with a loopback address of its own): 2 attention replicas, 4 shards
with a redundant copy of every expert, a gateway on each node, Redis with persistence. First every request runs
undisturbed; then the same requests run again and again, 32 at a time, while a seeded series of faults strikes. Held to:
every stream completes, token by token what the undisturbed run said, and afterwards nothing is left over.

With a fault every few seconds a shard is often killed while the only other copy of its experts is away too, and
streams wait for a process to start. So the pause of a fault, where a copy lives, is measured in a second part: shards
are killed and stopped one at a time, each when the cluster is whole again, under the same load.

    python -P -m expertmesh.bench.chaos [--minutes 6] [--measured 12] [--streams 500] [--seed 1] [--only shard-kill,...]

`tests/test_chaos.py` is a cut of a minute on two nodes, with the kinds that need no node or control store to die.

Exits 1 where it falls short; the last line is one JSON object of figures."""

import argparse
import asyncio
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..client import AnswerDelta, AsyncClient, ReasoningDelta, ToolCallDelta
from ..errors import ExpertMeshError
from .chaos_faults import FAULTS, Fault, FaultReport
from .chaos_world import HANG_S, NUM_NODES, ChaosWorld, leftovers, mark_processes, processes_now

CONCURRENCY = 32
NUM_REQUESTS = 64
PAUSE_S = (2.0, 5.0)  # between two faults
OVERTIME_S = 60.0  # for kinds that have struck nobody yet
STREAM_TIMEOUT_S = 180.0
MEASURED = ("shard-kill", "shard-kill", "shard-kill", "shard-stop")  # in turn, in the second part
AFTERMATH_S = 1.0  # a wait that begins so long after a strike may be its own
_BEGAN_AT = time.monotonic()
LIMITS = {"kill_p50_s": 0.5, "kill_p99_s": 2.0, "stop_s": HANG_S + 0.5}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request that may be made again and says the same."""

    text: str
    thinking: str
    temperature: float
    seed: int


@dataclass(slots=True)
class Outcome:
    """What one stream said, and when its tokens came."""

    token_ids: list[int] = field(default_factory=list)
    came_at: list[float] = field(default_factory=list)
    began_at: float = 0.0
    error: str = ""

    def pause_around(self, moment: float) -> float | None:
        """The longest wait in which `moment` was, or that began soon after it; None where no token was due."""
        pairs = zip(self.came_at, self.came_at[1:], strict=False)
        return max((b - a for a, b in pairs if b > moment and a < moment + AFTERMATH_S), default=None)


def asks(seed: int, count: int = NUM_REQUESTS) -> list[Ask]:
    """Questions that the demo model thinks about, half of them sampled with a seed."""
    draw = random.Random(seed)
    return [
        Ask(
            f"What is {draw.randint(10, 9999)} {draw.choice('+-')} {draw.randint(10, 9999)}?",
            draw.choice(("on", "on", "on", "off")),
            draw.choice((0.0, 0.9)),
            i,
        )
        for i in range(count)
    ]


async def run_stream(client: AsyncClient, ask: Ask) -> Outcome:
    outcome = Outcome(began_at=time.monotonic())
    try:
        stream = client.generate(
            ask.text,
            thinking=ask.thinking,  # type: ignore[arg-type]
            temperature=ask.temperature,
            seed=ask.seed,
            max_tokens=400,
            include_token_ids=True,
            resumable=True,
            timeout_s=STREAM_TIMEOUT_S,
        )
        async for event in stream:
            if isinstance(event, AnswerDelta | ReasoningDelta | ToolCallDelta):
                outcome.token_ids += event.token_ids
                outcome.came_at += [time.monotonic()] * len(event.token_ids)
        if stream.finished is None:
            outcome.error = "the stream ended without a last event"
    except ExpertMeshError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def strike(
    world: ChaosWorld, draw: random.Random, faults: Sequence[Fault], pause_s: Sequence[float], ends_at: float
) -> list[FaultReport]:
    """Fault after fault until `ends_at`, and until each kind has struck somebody. Each comes once in a random order
    before any comes again; one that finds nobody (its victim of a moment ago is away still) comes after the others."""
    reports: list[FaultReport] = []
    deck: list[Fault] = []
    owed = {fault.name for fault in faults}
    while time.monotonic() < (ends_at + OVERTIME_S if owed else ends_at):
        await asyncio.sleep(draw.uniform(*pause_s))
        if not deck:
            deck = draw.sample(list(faults), len(faults))
        fault = deck.pop()
        report = await asyncio.to_thread(fault.strike, world, draw)
        say(f"{report}")
        if report.at is None:
            deck.insert(0, fault)
            continue
        reports.append(report)
        owed.discard(fault.name)
    return reports


async def strike_whole(world: ChaosWorld, draw: random.Random, count: int) -> tuple[list[FaultReport], int]:
    """`count` faults of shards, each when every expert has its two copies; and how many members were given up that
    nobody had struck."""
    reports: list[FaultReport] = []
    num_stopped = 0
    if not count:
        return reports, 0
    await asyncio.to_thread(world.wait_whole)  # who was stopped before is back
    before = await asyncio.to_thread(world.num_returned)
    by_name = {fault.name: fault for fault in FAULTS}
    for name, _ in zip(itertools.cycle(MEASURED), range(count)):
        whole = await asyncio.to_thread(world.wait_whole)
        await asyncio.sleep(draw.uniform(1.0, 2.0))
        reports.append(await asyncio.to_thread(by_name[name].strike, world, draw))
        say(f"{'whole' if whole else 'NOT WHOLE'}: {reports[-1]}")
        await asyncio.sleep(2.0)  # until everybody knows
        num_stopped += name == "shard-stop"
        if not whole:
            reports.pop()
    await asyncio.to_thread(world.wait_whole)
    return reports, max(0, await asyncio.to_thread(world.num_returned) - before - num_stopped)


async def run(arguments: argparse.Namespace, world: ChaosWorld) -> dict[str, Any]:
    draw = random.Random(arguments.seed)
    wanted = asks(arguments.seed, arguments.requests)
    faults = [f for f in FAULTS if not arguments.only or f.name in arguments.only.split(",")]
    async with AsyncClient(world.gateways) as client:
        limit = asyncio.Semaphore(CONCURRENCY)

        async def limited(ask: Ask) -> Outcome:
            async with limit:
                return await run_stream(client, ask)

        began_at = time.monotonic()
        truth = await asyncio.gather(*map(limited, wanted))
        if failed := [o.error for o in truth if o.error]:
            raise SystemExit(f"undisturbed streams failed: {failed[0]}")
        num_tokens = sum(len(o.token_ids) for o in truth)
        say(f"undisturbed: {len(truth)} streams, {num_tokens} tokens in {time.monotonic() - began_at:.1f} s")
        ends_at = time.monotonic() + 60.0 * arguments.minutes
        outcomes: list[tuple[int, Outcome]] = []

        async def both_parts() -> tuple[list[FaultReport], tuple[list[FaultReport], int]]:
            mixed = await strike(world, draw, faults, arguments.pause, ends_at)
            return mixed, await strike_whole(world, draw, arguments.measured)

        striking = asyncio.create_task(both_parts())

        async def worker() -> None:
            while not striking.done() or len(outcomes) + CONCURRENCY <= arguments.streams:
                index = draw.randrange(len(wanted))
                outcomes.append((index, await run_stream(client, wanted[index])))

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
        reports, (measured, num_false) = await striking
    broken = [(i, o) for i, o in outcomes if o.error]
    other = [(i, o) for i, o in outcomes if not o.error and o.token_ids != truth[i].token_ids]
    for index, outcome in broken[:5] + other[:5]:
        say(f"stream of {wanted[index]}: {outcome.error or 'other tokens'} ({len(outcome.token_ids)} tokens)")
    return {
        "streams": len(outcomes),
        "complete": len(outcomes) - len(broken),
        "identical": len(outcomes) - len(broken) - len(other),
        "tokens": sum(len(o.token_ids) for _, o in outcomes),
        "faults": {f.name: sum(r.fault == f.name for r in reports) for f in faults},
        "pauses": pauses(reports, [o for _, o in outcomes]),
        "given_up_without_a_fault": num_false,
        "pauses_where_a_copy_lives": pauses(measured, [o for _, o in outcomes]),
    }


def pauses(reports: Sequence[FaultReport], outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """By kind of fault: the longest wait of any stream around each strike, median and 99th percentile over strikes."""
    found: dict[str, list[float]] = {}
    for report in reports:
        if report.at is None:
            continue
        waits = [p for o in outcomes if (p := o.pause_around(report.at)) is not None]
        if waits:
            found.setdefault(report.fault, []).append(max(waits))
    return {
        name: {
            "n": len(waits),
            "p50_s": round(statistics.median(waits), 3),
            "p99_s": round(sorted(waits)[min(len(waits) - 1, int(0.99 * len(waits)))], 3),
        }
        for name, waits in found.items()
    }


def verdict(figures: dict[str, Any], streams: int) -> list[str]:
    """What falls short. Pauses are goals: reported, and named here only as such by `goals_missed`."""
    wrong = []
    if figures["streams"] < streams:
        wrong.append(f"{figures['streams']} streams ran, {streams} were wanted")
    if figures["complete"] < figures["streams"]:
        wrong.append(f"{figures['streams'] - figures['complete']} streams did not complete")
    if figures["identical"] < figures["complete"]:
        wrong.append(f"{figures['complete'] - figures['identical']} streams said other tokens")
    if missed := [name for name, count in figures["faults"].items() if not count]:
        wrong.append(f"never struck anybody: {missed}")
    if figures["given_up_without_a_fault"]:
        wrong.append(f"{figures['given_up_without_a_fault']} members were given up that nobody had struck")
    if figures["left"]:
        wrong.append(f"left over: {figures['left']}")
    return wrong


def goals_missed(figures: dict[str, Any]) -> list[str]:
    missed = []
    found = figures["pauses_where_a_copy_lives"]
    kill, stop = found.get("shard-kill"), found.get("shard-stop")
    if kill and kill["p50_s"] > LIMITS["kill_p50_s"]:
        missed.append(f"pause of a shard's SIGKILL p50 {kill['p50_s']} s, goal {LIMITS['kill_p50_s']} s")
    if kill and kill["p99_s"] > LIMITS["kill_p99_s"]:
        missed.append(f"pause of a shard's SIGKILL p99 {kill['p99_s']} s, goal {LIMITS['kill_p99_s']} s")
    if stop and stop["p99_s"] > LIMITS["stop_s"]:
        missed.append(f"pause of a shard's SIGSTOP {stop['p99_s']} s, goal {LIMITS['stop_s']} s")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of all kinds of faults")
    parser.add_argument("--measured", type=int, default=12, help="faults of shards after that, each on a whole cluster")
    parser.add_argument("--streams", type=int, default=500, help="at least so many")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="that differ; each runs undisturbed first")
    parser.add_argument("--nodes", type=int, default=NUM_NODES, help="Ray nodes, with a gateway each")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=PAUSE_S, metavar=("LEAST", "MOST"), help="seconds between two faults"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="FAULT,...", help=f"of {', '.join(f.name for f in FAULTS)}")
    arguments = parser.parse_args()
    mark_processes()
    before = processes_now()
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        ChaosWorld(Path(folder), say, num_nodes=arguments.nodes) as world,
    ):
        # SIGTERM ends what was started; set here, since Ray's start puts its own handler, which ends at once.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        figures = asyncio.run(run(arguments, world))
        figures["left"] = world.not_settled()
    figures["left"] += leftovers(before)
    figures["seed"], figures["hang_deadline_s"] = arguments.seed, HANG_S
    wrong = verdict(figures, arguments.streams)
    figures["goals_missed"] = goals_missed(figures)
    for line in wrong:
        say(f"FALLS SHORT: {line}")
    for line in figures["goals_missed"]:
        say(f"goal missed: {line}")
    print(json.dumps(figures), flush=True)
    return 1 if wrong else 0


def say(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN_AT:5.1f} s] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
