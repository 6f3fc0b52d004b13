"""`make bench-elastic`: the load goes 1 -> 64 -> 1 streams, the expert tier follows by itself, 2 -> 4 -> 2 shards.

On a host with few cores more shards cannot compute more, so the rows' time is a **cost model** there: a shard waits
`--row-us` for each row that it computes, on a timer that holds no core (`CostModelShard`). Everything else is real:
Ray Serve, the policy, the processes that start and drain, the placement, the exchange. `--row-us 0` leaves it out.

    python -P -m expertmesh.bench.elastic [--row-us 100] [--model FOLDER] [--out docs/elastic.svg]

Exits 1 where a stream failed or said other tokens, or the tier did not follow; goals (decision to serving <= 10 s,
longest stall by a switch <= 2 steps) are reported. The last line is one JSON object of figures."""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..client import AnswerDelta, AsyncClient, ReasoningDelta
from ..cluster import app
from ..cluster.app import Cluster
from ..cluster.commands.serve import DEMO_MODEL
from ..config import AutoscalingConfig, CacheConfig, ClusterConfig, NetworkConfig
from ..errors import ExpertMeshError, Unavailable
from ..experts import worker
from ..experts.mlp import LocalExpertMLP
from ..experts.worker import ExpertShard
from ..router.status import ClusterState
from .chart import Chart, Panel

FEW, MANY = 2, 4  # shards
PHASES = ((1, 15.0), (64, 60.0), (1, 60.0))  # (streams at a time, seconds)
NUM_PROMPTS, NUM_TOKENS = 16, 200
QUIET_S = 3.0  # so far from a change of the epoch or the load a wait has nothing to do with it
GOAL_SERVING_S, GOAL_STALL_STEPS = 10.0, 2.0
ROW_US_VARIABLE = "EXPERTMESH_BENCH_ROW_US"


def use_cost_model(row_us: float) -> None:
    """Clusters that this process starts have shards of the cost model."""
    os.environ[ROW_US_VARIABLE] = str(row_us)
    app.ExpertShard = CostModelShard  # type: ignore[assignment, misc]


class CostModelExperts:
    """`LocalExperts` whose rows take a set time more, without a core: what a slower machine's rows would take."""

    def __init__(self, experts: LocalExpertMLP, row_s: float) -> None:
        self._experts, self._row_s = experts, row_s

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        out = self._experts.forward(layer_id, rows, slot_ids)
        time.sleep(self._row_s * int((slot_ids >= 0).sum()))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


class CostModelShard(ExpertShard):
    """An `ExpertShard` whose rows cost what the environment says."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        row_s, load_experts = 1e-6 * float(os.environ[ROW_US_VARIABLE]), worker.load_experts
        worker.load_experts = lambda *given: CostModelExperts(load_experts(*given), row_s)  # type: ignore[assignment]
        await super().__init__(*arguments)


@dataclass(slots=True)
class Watch:
    """What was seen of the cluster while the load ran. Times are seconds since the start."""

    shards: list[tuple[float, float]] = field(default_factory=list)  # serving in the epoch
    busy: list[tuple[float, float]] = field(default_factory=list)  # mean of the serving shards
    epochs: list[tuple[float, int]] = field(default_factory=list)
    starts: dict[str, dict[str, float]] = field(default_factory=dict)  # shard -> phase -> when
    decisions: list[tuple[float, str]] = field(default_factory=list)


async def watch(cluster: Cluster, began_at: float, seen: Watch) -> None:
    """Polls the Conductor five times a second."""
    wall_at = time.time() - (time.monotonic() - began_at)
    while True:
        with contextlib.suppress(Unavailable):
            note(await asyncio.to_thread(cluster.state), time.monotonic() - began_at, wall_at, seen)
        await asyncio.sleep(0.2)


def note(state: ClusterState, now: float, wall_at: float, seen: Watch) -> None:
    shards = [p for p in state.processes if p.role == "expert"]
    serving = [p for p in shards if p.name in state.ranks]
    seen.shards.append((now, float(len(serving))))
    seen.busy.append((now, statistics.fmean([p.busy_fraction for p in serving] or [0.0])))
    if not seen.epochs or seen.epochs[-1][1] != state.epoch:
        seen.epochs.append((now, state.epoch))
    for p in shards:
        phases = seen.starts.setdefault(p.name, {"process": now})
        if p.state != "loading":
            phases.setdefault("joined", now)
        if p.name in state.ranks:
            phases.setdefault("serving", now)
    seen.decisions = [(d.at - wall_at, d.text) for d in state.decisions]


@dataclass(slots=True)
class Load:
    """Closed-loop streams, and when each of their tokens came."""

    client: AsyncClient
    began_at: float
    wanted: int = 0
    running: int = 0
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)  # prompt -> its tokens, greedy: always the same
    tokens: list[list[float]] = field(default_factory=list)  # of each stream

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for streams, seconds in PHASES:
                self.wanted = streams
                for _ in range(streams - self.running):
                    self.running += 1
                    group.create_task(self._stream(self.running))
                say(f"[{time.monotonic() - self.began_at:5.1f} s] {streams} streams")
                await asyncio.sleep(seconds)
            self.wanted = 0

    async def _stream(self, number: int) -> None:
        while number <= self.wanted:
            await self._one(number % NUM_PROMPTS)
        self.running -= 1

    async def _one(self, prompt: int) -> None:
        came: list[float] = []
        ids: list[int] = []
        self.tokens.append(came)
        try:
            stream = self.client.generate(
                token_ids=[100 + prompt, 7, 8],
                temperature=0.0,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                include_token_ids=True,
                timeout_s=120.0,
            )
            async for event in stream:
                if isinstance(event, AnswerDelta | ReasoningDelta):
                    ids += event.token_ids
                    came += [time.monotonic() - self.began_at] * len(event.token_ids)
        except ExpertMeshError as error:
            self.failures.append(f"prompt {prompt}: {type(error).__name__}: {error}")
            return
        self.num_done += 1
        if ids != self.texts.setdefault(prompt, ids):
            self.failures.append(f"prompt {prompt}: other tokens")


def per_second(load: Load) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(tokens in each second, p99 inter-token time of each second in ms)."""
    counts: dict[int, int] = {}
    gaps: dict[int, list[float]] = {}
    for came in load.tokens:
        for at in came:
            counts[int(at)] = counts.get(int(at), 0) + 1
        for a, b in itertools.pairwise(came):
            gaps.setdefault(int(b), []).append(b - a)
    seconds = range(max(counts, default=0) + 1)
    p99 = [(s + 0.5, 1e3 * sorted(gaps[s])[int(0.99 * (len(gaps[s]) - 1))]) for s in seconds if s in gaps]
    return [(s + 0.5, float(counts.get(s, 0))) for s in seconds], p99


def switches(load: Load, seen: Watch) -> list[dict[str, float]]:
    """For each change of the epoch: the longest wait of any stream around it, in steps of that time, and by how much
    that is longer than streams wait without a change (`undisturbed`): on a host of few cores that is no little."""
    usual = undisturbed(load, seen)["p99.9"]
    found = [longest_wait(load, at) for at, _ in seen.epochs[1:]]
    return [wait | {"excess_steps": round(max(0.0, wait["steps"] - usual), 2)} for wait in found if wait is not None]


def undisturbed(load: Load, seen: Watch) -> dict[str, float]:
    """What streams wait for a token in steps of that second, where no epoch changed and the load did not."""
    changes = [at for at, _ in seen.epochs[1:]]
    changes += itertools.accumulate(seconds for _, seconds in PHASES)
    by_second: dict[int, list[float]] = {}
    for came in load.tokens:
        for a, b in itertools.pairwise(came):
            if a < b > QUIET_S and all(abs(b - change) > QUIET_S for change in changes):
                by_second.setdefault(int(b), []).append(b - a)
    waits = sorted(wait / statistics.median(all_of) for all_of in by_second.values() for wait in all_of)
    if not waits:
        return {"p50": 0.0, "p99.9": 0.0, "most": 0.0}
    return {
        "p50": round(waits[len(waits) // 2], 2),
        "p99.9": round(waits[int(0.999 * (len(waits) - 1))], 2),
        "most": round(waits[-1], 2),
    }


def longest_wait(load: Load, at: float) -> dict[str, float] | None:
    pairs = [
        pair
        for came in load.tokens
        for pair in itertools.pairwise(came)
        if at - 2.0 < pair[1] < at + 2.0 and pair[0] < pair[1]
    ]
    near = [b - a for a, b in pairs if at - 1.0 < b < at + 0.5]
    if not near:
        return None
    step = statistics.median(b - a for a, b in pairs)
    return {"at_s": round(at, 1), "longest_s": round(max(near), 4), "steps": round(max(near) / step, 2)}


def starts(seen: Watch) -> list[dict[str, Any]]:
    """Of each shard that was added: seconds from the decision to its process, joining and serving."""
    found: list[dict[str, Any]] = []
    for name, phases in seen.starts.items():
        asked = [
            at for at, text in seen.decisions if at <= phases["process"] and "target" in text and "enough" not in text
        ]
        if asked and "serving" in phases and phases["process"] > 1.0:
            found.append({"shard": name} | {k: round(at - asked[-1], 2) for k, at in phases.items()})
    return found


def throughput(load: Load, seen: Watch, shards: int) -> float:
    """Tokens a second with so many shards serving, under the heavy phase."""
    first, last = PHASES[0][1] + 2.0, PHASES[0][1] + PHASES[1][1] - 1.0
    spans = [(a, b) for (a, n), (b, _) in itertools.pairwise(seen.shards) if n == shards and first < a and b < last]
    seconds = sum(b - a for a, b in spans)
    count = sum(any(a <= at < b for a, b in spans) for came in load.tokens for at in came)
    return count / seconds if seconds else 0.0


@contextlib.contextmanager
def started(row_us: float, model: Path) -> Iterator[Cluster]:
    scaling = AutoscalingConfig(
        min_expert_shards=FEW,
        max_expert_shards=MANY,
        target_busy=0.5,
        upscale_delay_s=1.0,
        downscale_delay_s=6.0,
        cooldown_s=3.0,
    )
    config = ClusterConfig(
        model=str(model),
        device="cpu",
        num_expert_shards=FEW,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=128 << 20),
        autoscaling=scaling,
    )
    if row_us:
        use_cost_model(row_us)
    with Cluster(config, progress=say) as cluster:
        yield cluster


async def measure(cluster: Cluster) -> tuple[Load, Watch]:
    seen, began_at = Watch(), time.monotonic()
    async with AsyncClient(cluster.gateways) as client:
        load = Load(client, began_at)
        watching = asyncio.create_task(watch(cluster, began_at, seen))
        await load.run()
        deadline = time.monotonic() + 45.0
        while seen.shards[-1][1] != FEW and time.monotonic() < deadline:  # noqa: ASYNC110  # the watcher's own pace
            await asyncio.sleep(0.2)
        watching.cancel()
    return load, seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row-us", type=float, default=100.0, help="cost model: time of a row, 0 = none")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="served on the CPU whatever the host has")
    parser.add_argument("--out", type=Path, default=Path("elastic.svg"))
    arguments = parser.parse_args()
    with started(arguments.row_us, arguments.model) as cluster:
        load, seen = asyncio.run(measure(cluster))
    counts, p99 = per_second(load)
    changes, added = switches(load, seen), starts(seen)
    most = max(n for _, n in seen.shards)
    figures = {
        "model": arguments.model.name,
        "cpus": os.cpu_count(),
        "cost_model_row_us": arguments.row_us,
        "streams": load.num_done,
        "failures": load.failures[:5],
        "shards": [FEW, most, seen.shards[-1][1]],
        "tokens_per_s": {str(n): round(throughput(load, seen, n), 1) for n in range(FEW, MANY + 1)},
        "starts_s": added,
        "switches": changes,
        "longest_stall_steps": max((c["steps"] for c in changes), default=None),
        "longest_stall_excess_steps": max((c["excess_steps"] for c in changes), default=None),
        "wait_steps_without_a_switch": undisturbed(load, seen),
    }
    name = "demo model" if arguments.model == DEMO_MODEL else arguments.model.name
    chart = Chart(
        f"Load 1 → 64 → 1 streams, {name}; rows cost {arguments.row_us:.0f} us more (cost model)"
        if arguments.row_us
        else f"Load 1 → 64 → 1 streams, {name}, {os.cpu_count()} cores, no cost model",
        [
            Panel("tokens per second", {"tokens": counts}),
            Panel("p99 inter-token time of each second, ms", {"p99": p99}),
            Panel("shards that serve", {"shards": seen.shards}, steps=True),
            Panel("mean busy fraction of the shards", {"busy": seen.busy}),
        ],
        [(at, text) for at, text in seen.decisions if at >= 0],
    )
    arguments.out.write_text(chart.svg())
    wrong = [*load.failures[:5]]
    if most < MANY or seen.shards[-1][1] != FEW:
        wrong.append(
            f"the tier went {FEW} -> {most:.0f} -> {seen.shards[-1][1]:.0f} shards, {FEW} -> {MANY} -> {FEW} wanted"
        )
    for line in wrong:
        say(f"FALLS SHORT: {line}")
    for line in goals_missed(added, changes):
        say(f"goal missed: {line}")
    print(json.dumps(figures), flush=True)
    return 1 if wrong else 0


def goals_missed(added: Sequence[dict[str, Any]], changes: Sequence[dict[str, float]]) -> list[str]:
    missed = [
        f"{a['shard']} served {a['serving']} s after the decision, goal {GOAL_SERVING_S} s"
        for a in added
        if a["serving"] > GOAL_SERVING_S
    ]
    stalls = [c for c in changes if c["steps"] > GOAL_STALL_STEPS]
    return missed + [
        f"a stall of {c['steps']} steps at {c['at_s']} s, {c['excess_steps']} more than without a switch, "
        f"goal {GOAL_STALL_STEPS}"
        for c in stalls
    ]


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
